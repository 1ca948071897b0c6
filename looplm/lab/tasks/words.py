"""Word lists for made-up people, as long as those of the published experiments; ours, put together from syllables.

Every entry is one token. The lists share no word.
"""

from itertools import product


def _joined(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head, tail in product(heads.split(), tails.split()))


FIRST_NAMES = _joined(
    "Al Ber Cor Dal El Fen Gar Hal Is Jor Kel Lor Mar Nor Os Per Quin Ros Sel Tam",
    "a an bert da den eth ia in ine is ius la lin mon na nor on ric sa wyn",
)
MIDDLE_NAMES = _joined(
    "Am Bri Cla Dor Em Flo Gre Hu Ing Ju Ka Le Mi Nes Ot Pa Ru Ste Tho Va",
    "bel chard dric fa gar ko lda ma mund nia nka rah ren ris rta sha ter tus vi zo",
)
LAST_NAMES = _joined(
    "Ash Black Brook Carn Dun East Fair Green Hart Holm Kings Lang Marsh North Oak Pren Red Rock Sand Stan Stone Thorn "
    "Under West White",
    "acre bank beck bourne brand bridge burn bury by cote croft dale den er field gate ham haven head hill hurst ing "
    "land ley low man mead mere moor more ridge row shaw side son stead stone thwaite wick wood",
)
MONTHS = "January February March April May June July August September October November December".split()
CITIES = _joined(
    "Alder Birch Cald Dray Elm Farn Glen Haver Iver Kirk Lynd Mill New Orm Pem Rother Swan Tar Ulver Wen",
    "borough brook chester cliffe ford minster mouth pool port ton",
)
UNIVERSITIES = tuple(
    name
    for place in _joined("Ab Bel Cas Del Er Fal Gos Han Il Jas", "cott dor fax gill hampton leigh mar nock ster wold")
    for name in (f"University of {place}", f"{place} College", f"{place} Institute of Technology")
)
MAJORS = tuple(
    f"{kind} {field}"
    for kind in "Applied Classical Comparative Computational Environmental Historical Industrial Medical Modern "
    "Theoretical".split()
    for field in "Botany Chemistry Economics Geography Linguistics Mathematics Music Philosophy Physics "
    "Statistics".split()
)
EMPLOYERS = tuple(
    f"{name} {trade}"
    for name in _joined("Arc Bor Cel Dyn Eko Fer", "anta elia ix oma une")
    for trade in "Airways Bank Foods Foundry Glass Insurance Motors Press Shipping".split()
)[:263]
YEARS = tuple(map(str, range(1900, 2100)))
DAYS = tuple(map(str, range(1, 29)))
PRONOUNS = ("She", "He")

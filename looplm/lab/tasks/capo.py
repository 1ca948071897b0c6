"""Capo: how many bits of made-up biographies the weights hold (Ouro section 6.1, B.1; bioS(N) of Allen-Zhu and Li).

Each of N people has a random name and random attributes: gender (told by the pronoun), birth date, birth city,
university, major and employer. A person's sentences are drawn once and stay; a row is one person between `<start>` and
`<end>`, learnt as plain text. As the word lists of the paper are not published with it, ours take their place, of the
same lengths and each entry one token; N_0 and S_0, the numbers of possible names and attributes, follow from the lists
in use. At laptop size a record is just the name and the attributes.

What is graded is memory, so validation and test rows are the people trained on, in order; a training pass shuffles them
anew. Knowledge in bits, with p_1 and p_2 the cross-entropies in nats of a name and of the attributes, summed over their
tokens and averaged over the people:

    N log2(N_0 / e^p_1) + N log2(S_0 / e^p_2)

and R is that divided by the number of parameters. (The second term is set ambiguously in print.)
"""

import math
from functools import lru_cache
from typing import Annotated, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from looplm.lab.tasks import words
from looplm.lab.tasks.base import BLOCK, IGNORED, PAD, Batch, Request, Task, TaskSettings
from looplm.lab.tasks.draws import SPLITS, Draws, Integers, Split, squeeze

NAMES = {"first": words.FIRST_NAMES, "middle": words.MIDDLE_NAMES, "last": words.LAST_NAMES}
ATTRIBUTES = {
    "pronoun": words.PRONOUNS,
    "month": words.MONTHS,
    "day": words.DAYS,
    "year": words.YEARS,
    "city": words.CITIES,
    "university": words.UNIVERSITIES,
    "major": words.MAJORS,
    "employer": words.EMPLOYERS,
}
LISTS = {**NAMES, **ATTRIBUTES}

SENTENCES = (
    (
        "{first} {middle} {last} was born on {month} {day} , {year} .",
        "{first} {middle} {last} came into the world on {month} {day} , {year} .",
        "The life of {first} {middle} {last} began on {month} {day} , {year} .",
        "The birthday of {first} {middle} {last} is {month} {day} , {year} .",
    ),
    (
        "{pronoun} was born in {city} .",
        "{pronoun} spent the first years in {city} .",
        "{pronoun} first saw the light of {city} .",
        "{pronoun} has roots in {city} .",
    ),
    (
        "{again} studied at {university} .",
        "{again} was a student of {university} .",
        "{again} took a degree from {university} .",
        "{again} went through {university} .",
    ),
    (
        "{again} chose the subject of {major} .",
        "{again} took up {major} .",
        "{again} is trained in {major} .",
        "{again} read {major} for years .",
    ),
    (
        "{again} works for {employer} .",
        "{again} found a post with {employer} .",
        "{again} is employed by {employer} .",
        "{again} earns a living at {employer} .",
    ),
)
"""The ways to say each attribute; `again` is the pronoun where it tells nothing new."""
RECORD = " ".join(f"{{{field}}}" for field in LISTS)


class CapoSettings(TaskSettings):
    """Settings of Capo."""

    people: Annotated[int, Field(ge=1)]
    """N"""
    names: tuple[int, int, int] = (400, 400, 1000)
    """How many entries of the lists of first, middle and last names are in use."""
    values: tuple[int, int, int, int, int, int, int] = (12, 28, 200, 200, 300, 100, 263)
    """The same for month, day, year, city, university, major and employer."""
    sentences: bool = True
    """Biographies in words; else only the name and the attributes."""

    @classmethod
    def paper(cls) -> Self:
        """bioS(20,000), the smallest of 20, 50, 100, 200 and 500 thousand."""
        return cls(people=20_000)

    @classmethod
    def laptop(cls) -> Self:
        """2,000 short records of 26 bits, and names out of 32,768."""
        return cls(people=2_000, names=(32, 32, 32), values=(8, 8, 8, 16, 16, 16, 16), sentences=False)

    @model_validator(mode="after")
    def _lists_suffice(self) -> Self:
        for field, size in self.sizes.items():
            if not 1 <= size <= len(LISTS[field]):
                raise ValueError(f"{field} has {size} entries; it must be 1 to {len(LISTS[field])}")
        if 2 * self.people > self.possible_names:
            raise ValueError(f"people is {self.people}; at most half of the {self.possible_names} names may be in use")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Entries in use of each list."""
        return dict(zip(LISTS, (*self.names, len(words.PRONOUNS), *self.values), strict=True))

    @property
    def possible_names(self) -> int:
        """N_0"""
        return math.prod(self.names)

    @property
    def possible_attributes(self) -> int:
        """S_0, with two genders."""
        return len(words.PRONOUNS) * math.prod(self.values)


class People(NamedTuple):
    """The people of a seed."""

    fields: Integers
    """(N, 11), places in the lists, in the order of `LISTS`."""
    sentences: Integers
    """(N, 5), which sentence each is described with."""


class Capo(Task[CapoSettings]):
    """Biographies to be learnt by heart."""

    name = "capo"
    shows = (
        "Biographies learnt by heart; the claim: a parameter holds about 2 bits, with or without loops (Ouro section "
        "6.1)."
    )
    unit = "records"
    Settings = CapoSettings

    def _words(self) -> tuple[str, ...]:
        said = {word for ways in self._ways() for way in ways for word in way.split() if not word.startswith("{")}
        entries = (entry for field, size in self.settings.sizes.items() for entry in LISTS[field][:size])
        return (PAD, "<start>", "<end>", *sorted(said), *entries)

    def _ways(self) -> tuple[tuple[str, ...], ...]:
        return SENTENCES if self.settings.sentences else ((RECORD,),)

    def _length(self) -> int:
        return 1 + sum(max(len(way.split()) for way in ways) for ways in self._ways())

    def levels(self, split: Split) -> tuple[int, ...]:
        """All records count alike."""
        return (1,)

    def _rows(self, request: Request) -> Batch:
        people = people_of(self.settings, request.seed)
        rows = self._who(request)
        told, kept, kinds = [], [], []
        for place, ways in enumerate(self._ways()):
            table, slots = self._templates(ways)
            chosen = people.sentences[rows, place] % len(ways)
            fields = self._entries(people.fields[rows])
            slot = slots[chosen]
            told.append(np.where(slot >= 0, np.take_along_axis(fields, np.maximum(slot, 0), axis=1), table[chosen]))
            kept.append(table[chosen] != self.ids[PAD])
            kinds.append(slot)
        mask = np.concatenate(kept, axis=1)
        text = squeeze(np.concatenate(told, axis=1), mask, self.ids[PAD])
        kind = squeeze(np.concatenate(kinds, axis=1), mask, -1)
        return self._lines(text, kind, mask.sum(axis=1))

    def _lines(self, text: Integers, kind: Integers, lengths: Integers) -> Batch:
        """Rows of text to be continued at every position; `kind` is the field a token tells, -1 for none."""
        count = len(text)
        tokens, targets, answer = self._blank(count)
        tokens[:, 0], tokens[:, 1:] = self.ids["<start>"], text
        targets[:, :-1] = np.where(text == self.ids[PAD], IGNORED, text)
        targets[np.arange(count), lengths] = self.ids["<end>"]
        names = np.zeros_like(answer)
        names[:, :-1] = (kind >= 0) & (kind < len(NAMES))
        answer[:, :-1] = (kind >= len(NAMES)) & (kind < len(LISTS))
        return Batch(tokens=tokens, targets=targets, answer=answer, difficulty=np.ones(count, np.int64), names=names)

    def _who(self, request: Request) -> Integers:
        """The people of a block: passes over all of them, shuffled anew each time in training."""
        count = self.settings.people
        places = request.number * BLOCK + np.arange(BLOCK)
        if request.split != "train":
            return places % count
        passes = places // count
        return np.concatenate(
            [
                shuffled(request.seed, int(number), count)[places[passes == number] % count]
                for number in np.unique(passes)
            ]
        )

    def _entries(self, fields: Integers) -> Integers:
        """Tokens of the fields, with the pronoun once more at the end, for the slot `again`."""
        starts = [self.ids[LISTS[field][0]] for field in LISTS]
        found = fields + np.array(starts)
        return np.concatenate([found, found[:, len(NAMES), None]], axis=1)

    def _templates(self, ways: tuple[str, ...]) -> tuple[Integers, Integers]:
        """Tokens of sentences with their slots still empty, and the field of each slot, -1 for words."""
        names = [f"{{{field}}}" for field in (*LISTS, "again")]
        width = max(len(way.split()) for way in ways)
        tokens, slots = np.full((len(ways), width), self.ids[PAD]), np.full((len(ways), width), -1)
        for row, way in enumerate(ways):
            for place, word in enumerate(way.split()):
                slots[row, place] = names.index(word) if word in names else -1
                tokens[row, place] = self.ids.get(word, self.ids["<start>"])
        return tokens, slots

    def example(self, seed: int = 0) -> str:
        """The record of one person."""
        tokens = self.batch(seed, 0, 1, "test")["tokens"][0, 1:]
        return self.text(tokens[tokens != self.ids[PAD]]).replace(" ,", ",").replace(" .", ".")

    def bits(self, name_loss: float, attribute_loss: float) -> float:
        """Knowledge in bits, from p_1 and p_2 in nats (see the head of the module)."""
        per_person = math.log2(self.settings.possible_names) + math.log2(self.settings.possible_attributes)
        return self.settings.people * (per_person - (name_loss + attribute_loss) / math.log(2))


@lru_cache(maxsize=4)
def people_of(settings: CapoSettings, seed: int) -> People:
    """The people of a seed, no two with the same name."""
    draws, count = Draws(seed, len(SPLITS)), settings.people
    names = np.zeros(0, np.int64)
    while len(names) < count:
        names = np.concatenate([names, draws.integers(settings.possible_names, count)])
        _, first = np.unique(names, return_index=True)
        names = names[np.sort(first)]
    first_middle, last = np.divmod(names[:count], settings.names[2])
    columns = [*np.divmod(first_middle, settings.names[1]), last]
    columns += [draws.integers(settings.sizes[field], count) for field in ATTRIBUTES]
    return People(np.stack(columns, axis=1), draws.integers(len(SENTENCES[0]), count, len(SENTENCES)))


@lru_cache(maxsize=2)
def shuffled(seed: int, number: int, count: int) -> Integers:
    """The order of one pass over the people."""
    return Draws(seed, len(SPLITS), 1 + number).order(count)

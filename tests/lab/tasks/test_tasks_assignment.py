"""Variable assignment against Python's own `exec`-like reading of the statements."""

import re
from collections import Counter

import pytest
from task_rows import items, only

from looplm.lab.tasks import make_task


def read(item):
    """(value, copies, constants) of the variable asked about."""
    *statements, question = "".join(item.words).split(",")
    values, depths = {}, {}
    for statement in statements:
        name, said = statement.split("=")
        assert name not in values
        values[name] = values.get(said, said)
        depths[name] = depths[said] + 1 if said in depths else 0
    name, mark = question.split("=")
    assert mark == "?"
    return values[name], depths[name], [values[name] for name in values if depths[name] == 0]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("assignment", scale)
    for item in items(task, split=split):
        value, depth, _ = read(item)
        assert only(item.answers) == (len(item.words) - 1, value) and item.learnt == item.answers
        assert depth == item.level and item.words.count("=") == (depth + 1) * task.settings.chains + 1


def test_the_published_format():
    task = make_task("assignment", "paper", test_levels=(1,))
    assert re.fullmatch(r"[a-z]=\d, [a-z]=\d, [a-z]=[a-z], [a-z]=[a-z], [a-z]=\? → \d", task.example())


def test_the_place_of_a_constant_does_not_give_the_answer_away():
    found = Counter()
    for item in items(make_task("assignment"), size=2048):
        value, _, constants = read(item)
        found[constants.index(value)] += 1
    assert set(found) == {0, 1, 2} and all(600 < count < 770 for count in found.values())


def test_held_out_constants_are_never_trained_under_other_names_or_depths():
    task = make_task("assignment", chains=2)

    def told(**more):
        return [(frozenset(constants), value) for value, _, constants in map(read, items(task, **more))]

    trained, asked = set(told(size=4096)), told(seed=1, size=1024, split="test")
    validated = set(told(seed=2, size=1024, split="validation"))
    assert not trained & set(asked) and not trained & validated and not set(asked) & validated
    assert len(trained | set(asked) | validated) == 90  # all pairs of ten digits, either being the answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chains": 5}, "chains is 5; to depth 5 that is 30 names, of 26 letters"),
        ({"values": 2}, "chains is 3; there are only 2 values"),
        ({"levels": (-1,)}, "levels holds -1; the lowest level is 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"^assignment: {re.escape(message)}$"):
        make_task("assignment", **changes)

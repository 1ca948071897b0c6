"""Group composition against permutations that act on things, and sums modulo n."""

import itertools

import numpy as np
import pytest
from task_rows import items, only

from looplm.lab.tasks import make_task
from looplm.lab.tasks.group import elements, multiplication


def product(group, words):
    """g_1 o g_2 o ...: applied to things from the right, or a sum."""
    if group[0] == "Z":
        return str(sum(map(int, words)) % int(group[1:]))
    things = range(1, int(group[1:]) + 1)
    for word in reversed(words):
        things = [int(word[thing - 1]) for thing in things]
    return "".join(map(str, things))


@pytest.mark.parametrize("changes", [{}, {"group": "S5"}, {"group": "Z7", "dense": False}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(changes, split):
    task = make_task("group", **changes)
    for item in items(task, split=split):
        mark, *words = item.words
        assert mark == "#" and len(words) == item.level
        assert only(item.answers) == (item.level, product(task.settings.group, words))
        asked = range(1, item.level + 1) if task.settings.dense else [item.level]
        assert item.learnt == {n: product(task.settings.group, words[:n]) for n in asked}


def test_paper_scale():
    task = make_task("group", "paper")
    for item in items(task, size=32):
        assert only(item.answers)[1] == product("S5", item.words[1:])


@pytest.mark.parametrize("group", ["S2", "S3", "S4", "Z2", "Z12"])
def test_tables_are_groups(group):
    table, count = multiplication(group), len(elements(group))
    assert sorted(map(tuple, np.sort(table, axis=1))) == [tuple(range(count))] * count
    assert table[0].tolist() == table[:, 0].tolist() == list(range(count))
    assert np.array_equal(table[table], table[np.arange(count)[:, None, None], table[None]])  # (ab)c = a(bc)


def test_by_hand():
    """In S3, 213 swaps the first two and 132 the last two; 213 o 132 sends 1 to 2, 2 to 3 and 3 to 1."""
    names, table = elements("S3"), multiplication("S3")
    assert names[table[names.index("213"), names.index("132")]] == "231"
    assert multiplication("Z5")[3, 4] == 2


@pytest.mark.parametrize("group", ["S3", "Z5"])
def test_no_prefix_of_a_training_row_answers_a_held_out_item(group):
    task = make_task("group", group=group, levels=(1, 2, 3, 4, 6), test_levels=(3, 4))
    identity = elements(group)[0]

    def told(words):
        return tuple(word for word in words if word != identity)

    trained = set()
    for item in items(task, size=4096):
        trained |= {told(item.words[1 : 1 + n]) for n in range(1, item.level + 1)}
    asked = [told(item.words[1:]) for item in items(task, seed=1, size=1024, split="test")]
    validated = {told(item.words[1:]) for item in items(task, seed=2, size=1024, split="validation")}
    assert all(len(words) >= 3 for words in asked) and not trained & set(asked)
    assert not trained & validated and not set(asked) & validated
    assert not {words[:3] for words in trained} & {words[:3] for words in asked}
    assert len(set(asked)) < len(asked) / 4


def test_short_products_are_in_every_split():
    task = make_task("group", levels=(1, 2), test_levels=(1, 2))
    pairs = set(itertools.product(elements("S3"), repeat=2))
    for split in ("train", "validation", "test"):
        found = {tuple(item.words[1:]) for item in items(task, size=1024, split=split)}
        assert pairs <= found


@pytest.mark.parametrize("name", ["S1", "S6", "Z1", "Z0", "A5", "", "S", "z3", "Z1000"])
def test_unknown_groups(name):
    with pytest.raises(ValueError, match=r"^group: group is .*: the groups are S2 to S5 .permutations. and Z2 to Z999"):
        make_task("group", group=name)


def test_a_group_too_small_to_hold_anything_out():
    task = make_task("group", group="Z2", levels=(4,), test_levels=(4,))
    with pytest.raises(ValueError, match=r"^group: no (validation|test) items with elements 4 were found"):
        [task.batch(0, 0, 1, split) for split in ("validation", "test")]

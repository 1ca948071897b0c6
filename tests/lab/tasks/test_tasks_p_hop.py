"""p-hop induction against its definition, read off the symbols alone."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import items, only

from looplm.lab.tasks import make_task
from looplm.lab.tasks.p_hop import LETTERS, find


def find_1(v, i):
    """max({0} and all j <= i with v[j-1] = v[i]); positions count from 1."""
    return max([0] + [j for j in range(2, i + 1) if v[j - 2] == v[i - 1]])


def find_p(v, i, p):
    for _ in range(p):
        i = find_1(v, i) if i else 0
    return i


def read(task, item):
    lead = 0 if item.words[0] in LETTERS else 1
    assert lead == 0 or item.words[0] == f"<{item.level}>"
    return lead, item.words[lead:]


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("p-hop", scale)
    for item in items(task, split=split, size=64):
        lead, v = read(task, item)
        asked = range(1, len(v) + 1) if task.settings.dense else [len(v)]
        due = {lead + i - 1: v[found - 1] for i in asked if (found := find_p(v, i, item.level))}
        assert item.learnt == due
        assert only(item.answers) == (lead + len(v) - 1, due[lead + len(v) - 1])


@pytest.mark.parametrize(("symbols", "p"), [(2, 1), (2, 5), (4, 16), (4, 32), (7, 3)])
def test_forced_hops_never_stay(symbols, p):
    task = make_task("p-hop", "paper", symbols=symbols, levels=(p,), test_levels=(p,), symbols_a_row=2 * p + 20)
    for item in items(task, size=32):
        chain = [find_p(item.words, len(item.words), hops) for hops in range(p + 1)]
        assert all(later > earlier >= 2 for later, earlier in pairwise(chain))


def test_by_hand():
    """a b c a b: the last b was followed by c, c by nothing before; the last a by b."""
    row = np.array([[0, 1, 2, 0, 1]])
    assert find(row, 3, np.array([1]), np.arange(5)).tolist() == [[-1, -1, -1, 1, 2]]
    assert find(row, 3, np.array([2]), np.arange(5)).tolist() == [[-1, -1, -1, -1, -1]]
    stays = np.array([[0, 0]])  # a doubled symbol finds itself, whatever p is
    assert find(stays, 1, np.array([3]), np.arange(2)).tolist() == [[-1, 1]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6))
def test_find_equals_its_definition(symbols, p):
    fast = find(np.array([symbols]), 4, np.array([p]), np.arange(len(symbols)))[0]
    assert fast.tolist() == [find_p(symbols, i, p) - 1 for i in range(1, len(symbols) + 1)]


def test_dense_rows_repeat_no_symbol():
    task = make_task("p-hop", levels=(1, 8), test_levels=(8,), symbols_a_row=64)
    for item in items(task, size=128):
        _, v = read(task, item)
        assert all(a != b for a, b in pairwise(v))


@pytest.mark.parametrize("dense", [True, False])
def test_held_out_sequences_are_never_trained_under_other_names(dense):
    task = make_task("p-hop", dense=dense, symbols=3, symbols_a_row=9, levels=(1, 2), test_levels=(1, 2))

    def patterns(**more):
        return [tuple(map(v.index, v)) for _, v in (read(task, item) for item in items(task, **more))]

    trained, asked = set(patterns(size=4096)), patterns(seed=1, size=1024, split="test")
    assert not trained & set(asked)
    assert not (trained | set(asked)) & set(patterns(seed=2, size=1024, split="validation"))
    assert len(set(asked)) < len(asked) / 4

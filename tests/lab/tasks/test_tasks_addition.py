"""Addition against Python's own."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import items

from looplm.lab.tasks import make_task


def solve(task, item):
    """The operands read from the question, and the digits that must follow it."""
    text = "".join(item.words)
    question, given_sum = text.split("=")
    step = -1 if task.settings.least_significant_first else 1
    written = question.split("+")
    assert all(len(operand) == task.settings.digits for operand in written) and len(written) == item.level
    operands = [int(operand[::step]) for operand in written]
    width = len(str(task.settings.hardest * (10**task.settings.digits - 1)))
    total = str(sum(operands))
    due = [*total.zfill(width)[::-1]] if step < 0 else [*total, "<end>"]
    assert [*given_sum] == due[:-1]
    start = len(question)
    assert item.learnt == item.answers == {start + place: digit for place, digit in enumerate(due)}
    return operands


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("addition", scale)
    found = [solve(task, item) for item in items(task, split=split)]
    levels = task.settings.levels if split == "train" else task.settings.test_levels
    assert {len(operands) for operands in found} == set(levels)


def test_the_published_format():
    task = make_task("addition", "paper", levels=(4,), test_levels=(4,))
    for item in items(task, size=64):
        assert re.fullmatch(r"\d{3}\+\d{3}\+\d{3}\+\d{3}=(0|[1-9]\d*)", "".join(item.words))
    assert re.fullmatch(r"(\d{3}\+){15}\d{3}= → \d+<end>", make_task("addition", "paper", test_levels=(16,)).example())


@given(st.integers(1, 5), st.lists(st.integers(1, 7), min_size=1, max_size=3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_any_digits_and_operands(digits, operands, reverse, seed):
    levels = (*operands, 2)  # one operand of one digit alone would be too few items
    task = make_task("addition", digits=digits, levels=levels, test_levels=levels, least_significant_first=reverse)
    for item in items(task, seed=seed, size=16):
        solve(task, item)


def test_held_out_sets_of_operands_are_never_trained_whatever_their_order_and_zeros():
    task = make_task("addition", digits=1, levels=(2, 3, 4), test_levels=(2, 3))

    def sets(**more):
        return [tuple(sorted(n for n in solve(task, item) if n)) for item in items(task, **more)]

    trained, asked = set(sets(size=4096)), sets(seed=1, size=1024, split="test")
    validated = sets(seed=2, size=1024, split="validation")
    assert not trained & set(asked) and not trained & set(validated) and not set(asked) & set(validated)
    assert len(set(asked)) < len(asked) / 8


def test_a_curriculum_of_other_settings_keeps_the_split():
    short = make_task("addition", digits=1, levels=(2,), test_levels=(2,))
    long = make_task("addition", digits=1, levels=(2, 3, 4, 5), test_levels=(2,))
    trained = {tuple(sorted(n for n in solve(long, item) if n)) for item in items(long, size=4096)}
    assert not trained & {tuple(sorted(n for n in solve(short, i) if n)) for i in items(short, split="test")}

"""Mano against a recursive reader of the printed expression."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import items, only

from looplm.lab.tasks import make_task
from looplm.lab.tasks.mano import evaluate

RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def read(words, place, modulus, parts):
    """(value, canonical text, operators, end) of the part at `place`; collects all parts that have an operator."""
    word = words[place]
    if word not in RESULT:
        return int(word), word, 0, place
    a, left, m, end = read(words, place + 1, modulus, parts)
    b, right, n, end = read(words, end + 1, modulus, parts)
    sides = [left, right] if word == "-" else sorted([left, right])
    part = (RESULT[word](a, b) % modulus, f"({word} {' '.join(sides)})", m + n + 1, end)
    parts.append((place, *part))
    return part


def solve(item, modulus):
    start, length, *expression, mark = item.words
    parts = []
    value, text, operators, end = read(expression, 0, modulus, parts)
    assert (start, mark, length) == ("<bos>", "<ans>", f"<len_{operators}>")
    assert end == len(expression) - 1 and operators == item.level
    return value, text, parts


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("mano", scale)
    for item in items(task, split=split):
        value, _, parts = solve(item, task.settings.modulus)
        assert only(item.answers) == (len(item.words) - 1, str(value))
        largest = {}
        for _, value, _, operators, end in parts:
            if operators > largest.get(end, (0, 0))[0]:
                largest[end] = (operators, value)
        dense = {2 + end: str(value) for end, (_, value) in largest.items()} if task.settings.dense else {}
        assert item.learnt == {**dense, **item.answers}


def test_the_printed_example():
    """`- * a b + c d` is (a*b)-(c+d): with 3 4 5 6 modulo 23, 12 - 11 = 1."""
    operators = np.array([[3, 1, 0, 0, 1, 0, 0]])
    parts = evaluate(operators, np.array([[1, 2, 3, 4, 0, 5, 6]]), 23)
    assert parts.values[0].tolist() == [1, 12, 3, 4, 11, 5, 6] and parts.ends[0].tolist() == [6, 3, 2, 3, 6, 5, 6]
    negative = evaluate(np.array([[1, 0, 0]]), np.array([[1, 3, 5]]), 23)
    assert negative.values[0, 0] == 21


def test_swapped_sides_share_a_key_except_around_a_minus():
    def key(*symbols):
        return int(evaluate(np.array([[1, 0, 0]]), np.array([symbols]), 7).keys[0, 0])

    assert key(0, 2, 5) == key(0, 5, 2) and key(2, 2, 5) == key(2, 5, 2)
    assert len({key(1, 2, 5), key(1, 5, 2), key(0, 2, 5), key(2, 2, 5)}) == 4


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_any_modulus_and_length(modulus, operators, seed):
    task = make_task("mano", modulus=modulus, levels=(operators,), test_levels=(operators,), dense=False)
    for item in items(task, seed=seed, size=16):
        assert only(item.answers)[1] == str(solve(item, modulus)[0])


@pytest.mark.parametrize("dense", [True, False])
def test_no_training_row_gives_a_held_out_expression_away(dense):
    task = make_task("mano", modulus=2, levels=(1, 2, 3), test_levels=(2, 3), dense=dense)
    trained = set()
    for item in items(task, size=4096):
        _, text, parts = solve(item, 2)
        trained |= {text, *(part[2] for part in parts if dense and part[3] >= 2)}
    asked = [solve(item, 2)[1] for item in items(task, seed=1, size=1024, split="test")]
    validated = [solve(item, 2)[1] for item in items(task, seed=2, size=1024, split="validation")]
    assert not trained & set(asked) and not trained & set(validated) and not set(asked) & set(validated)
    assert len(set(asked)) < len(asked) / 4  # few enough that they would have been met


def test_trees_are_split_uniformly():
    task = make_task("mano", levels=(5,), test_levels=(5,), modulus=23, dense=False)
    left = Counter()
    for item in items(task, size=2048):
        parts = []
        read(item.words[2:-1], 0, 23, parts)
        left[next((part[3] for part in parts if part[0] == 1), 0)] += 1
    assert set(left) == {0, 1, 2, 3, 4} and all(320 < count < 500 for count in left.values())

"""Symbolic i-GSM against a solver that reads the statements as printed."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_rows import items, only

from looplm.lab.tasks import make_task
from looplm.lab.tasks.gsm import Graph, evaluate, structure

STATEMENT = re.compile(r"([A-Z]#[A-Z]) := (?:(\d+)|(?:(\d+) \* )?([A-Z]#[A-Z](?: \+ [A-Z]#[A-Z]){0,2}))")


def read(item):
    """Statements as name -> (number, summands), and the names asked about by place."""
    *statements, questions = " ".join(item.words).split(" . ")
    told = {}
    for statement in statements:
        name, constant, coefficient, sums = STATEMENT.fullmatch(statement).groups()
        assert name not in told
        told[name] = (int(constant or coefficient or 1), sums.split(" + ") if sums else [])
        assert len(set(told[name][1])) == len(told[name][1])
    start = len(item.words) - len(questions.split())
    marks = [place for place, word in enumerate(item.words) if word == "?"]
    assert marks == list(range(start + 1, len(item.words), 2))
    return told, {mark: item.words[mark - 1] for mark in marks}


def value(told, name, modulus):
    number, summands = told[name]
    return number * (sum(value(told, part, modulus) for part in summands) if summands else 1) % modulus


def depth(told, name):
    return 1 + max((depth(told, part) for part in told[name][1]), default=0)


def written(told, name, numbers):
    """The expression without names and order, with or without its numbers."""
    number, summands = told[name]
    if not summands:
        return str(number) if numbers else "c"
    factor = "" if number == 1 else f"{number if numbers else 'k'}*"
    return f"{factor}({' + '.join(sorted(written(told, part, numbers) for part in summands))})"


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers(scale, split):
    task = make_task("gsm", scale)
    for item in items(task, split=split, size=128):
        told, asked = read(item)
        assert len(told) == task.settings.quantities
        due = {place: str(value(told, name, task.settings.modulus)) for place, name in asked.items()}
        assert item.learnt == due
        place, word = only(item.answers)
        assert place == max(asked) and word == due[place] and depth(told, asked[place]) == item.level
        assert set(asked.values()) == set(told) if task.settings.dense else len(asked) == 1
        depths = [depth(told, name) for name in asked.values()]
        assert depths == sorted(depths)


def test_a_leading_coefficient_multiplies_the_whole_sum():
    """As printed: I#N := 2 * J#P + H#J + E#I is 2 (J#P + H#J + E#I), here 2 (3 + 5 + 4) = 24 = 3 modulo 7."""
    graph = Graph(
        depths=np.array([[1, 1, 1, 2]]),
        summands=np.array([[[0, 0, 0]] * 3 + [[0, 1, 2]]]),
        summed=np.array([[[False] * 3] * 3 + [[True] * 3]]),
        numbers=np.array([[3, 5, 4, 2]]),
    )
    assert evaluate(graph, 7).tolist() == [[3, 5, 4, 3]]
    told = {"J#P": (3, []), "H#J": (5, []), "E#I": (4, []), "I#N": (2, ["J#P", "H#J", "E#I"])}
    assert value(told, "I#N", 7) == 3
    other = graph._replace(summands=np.array([[[0, 0, 0]] * 3 + [[2, 0, 1]]]))
    assert (
        structure(graph)[0, 3] == structure(other)[0, 3] != structure(graph._replace(numbers=graph.numbers + 1))[0, 3]
    )


def test_names_follow_the_hierarchy():
    names = make_task("gsm", "paper").vocabulary[-48:]
    assert names[0] == "A#E" and names[-1] == "L#P" and len(set(names)) == 48
    assert {"E#I", "H#J", "I#N", "J#P"} <= set(names)  # the printed ones
    assert all((ord(name[2]) - 65) // 4 == (ord(name[0]) - 65) // 4 + 1 for name in names)


@given(st.integers(3, 11), st.integers(1, 5), st.integers(0, 4), st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_any_modulus_and_size(modulus, level, more, seed):
    task = make_task("gsm", "paper", modulus=modulus, quantities=level + more, levels=(level,), test_levels=(level,))
    for item in items(task, seed=seed, size=16):
        told, asked = read(item)
        assert only(item.answers)[1] == str(value(told, only(asked)[1], modulus))


@pytest.mark.parametrize("dense", [True, False])
def test_held_out_templates_are_never_trained(dense):
    task = make_task("gsm", modulus=3, quantities=4, levels=(1, 2, 3), test_levels=(2, 3), dense=dense)

    def asked(item, every=False):
        told, names = read(item)
        names = [name for name in names.values() if depth(told, name) > 1]
        return [written(told, name, depth(told, name) == 2) for name in (names if every else names[-1:])]

    trained = {text for item in items(task, size=4096) for text in asked(item, every=True)}
    held = [text for item in items(task, seed=1, size=1024, split="test") for text in asked(item)]
    validated = {text for item in items(task, seed=2, size=1024, split="validation") for text in asked(item)}
    assert not trained & set(held) and not trained & validated and not set(held) & validated
    assert len(set(held)) < len(held) / 4
    assert any(text.count("c") > 1 for text in held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantities": 3}, "quantities is 3; it must lie in 4 (the highest level) to 48 (pairs of entities)"),
        ({"entities": 7}, "entities is 7; in 4 layers that is more than 26 letters name"),
        ({"modulus": 2}, "modulus is 2: Input should be greater than or equal to 3"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=f"^gsm: {re.escape(message)}$"):
        make_task("gsm", **changes)

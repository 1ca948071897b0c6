"""Products of n group elements in ceil(log2 n) loops: exhaustive, random, a monoid, the slip in print, damage."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from damage import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.theory import composition
from looplm.lab.theory.composition import (
    build,
    cyclic,
    inputs_of,
    loops_needed,
    size,
    solve,
    symmetric,
    worst_case,
    wrong,
)


def permutations_by_hand(points: int, word: list[int]) -> int:
    """The product as functions: the last element acts first."""
    from itertools import permutations

    elements = list(permutations(range(points)))
    image = tuple(range(points))
    for index in reversed(word):
        image = tuple(elements[index][x] for x in image)
    return elements.index(image)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from([2, 3, 4]), st.data())
def test_the_reference_composes_functions(points, data):
    table = symmetric(points)
    word = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=6))
    assert solve(table, np.array([word]))[0] == permutations_by_hand(points, word)


def test_tables_by_hand():
    assert cyclic(3).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    s3 = symmetric(3)  # 0 = 012, 1 = 021, 2 = 102, 3 = 120, 4 = 201, 5 = 210
    assert s3[1, 2] == 4 and s3[2, 1] == 3 and s3[3, 4] == 0  # 021 o 102 = 201: x -> a(b(x))
    assert len(symmetric(5)) == 120


@pytest.mark.parametrize(
    ("length", "loops"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (32, 5), (33, 6)]
)
def test_loops_by_hand(length, loops):
    assert loops_needed(length) == loops


def test_verified_exhaustively_and_at_random():
    report = composition.verify(1500)
    assert report.holds and report.instances > 12_000 and report.loops == 6


@pytest.mark.slow
def test_verified_on_many():
    report = composition.verify(6000, seed=1)
    pairs = np.array(list(product(range(120), repeat=2)))
    assert (report + composition.check(symmetric(5), pairs)).holds


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 16, 17])
def test_one_loop_fewer_loses_the_first_element(length):
    """The word g e e ... e: position n holds the product of the last 2^(T-1) only, which is the identity."""
    table, word = symmetric(3), worst_case(length)
    model, inputs = build(table, length), inputs_of(word[None], 6)
    assert solve(table, word[None])[0] == 1
    assert model.run(inputs, loops_needed(length))[0, -1].argmax() == 1
    assert model.run(inputs, loops_needed(length) - 1)[0, -1].argmax() == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(0, 10**6))
def test_after_every_loop_positions_hold_blocks(length, seed):
    """Position n - j after loop l: elements n - (j + 1) 2^l + 1 to n - j 2^l, those below 1 left out; integers only."""
    table = symmetric(3)
    word = np.random.default_rng(seed).integers(6, size=length)
    model = build(table, length)
    for loop, state in enumerate(model.states(inputs_of(word[None], 6), loops_needed(length))):
        assert (state == np.round(state)).all()
        held = (state @ model.readout)[0].argmax(-1)
        for j in range(-(-length // 2**loop)):
            block = word[max(0, length - (j + 1) * 2**loop) : length - j * 2**loop]
            assert held[length - j] == solve(table, block[None])[0]


def test_any_monoid_will_do():
    """All 27 maps of three points to themselves, most of them without inverse; the identity is number 0."""
    maps = sorted(product(range(3), repeat=3), key=lambda image: image != (0, 1, 2))
    table = np.array([[maps.index(tuple(a[x] for x in b)) for b in maps] for a in maps])
    words = np.random.default_rng(0).integers(27, size=(300, 7))
    assert composition.check(table, words).holds


def test_the_printed_head_width_is_one_digit_short_at_powers_of_two():
    """With ceil(log2 n) digits positions 0 and n = 2^k are one: their average is fetched."""
    table, words = symmetric(3), np.array(list(product(range(6), repeat=4)))
    model = build(table, 4)
    heads = tuple(replace(h, query=h.query[:, :-1], key=h.key[:, :-1]) for h in model.block[0].heads)
    assert heads[0].query.shape[1] == 2 == loops_needed(4)
    printed = replace(model, block=(replace(model.block[0], heads=heads),))
    assert wrong(model, table, words, 2) == 0 and wrong(printed, table, words, 2) > 500


def test_every_flipped_weight_is_noticed():
    """But for the pointers of positions 0 and 1, which nobody reads after they have multiplied."""
    table, words = symmetric(3), np.array(list(product(range(6), repeat=3)))
    noticed = {path: wrong(model, table, words, 2) > 0 for path, model in flips(build(table, 3))}
    unnoticed = [path for path, seen in noticed.items() if not seen]
    assert len(noticed) > 400
    assert all(path[0] == "positions" and path[1][0] in (0, 1) and path[1][1] >= 5 for path in unnoticed)


@pytest.mark.parametrize("length", [1, 4, 7, 8])
@pytest.mark.parametrize("table", [cyclic(2), cyclic(5), symmetric(3), symmetric(4)])
def test_size_is_the_theorems(table, length):
    """Width 3 (ceil log2 |G| + ceil log2(n + 1)), 2 heads, |G|^2 + 6 ceil log2 |G| neurons."""
    m, k = int(np.ceil(np.log2(len(table)))), int(np.ceil(np.log2(length + 1)))
    built = build(table, length).size
    assert built == size(len(table), length)
    assert (built.width, built.heads, built.hidden) == (3 * (m + k), 2, len(table) ** 2 + 6 * m)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0]], "G >= 2"),
        ([[0, 1, 2], [1, 2, 0]], r"shape \(2, 3\)"),
        ([[0, 1], [1, 2]], r"entries in 0..2; they must be elements 0..1"),
        ([[1, 0], [0, 1]], "element 0 of the table is not the identity"),
        ([[0, 1, 2], [1, 0, 0], [2, 1, 0]], "not associative"),
    ],
)
def test_tables_that_are_none_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        build(np.array(table), 3)


def test_lengths_are_refused():
    with pytest.raises(ValueError, match="length is 0"):
        build(cyclic(2), 0)
    with pytest.raises(ValueError, match="length is 1"):
        worst_case(1)


def test_it_says_what_it_does():
    text = str(composition.describe())
    assert "ceil(log2 n)" in text and "causal" in text and "constant" in text

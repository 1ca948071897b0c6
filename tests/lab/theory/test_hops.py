"""p-hop in floor(log2 p) + 2 loops for every p: exhaustive, random, ordinals by hand, precision, damage."""

from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from damage import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.theory import hops as theory
from looplm.lab.theory.hops import (
    build,
    inputs_of,
    loops_needed,
    next_positions,
    random_sequences,
    score_bits,
    size,
    solve,
    worst_case,
    wrong,
)


def find(v: list[int], i: int) -> int:
    """The paper's find_1 for 1-based v and i."""
    return max([0, *(j for j in range(2, i + 1) if v[j - 2] == v[i - 1])]) if i else 0


def hop(v: list[int], p: int, bottom: int) -> int:
    at = len(v)
    for _ in range(p):
        at = find(v, at)
    return v[at - 1] if at else bottom


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 9))
def test_the_reference_is_the_papers_definition(v, p):
    assert next_positions(np.array([v]))[0].tolist() == [find(v, i) for i in range(len(v) + 1)]
    assert solve(np.array([v]), p, 3)[0] == hop(v, p, 3)


def test_hops_by_hand():
    """0 1 2 0 1: the last 1 was followed by 2 (position 3), which never occurred before; 1 1 stays where it is."""
    assert next_positions(np.array([[0, 1, 2, 0, 1]]))[0].tolist() == [0, 0, 0, 0, 2, 3]
    assert [solve(np.array([[0, 1, 2, 0, 1]]), p, 3)[0] for p in (1, 2)] == [2, 3]
    assert [solve(np.array([[0, 1, 1]]), p, 2)[0] for p in (1, 5)] == [1, 1]


@pytest.mark.parametrize(
    ("hops", "loops"), [(1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (15, 5), (16, 6), (31, 6), (32, 7)]
)
def test_loops_by_hand(hops, loops):
    """Floor(log2 p) + 2: 3, 7, 15 and 31 hops in one loop fewer than doubling pointers alone would take."""
    assert loops_needed(hops) == loops == int(np.floor(np.log2(hops))) + 2


@given(st.integers(1, 400))
def test_ordinals_are_told_apart(c):
    """The score b_k - (1 - a - b) a_k of a pointer with ordinal c peaks at c - 1, by the gaps the module states."""

    def point(ordinal):
        return Fraction(1, ordinal + 1), Fraction(1, ordinal + 2)

    a, b = point(c)
    score = [y - (1 - a - b) * x for x, y in map(point, range(c + 5))]
    assert sorted(score)[-1] == score[c - 1]
    assert score[c - 1] - score[c] == Fraction(1, c * (c + 1) ** 2 * (c + 2))
    gaps = [score[c - 1] - value for ordinal, value in enumerate(score) if ordinal != c - 1]
    if c > 1:
        assert score[c - 1] - score[c - 2] == Fraction(1, (c - 1) * c * (c + 1) * (c + 2))
    assert min(gaps) == score[c - 1] - score[c] > Fraction(1, (c + 2) ** 4)


@pytest.mark.parametrize("length", [1, 14, 30, 31, 510])
def test_recency_stays_below_half_of_every_gap(length):
    step = Fraction(1, 2 ** (score_bits(length) - 3))
    assert 2 * step * (length + 1) < Fraction(1, (length + 2) ** 4)
    assert score_bits(length) <= 49


def test_verified_exhaustively_and_at_random():
    report = theory.verify(600)
    assert report.holds and report.instances > 5500 and report.loops == 7


@pytest.mark.slow
def test_verified_on_many_and_at_the_papers_size():
    assert theory.verify(10_000, seed=1).holds
    generator = np.random.default_rng(0)
    for hops in (15, 16, 31, 32, 63):
        for length in (256, 510):
            sequences = random_sequences(generator, 40, length, repeats=False)
            assert theory.check(sequences, hops, 4).holds
            assert (solve(sequences, hops, 4) < 4).all()


@pytest.mark.parametrize("hops", [1, 2, 3, 5, 7, 8, 12, 31, 40])
def test_one_loop_fewer_leaves_out_the_top_bit(hops):
    """On 0 1 2 0 1 2 ... every hop goes back two places; without the last loop 2^floor(log2 p) hops are missing."""
    word, missing = worst_case(hops), 2 ** (loops_needed(hops) - 2)
    model, inputs = build(3, len(word), hops), inputs_of(word[None], 3)
    assert solve(word[None], hops, 3)[0] == word[2] == 2
    assert model.run(inputs, loops_needed(hops))[0, -1].argmax() == 2
    assert model.run(inputs, loops_needed(hops) - 1)[0, -1].argmax() == word[2 + 2 * missing] != 2


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 30), st.booleans())
def test_pointers_after_every_loop(seed, length, repeats):
    """`jump` names next^(2^(l-1) - 1) of every position by token and ordinal: the induction of the docstring."""
    v = random_sequences(np.random.default_rng(seed), 1, length, repeats)
    model, wires = build(4, length, 31), theory._registers(4)
    jumps, at = next_positions(v)[0], np.arange(length + 1)
    ordinals = [0, *((v[0, : i + 1] == v[0, i]).sum() for i in range(length))]
    tokens = [np.zeros(4), *np.eye(4)[v[0]]]
    done = 0
    for loop, state in enumerate(model.states(inputs_of(v, 4), 6)):
        if loop:
            while done < 2 ** (loop - 1) - 1:
                at, done = jumps[at], done + 1
            expected = [[*tokens[j], 1 / (ordinals[j] + 1), 1 / (ordinals[j] + 2)] for j in at]
            np.testing.assert_allclose(state[0, 1:, wires.registers["jump"]], expected, rtol=0, atol=1e-15)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_more_loops_change_nothing(seed, hops):
    v = random_sequences(np.random.default_rng(seed), 5, 20, repeats=True)
    assert wrong(build(4, 20, hops), v, hops, 4, loops_needed(hops) + 3) == 0


def test_long_runs_and_large_ordinals():
    index = np.arange(510)
    v = np.stack([0 * index, index % 2, index // 2 % 2, (index > 507) * 1, (index % 255 == 0) * 1])
    for hops in (1, 100):
        assert wrong(build(2, 510, hops), v, hops, 2, loops_needed(hops)) == 0


def single(part: Any) -> Any:
    """The weights in fp32, 24 bits."""
    if isinstance(part, np.ndarray):
        return part.astype(np.float32)
    if isinstance(part, tuple):
        return tuple(map(single, part))
    return (
        replace(part, **{f.name: single(getattr(part, f.name)) for f in fields(part)}) if is_dataclass(part) else part
    )


def test_the_stated_bits_are_enough():
    """At n = 14 a score needs 24 bits, and fp32 has 24."""
    assert score_bits(14) == 24
    generator = np.random.default_rng(0)
    for hops in (3, 6, 7):
        model, v = single(build(3, 14, hops)), random_sequences(generator, 400, 14, repeats=True) % 3
        answers = model.run(inputs_of(v, 3).astype(np.float32), loops_needed(hops))
        assert answers.dtype == np.float32
        assert (answers[:, -1].argmax(-1) == solve(v, hops, 3)).all()


def test_every_flipped_weight_of_the_block_is_noticed():
    """But for two neurons that tidy up start mark 1, and one that keeps `take` at 1, where 7 would do as well."""
    generator, registers = np.random.default_rng(0), theory._registers(3).registers
    steps = generator.integers(1, 3, size=(30, 22)).cumsum(1) % 3
    mixed = np.concatenate([steps, generator.integers(3, size=(10, 22))])
    to_bottom = np.array(
        [[0, 1, 1, 0]]
    )  # one hop to the first 1, which leads to bottom; the second would lead to itself
    noticed: dict[tuple, bool] = {}
    for hops in (10, 13):
        for path, model in flips(build(3, 22, hops)):
            if path[0] == "block" and not noticed.get(path):
                noticed[path] = any(wrong(model, v, hops, 3, 5) for v in (to_bottom, mixed))
    tally, take = registers["tally"].start, registers["take"].start
    harmless = {("inner", (tally, 18)), ("inner", (tally + 1, 19)), ("outer", (51, take))}
    assert len(noticed) > 200
    assert {path[2:] for path, seen in noticed.items() if not seen} == harmless


@pytest.mark.parametrize("alphabet", [2, 3, 5])
@pytest.mark.parametrize(("length", "hops"), [(3, 1), (60, 9)])
def test_size_grows_with_neither_length_nor_hops(alphabet, length, hops):
    assert build(alphabet, length, hops).size == size(alphabet)
    assert size(alphabet).heads == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, 1), "alphabet is 1"),
        ((3, 5, 0), "hops 0"),
        ((3, 0, 1), "length is 0; it must lie in 1..510"),
        ((3, 511, 1), "length is 511"),
    ],
)
def test_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_it_says_what_it_does():
    text = str(theory.describe())
    assert "floor(log2 p) + 2, for every p" in text and "three heads" in text

"""The machine under the constructions: hard attention by hand, a naive reference, wiring, and bad input."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from looplm.lab.theory.transformer import Head, Layer, LoopedTransformer, Report, Size, attend, one_hot
from looplm.lab.theory.wiring import Wiring, combine

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
NO_NEURONS = (np.zeros((2, 0)), np.zeros(0), np.zeros((0, 2)))


def naive(model: LoopedTransformer, tokens: list[int], loops: int) -> list[list[Fraction]]:
    """One sequence in exact rational arithmetic, number by number, straight from the definition."""

    def times(vector, matrix):
        return [sum(x * int(w) for x, w in zip(vector, column, strict=True)) for column in matrix.T]

    def add(left, right):
        total = [a + b for a, b in zip(left, right, strict=True)]
        return [int(x > 0) for x in total] if model.threshold_norm else total

    def attended(rows, s, head):
        seen = rows[: s + 1] if model.causal else rows
        query = times(rows[s], head.query)
        scores = [sum(q * k for q, k in zip(query, times(x, head.key), strict=True)) for x in seen]
        best = [x for x, score in zip(seen, scores, strict=True) if score == max(scores)]
        assume(len(best) != 3)  # fp64 has halves and quarters exactly, thirds not
        return times(
            times([Fraction(sum(column)) / len(best) for column in zip(*best, strict=True)], head.value), head.output
        )

    rows = [[int(x) for x in model.embedding[token] + model.positions[s]] for s, token in enumerate(tokens)]
    for _ in range(loops):
        for layer in model.block:
            fetched = [[attended(rows, s, head) for head in layer.heads] for s in range(len(rows))]
            rows = [
                add(row, [sum(column) for column in zip(*heads, strict=True)])
                for row, heads in zip(rows, fetched, strict=True)
            ]
            inner = [
                [max(a + int(b), 0) for a, b in zip(times(row, layer.inner), layer.bias, strict=True)] for row in rows
            ]
            rows = [add(row, times(neurons, layer.outer)) for row, neurons in zip(rows, inner, strict=True)]
    return [times(row, model.readout) for row in rows]


@QUICK
@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.integers(1, 2), st.integers(1, 4))
def test_equals_the_definition(seed, causal, threshold_norm, loops, length):
    """Integer weights from -1 to 1, so that ties are common, and everything is exact: no tolerance."""
    generator = np.random.default_rng(seed)

    def weights(*shape):
        return generator.integers(-1, 2, size=shape).astype(float)

    def layer():
        heads = tuple(Head(weights(3, 2), weights(3, 2), weights(3, 2), weights(2, 3)) for _ in range(2))
        return Layer(heads, weights(3, 4), weights(4), weights(4, 3))

    block = tuple(layer() for _ in range(3 - loops))
    model = LoopedTransformer(weights(3, 3), weights(length, 3), block, weights(3, 2), causal, threshold_norm)
    tokens = generator.integers(3, size=length)
    exact = [[float(x) for x in row] for row in naive(model, tokens.tolist(), loops)]
    assert model.run(one_hot(tokens[None], 3), loops)[0].tolist() == exact


def test_ties_are_averaged_by_hand():
    """Keys 1, 3, 3 and query 1: the two 3s share the weight; causally, the second position sees its own 3 alone."""
    head = Head(np.array([[0.0], [1]]), np.array([[1.0], [0]]), np.array([[1.0], [0]]), np.array([[0.0, 1]]))
    state = np.array([[[1.0, 1], [3, 1], [3, 1], [2, 1], [0, -1]]])
    assert attend(head, state, causal=False)[0, :, 1].tolist() == [3, 3, 3, 3, 0]
    values = replace(head, value=np.array([[0.0], [1]]))
    uneven = np.array([[[1.0, 1], [3, 1], [3, 5], [2, 1]]])
    assert attend(values, uneven, causal=False)[0, :, 1].tolist() == [3, 3, 3, 3]  # (1 + 5) / 2
    assert attend(values, uneven, causal=True)[0, :, 1].tolist() == [1, 1, 3, 3]


def test_a_negative_query_prefers_small_keys():
    head = Head(np.array([[0.0], [1]]), np.array([[1.0], [0]]), np.array([[1.0], [0]]), np.array([[0.0, 1]]))
    state = np.array([[[1.0, 1], [3, -1], [2, -1]]])
    assert attend(head, state, causal=True)[0, :, 1].tolist() == [1, 1, 1]


def test_threshold_norm_by_hand():
    model = LoopedTransformer(
        np.array([[0.5, -2.0]]), np.zeros((1, 2)), (Layer((), *NO_NEURONS),), np.eye(2), threshold_norm=True
    )
    assert model.run(np.ones((1, 1, 1)), 0).tolist() == [[[0.5, -2.0]]]
    assert model.run(np.ones((1, 1, 1)), 1).tolist() == [[[1.0, 0.0]]]


def test_parts_of_a_batch_do_not_matter(monkeypatch):
    generator = np.random.default_rng(0)
    head = Head(*(generator.integers(-2, 3, size=shape).astype(float) for shape in ((3, 2), (3, 2), (3, 2), (2, 3))))
    layer = Layer((head,), np.ones((3, 5)), np.zeros(5), np.ones((5, 3)))
    model = LoopedTransformer(np.eye(3), np.zeros((4, 3)), (layer,), np.eye(3))
    inputs = one_hot(generator.integers(3, size=(7, 4)), 3)
    whole = model.run(inputs, 2)
    monkeypatch.setattr("looplm.lab.theory.transformer.CHUNK", 41)
    np.testing.assert_array_equal(model.run(inputs, 2), whole)
    assert model.run(inputs[:0], 2).shape == (0, 4, 3)


def test_size_is_read_off_the_weights():
    head = Head(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 1)), np.zeros((1, 2)))
    block = (Layer((head, head), *NO_NEURONS), Layer((), np.zeros((2, 7)), np.zeros(7), np.zeros((7, 2))))
    assert LoopedTransformer(np.zeros((5, 2)), np.zeros((4, 2)), block, np.eye(2)).size == Size(2, 2, 2, 3, 7, 5)


def test_wiring_by_hand():
    wires = Wiring(left=2, right=2, flag=1)
    layer = combine(wires.neurons(2, {"left": 1.0, "flag": -3.0}, bias=0.5, writes={"right": 2.0}), wires.clear("flag"))
    assert layer.inner.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [-3, -3, 1]]
    assert layer.bias.tolist() == [0.5, 0.5, 0]
    assert layer.outer.tolist() == [[0, 0, 2, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, -1]]
    head = wires.head([("flag", "left", 1.0), ("left", "right", 5.0)], [("right", "left", -1.0)]).heads[0]
    score = head.query @ head.key.T
    assert score[4].tolist() == [1, 1, 0, 0, 0] and score[0].tolist() == [0, 0, 5, 0, 0]
    assert (head.value @ head.output)[2].tolist() == [-1, 0, 0, 0, 0]
    assert wires.rows(2, left=np.eye(2), flag=7.0).tolist() == [[1, 0, 0, 0, 7], [0, 1, 0, 0, 7]]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=2))
@QUICK
def test_signed_registers_are_copied_and_cleared(values):
    wires = Wiring(here=2, there=2)
    block = (combine(wires.clear_signed("here"), wires.copy_signed("here", {"there": 1.0})),)
    model = LoopedTransformer(wires.rows(1, here=np.array([values])), wires.rows(1), block, np.eye(4))
    assert model.run(np.ones((1, 1, 1)), 1)[0, 0].tolist() == [0.0, 0.0, *values]


def test_wiring_refuses_what_does_not_fit():
    wires = Wiring(two=2, three=3)
    with pytest.raises(ValueError, match="size 2 and 3; give a matrix"):
        wires.head([("two", "three", 1.0)], [])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) stands between registers of size 2 and 3"):
        wires.neurons(3, {"two": np.zeros((3, 2))})


def test_bad_inputs_are_named():
    model = LoopedTransformer(np.eye(2), np.zeros((3, 2)), (), np.eye(2))
    with pytest.raises(ValueError, match=r"shape \(1, 4, 2\); this model takes \(batch, up to 3 positions, 2\)"):
        model.run(np.zeros((1, 4, 2)), 1)
    with pytest.raises(ValueError, match=r"integers in 0..1; got int64 in 0..2"):
        one_hot(np.array([0, 2]), 2)
    with pytest.raises(ValueError, match="float64"):
        one_hot(np.array([0.5]), 2)


def test_reports_add_up():
    total = Report("x", 3, 0, 2, True) + Report("x", 4, 1, 5, False)
    assert total == Report("x", 7, 1, 5, False)
    assert not total.holds and not Report("x", 0, 0, 0, True).holds and Report("x", 1, 0, 0, True).holds

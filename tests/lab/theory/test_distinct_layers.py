"""L layers as L loops of one: exhaustive and random originals, the gates, damage."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from damage import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.theory import composition, distinct_layers, hops
from looplm.lab.theory.distinct_layers import (
    build,
    check,
    gate_size,
    inputs_of,
    random_transformer,
    size,
    solve,
    worst_case,
    wrong,
)
from looplm.lab.theory.transformer import one_hot


def test_the_reference_by_hand():
    """Layers that add 1 and 2, in the order 0 1 1 0 1: 8."""
    adder, _, word = worst_case(5)
    assert solve(adder, [0, 1, 1, 0, 1], word).tolist() == [[[8.0]]]
    assert solve(adder, [0], word).tolist() == [[[1.0]]]


def test_verified_exhaustively_and_at_random():
    report = distinct_layers.verify()
    assert report.holds and report.instances == 8 * (3 + 9 + 27 + 81) + 2000 and report.loops == 6


@pytest.mark.slow
def test_verified_on_many():
    assert all(distinct_layers.verify(20_000, seed).holds for seed in range(1, 6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_every_loop_is_one_layer_and_the_counter_counts(seed, schedule):
    """After loop l the content is the original after l layers, # is still empty, `active` names the next layer."""
    generator = np.random.default_rng(seed)
    original = random_transformer(generator, layers=3, length=5)
    words = generator.integers(3, size=(4, 5))
    states = list(build(original, schedule).states(inputs_of(words, 3), len(schedule)))
    for loop, state in enumerate(states):
        deep = replace(original, block=tuple(original.block[turn] for turn in schedule[:loop]), readout=np.eye(4))
        np.testing.assert_allclose(state[:, 1:, :4], deep.run(one_hot(words, 3), 1), rtol=1e-12, atol=1e-12)
        assert (state[:, 0, :4] == 0).all() and (state[..., 7] == loop).all()
        assert (state[..., 4:7] == np.eye(3)[schedule[min(loop, len(schedule) - 1)]]).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_one_loop_fewer_leaves_out_the_last_layer(steps):
    adder, schedule, word = worst_case(steps)
    model, total = build(adder, schedule), sum(turn + 1 for turn in schedule)
    assert model.run(inputs_of(word, 1), steps)[0, 1, 0] == total
    assert model.run(inputs_of(word, 1), steps - 1)[0, 1, 0] == total - schedule[-1] - 1


def test_two_constructions_in_one():
    """A block of two layers from another module: composition's layer, twice, is two loops of it."""
    table = composition.symmetric(3)
    original = composition.build(table, 4)
    words = np.array(list(product(range(6), repeat=4)))[::7]
    tokens = np.pad(words, ((0, 0), (1, 0)), constant_values=6)
    readouts = build(original, [0, 0]).run(inputs_of(tokens, 7), 2)[:, -1]
    assert (readouts.argmax(-1) == composition.solve(table, words)).all()


def test_a_looped_p_hop_is_its_own_schedule():
    original = hops.build(3, 12, 5)
    words = hops.random_sequences(np.random.default_rng(0), 50, 12, repeats=True) % 3
    assert check(original, [0] * 4, np.argmax(hops.inputs_of(words, 3), -1)).holds


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_the_gate_exceeds_all_it_must(seed):
    """M against the scores and pre-activations that do occur, in every layer and on every state of the run."""
    generator = np.random.default_rng(seed)
    original = random_transformer(generator, layers=2, length=5)
    schedule = generator.integers(2, size=4).tolist()
    gate = gate_size(original, schedule)
    words = generator.integers(3, size=(10, 5))
    for state in build(original, schedule).states(inputs_of(words, 3), 4):
        content = state[..., :4]
        for layer in original.block:
            assert np.abs(content @ layer.inner + layer.bias).max() < gate
            for head in layer.heads:
                assert np.abs((content @ head.query) @ (content @ head.key).swapaxes(1, 2)).max() < gate
    assert gate == 2.0 ** np.round(np.log2(gate))


def test_every_flipped_weight_is_noticed():
    """Run two loops past the schedule too, where the last layer stays on and even the clock's last kinks matter.

    One flip does no harm: it turns the last layer's `active` from 1 to 7, and only the others' must be 0.
    """
    original = random_transformer(np.random.default_rng(0), 2, 4)
    words = np.array(list(product(range(3), repeat=4)))[::2]
    schedule, longer = (0, 1, 0, 1), (0, 1, 0, 1, 1, 1)
    assert wrong(build(original, schedule), original, longer, words, 6) == 0
    unnoticed = [
        path
        for path, model in flips(build(original, schedule))
        if not wrong(model, original, schedule, words, 4) and not wrong(model, original, longer, words, 6)
    ]
    assert unnoticed == [("block", 0, "outer", (15, 5))]


@pytest.mark.parametrize(("layers", "schedule"), [(1, [0]), (3, [0, 2, 1, 1]), (2, [1] * 7)])
def test_size_is_the_theorems(layers, schedule):
    """Width d + R + 2, R H heads, R F + O(L) neurons, one word more."""
    original = random_transformer(np.random.default_rng(0), layers, 5)
    built = build(original, schedule).size
    assert built == size(original, schedule)
    assert (built.width, built.heads, built.vocabulary) == (4 + layers + 2, 2 * layers, 4)
    assert built.hidden == 6 * layers + len(schedule) + 1
    adder, turns, _ = worst_case(4)
    assert build(adder, turns).size == size(adder, turns)


@pytest.mark.parametrize("schedule", [[], [0, 2], [-1]])
def test_schedules_are_refused(schedule):
    original = random_transformer(np.random.default_rng(0), 2, 4)
    with pytest.raises(ValueError, match=r"schedule is .*; it must name at least one layer, each in 0..1"):
        build(original, schedule)


@pytest.mark.parametrize("change", [{"causal": False}, {"threshold_norm": True}])
def test_other_originals_are_refused(change):
    original = replace(random_transformer(np.random.default_rng(0), 2, 4), **change)
    with pytest.raises(ValueError, match="causal and without norm"):
        build(original, [0])


def test_it_says_what_it_does():
    assert "R H heads" in str(distinct_layers.describe())

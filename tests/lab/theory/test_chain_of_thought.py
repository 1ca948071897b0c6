"""m steps of chain of thought in m loops: exhaustive and random originals, draws, freezing, damage."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from damage import flips
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.lab.theory import chain_of_thought
from looplm.lab.theory.chain_of_thought import build, inputs_of, margin_of, size, solve, worst_case, wrong
from looplm.lab.theory.distinct_layers import random_transformer
from looplm.lab.theory.transformer import Head, Layer, LoopedTransformer, one_hot


def copier(vocabulary: int, length: int) -> LoopedTransformer:
    """Attends to the first position and says its token, worth 2, against its own, worth 1."""
    width = 2 * vocabulary + 2
    query, key, value, output = (
        np.zeros((width, 1)),
        np.zeros((width, 1)),
        np.eye(width, vocabulary),
        np.zeros((vocabulary, width)),
    )
    query[-2] = 1
    key[-1] = 1
    output[:, vocabulary:-2] = 2 * np.eye(vocabulary)
    positions = np.zeros((length, width))
    positions[:, -2], positions[0, -1] = 1, 1
    layer = Layer((Head(query, key, value, output),), np.zeros((width, 0)), np.zeros(0), np.zeros((0, width)))
    readout = np.concatenate([np.eye(vocabulary), np.eye(vocabulary), np.zeros((2, vocabulary))])
    return LoopedTransformer(np.eye(vocabulary, width), positions, (layer,), readout)


def test_the_reference_by_hand():
    counter, _, _ = worst_case(4, 6)
    assert solve(counter, np.array([[1], [3]]), 5).tolist() == [[2, 3, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert solve(copier(3, 6), np.array([[2, 0, 1]]), 2).tolist() == [[2, 2]]


def test_a_copier_by_hand():
    assert wrong(build(copier(3, 6), 1.0), copier(3, 6), np.array(list(product(range(3), repeat=3))), 3, 3) == 0


def test_verified_exhaustively_and_at_random():
    report = chain_of_thought.verify()
    assert report.holds and report.instances == 4 * (3 + 9 + 27 + 81) + 2000 and report.loops >= 10


@pytest.mark.slow
def test_verified_on_many():
    assert all(chain_of_thought.verify(20_000, seed).holds for seed in range(1, 6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6))
def test_dummy_t_is_right_after_t_loops_and_stays(seed, length, steps):
    """The induction; and the prompt keeps its tokens, which are one-hot to the last bit."""
    generator = np.random.default_rng(seed)
    original = random_transformer(generator, layers=2, length=length + steps)
    prompts = generator.integers(3, size=(5, length))
    model, text = build(original, margin_of(original)), np.concatenate([prompts, solve(original, prompts, steps)], 1)
    for loop, state in enumerate(model.states(inputs_of(prompts, steps, 3), steps + 2)):
        right = min(length + loop, length + steps)
        np.testing.assert_array_equal((state @ model.readout)[:, :right], one_hot(text[:, :right], 3))


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_one_loop_fewer_leaves_the_last_token_wrong(steps):
    counter, margin, prompt = worst_case(steps + 2, steps + 1)
    model, inputs = build(counter, margin), inputs_of(prompt, steps, steps + 2)
    assert model.run(inputs, steps)[0, 1:].argmax(-1).tolist() == list(range(1, steps + 1))
    assert model.run(inputs, steps - 1)[0, 1:].argmax(-1).tolist()[:-1] == list(range(1, steps))
    assert model.run(inputs, steps - 1)[0, -1].argmax() != steps


def test_draws_go_to_the_lowest_id():
    """Two equal columns of the readout: always a draw; both argmax of the reference and the charges pick the first."""
    original = random_transformer(np.random.default_rng(3), 1, 8, vocabulary=4)
    readout = original.readout.copy()
    readout[:, 3] = readout[:, 1]
    drawn = replace(original, readout=readout)
    prompts = np.array(list(product(range(4), repeat=3)))
    said = solve(drawn, prompts, 5)
    assert 3 not in said and (said == 1).mean() > 0.1
    assert wrong(build(drawn, margin_of(drawn)), drawn, prompts, 5, 5) == 0
    model = build(drawn, margin_of(drawn))
    unbiased = replace(model.block[-2], bias=0 * model.block[-2].bias)
    assert wrong(replace(model, block=(*model.block[:-2], unbiased, model.block[-1])), drawn, prompts, 5, 5) > 0


def test_a_margin_that_is_too_wide_fails():
    """Logits 1 apart with margin 4: no token is charged nothing, so no dummy becomes one."""
    counter, _, prompt = worst_case(4, 4)
    assert wrong(build(counter, 1.0), counter, prompt, 3, 3) == 0
    assert wrong(build(counter, 4.0), counter, prompt, 3, 3) == 1


def test_flipped_weights_are_noticed():
    """In the two layers that are ours. What passes unnoticed are losing margins, draws, and signs that do not occur."""
    generator, seen, total = np.random.default_rng(0), 0, 0
    prompts = np.array(list(product(range(3), repeat=3)))
    for _ in range(3):
        original = random_transformer(generator, 1, 8)
        model = build(original, margin_of(original))
        for path, damaged in flips(model):
            if path[0] == "block" and path[1] >= 1:
                seen, total = seen + (wrong(damaged, original, prompts, 5, 5) > 0), total + 1
    assert total > 300 and seen > 0.85 * total


@pytest.mark.parametrize("register", ["previous", "dummy", "token", "place"])
def test_every_register_is_needed(register):
    original = random_transformer(np.random.default_rng(1), 1, 8)
    prompts = np.array(list(product(range(3), repeat=3)))
    model = build(original, margin_of(original))
    start = {"previous": -1, "dummy": -5, "token": 8, "place": 4}[register]
    stop = {"previous": None, "dummy": -4, "token": 11, "place": 8}[register]
    embedding, positions = model.embedding.copy(), model.positions.copy()
    embedding[:, start:stop] = positions[:, start:stop] = 0
    assert wrong(model, original, prompts, 5, 5) == 0
    assert wrong(replace(model, embedding=embedding, positions=positions), original, prompts, 5, 5) > 0


@pytest.mark.parametrize(("layers", "vocabulary"), [(1, 2), (2, 3), (3, 5)])
def test_size(layers, vocabulary):
    """L + 2 layers, one word more; nothing grows with n or m."""
    original = random_transformer(np.random.default_rng(0), layers, 7, vocabulary)
    built = build(original, 1.0).size
    assert built == size(original)
    assert (built.width, built.layers) == (2 * 4 + 3 * vocabulary + 5, layers + 2)
    counter, _, _ = worst_case(4, 3)
    assert build(counter, 1.0).size == size(counter)


def test_bad_settings_are_refused():
    original = random_transformer(np.random.default_rng(0), 1, 4)
    with pytest.raises(ValueError, match=r"margin is 0\.0; it must be positive and finite"):
        build(original, 0.0)
    with pytest.raises(ValueError, match="causal, without norm, and read out one logit a token"):
        build(replace(original, readout=original.readout[:, :2]), 1.0)
    with pytest.raises(ValueError, match="up to 4 positions"):
        build(original, 1.0).run(inputs_of(np.zeros((1, 3), int), 2, 3), 2)


def test_it_says_what_it_does():
    assert "m dummy tokens" in str(chain_of_thought.describe())

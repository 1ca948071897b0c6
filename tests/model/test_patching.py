"""Interchange interventions: identity, whole replacement, causality, and a run by hand that they must equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens

from looplm.model import patch, readout
from looplm.model.context import PassContext

MODELS = {name: tiny_model(**fields) for name, fields in VARIANTS.items()}
LENGTH = 6
NAMES, SEEDS, LOOPS = st.sampled_from(sorted(MODELS)), st.integers(0, 999), st.integers(1, 3)
PLACES = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=LENGTH, unique=True)


def by_hand(model, source, target, loop, taken, put):
    """The logits after every loop of the patched run, without hooks."""
    core, states = model.model, []
    for ids in (source, target):
        context = PassContext.build(core, core.embed(ids, None), None, None, None, False, 3)
        state, kept = core.begin(context, core.embed(ids, None)), []
        for now in (1, 2, 3):
            state, _ = core.loop(state, context, now)
            if ids is target and now == loop:
                for a, b in zip(taken, put, strict=True):
                    state[:, b] = states[loop - 1][:, a]
            kept.append(state.clone())
        states = kept
    return [model.lm_head(core.finish(state, context)) for state in states]


@given(NAMES, SEEDS, LOOPS, PLACES)
@settings(deadline=None, max_examples=30)
def test_a_patched_run_is_the_one_run_by_hand(name, seed, loop, positions):
    model, source, target = MODELS[name], tokens(2, LENGTH, seed=seed), tokens(2, LENGTH, seed=seed + 1)
    found = patch(model, source, target, loop=loop, positions=positions)
    with torch.no_grad():
        expected = by_hand(model, source, target, loop, positions, positions)
        unpatched = [model(ids).logits for ids in (source, target)]
    log_p = [x.log_softmax(-1) for x in (found.target.logits(now) for now in (1, 2, 3))]
    for now in (1, 2, 3):
        assert torch.equal(found.patched.logits(now), expected[now - 1])
        log_q = expected[now - 1].log_softmax(-1)
        kl = (log_p[now - 1].exp() * (log_p[now - 1] - log_q)).sum(-1)
        torch.testing.assert_close(found.kl[..., now - 1], kl.float(), rtol=1e-5, atol=1e-6)
        effect = expected[now - 1][..., 7] - expected[now - 1][..., 9]
        effect = effect - found.target.logits(now)[..., 7] + found.target.logits(now)[..., 9]
        torch.testing.assert_close(found.logit_effect(7, 9)[..., now - 1], effect, rtol=0, atol=1e-10)
    assert not found.kl[..., : loop - 1].any()
    assert torch.equal(found.source.logits(), unpatched[0]) and torch.equal(found.target.logits(), unpatched[1])


@given(NAMES, SEEDS, LOOPS, PLACES)
@settings(deadline=None, max_examples=20)
def test_patching_an_input_with_itself_changes_nothing(name, seed, loop, positions):
    ids = tokens(2, LENGTH, seed=seed)
    found = patch(MODELS[name], ids, ids, loop=loop, positions=positions)
    assert torch.equal(found.patched.logits(), found.target.logits())
    assert torch.equal(found.patched.gate_logits, found.target.gate_logits) and not found.kl.any()


@given(st.sampled_from(sorted(set(MODELS) - {"injection", "all"})), SEEDS, LOOPS)
@settings(deadline=None, max_examples=20)
def test_with_every_position_patched_the_run_is_the_sources(name, seed, loop):
    source, target = tokens(2, LENGTH, seed=seed), tokens(2, LENGTH, seed=seed + 1)
    found = patch(MODELS[name], source, target, loop=loop, positions=range(LENGTH))
    for now in range(1, 4):
        whose = found.source if now >= loop else found.target
        assert torch.equal(found.patched.logits(now), whose.logits(now))
        assert torch.equal(found.patched.gate_logits[..., now - 1], whose.gate_logits[..., now - 1])


@pytest.mark.parametrize("name", ["injection", "all"])
def test_injection_brings_the_targets_own_input_back(name):
    source, target = tokens(1, LENGTH, seed=1), tokens(1, LENGTH, seed=2)
    found = patch(MODELS[name], source, target, loop=1, positions=range(LENGTH))
    assert torch.equal(found.patched.logits(1), found.source.logits(1))
    assert (found.patched.logits(2) - found.source.logits(2)).abs().max() > 0.1


@given(NAMES, SEEDS, LOOPS, st.integers(1, LENGTH - 1))
@settings(deadline=None, max_examples=20)
def test_earlier_positions_do_not_see_a_patch(name, seed, loop, position):
    found = patch(
        MODELS[name], tokens(1, LENGTH, seed=seed), tokens(1, LENGTH, seed=seed + 1), loop=loop, positions=[position]
    )
    for now in (1, 2, 3):
        assert torch.equal(found.patched.logits(now)[:, :position], found.target.logits(now)[:, :position])
    assert not found.kl[:, :position].any()
    assert found.kl[:, position, loop - 1 :].any()


def test_inputs_of_two_lengths_are_patched_from_their_ends():
    model, source, target = MODELS["plain"], tokens(1, 4, seed=1), tokens(1, LENGTH, seed=2)
    found = patch(model, source, target, loop=2, positions=torch.tensor([-1, 0]))
    with torch.no_grad():
        expected = by_hand(model, source, target, 2, [3, 0], [5, 0])
    assert torch.equal(found.patched.logits(), expected[-1])


def test_more_loops_than_trained():
    with pytest.warns(UserWarning, match="running 5 loops"):
        found = patch(MODELS["plain"], tokens(1, 3, seed=1), tokens(1, 3), loop=4, positions=[2], loops=5)
    assert found.kl.shape == (1, 3, 5)
    assert torch.equal(found.kl[0] > 0, torch.tensor([[False] * 5, [False] * 5, [False, False, False, True, True]]))


def test_effects_do_not_depend_on_the_chunk(monkeypatch):
    inputs = MODELS["plain"], tokens(2, LENGTH, seed=1), tokens(2, LENGTH, seed=2)
    whole = patch(*inputs, loop=1, positions=[1]).kl
    monkeypatch.setattr(readout, "READ_BYTES", 64 * 4 * 5)
    torch.testing.assert_close(patch(*inputs, loop=1, positions=[1]).kl, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": 0}, r"loop is 0; it must lie in 1\.\.3, the loops that are run"),
        ({"loop": 4}, r"loop is 4; it must lie in 1\.\.3"),
        ({"loop": 3, "loops": 2}, r"loop is 3; it must lie in 1\.\.2"),
        ({"positions": []}, "positions is empty"),
        ({"positions": [4]}, r"positions holds 4, but source has 4 tokens; positions must lie in -4\.\.3"),
        ({"positions": [-5]}, "positions holds -5, but source has 4 tokens"),
        ({"positions": [0, -4]}, r"positions is \[0, -4\], which names a position of source twice"),
        ({"source": tokens(2, 4)}, "source has 2 rows and target 1"),
        ({"source": tokens(4)}, r"source is \(4,\) torch.int64"),
        ({"target": tokens(1, 4) + 64}, "target spans token ids"),
        ({"target": tokens(1, 129)}, "target has 129 tokens, but the context holds 128"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_hook(changes, message):
    values = {"source": tokens(1, 4), "target": tokens(1, LENGTH), "loop": 1, "positions": [0], **changes}
    with pytest.raises(ValueError, match=message):
        patch(MODELS["plain"], **values)
    assert MODELS["plain"].model.loop_hooks == []

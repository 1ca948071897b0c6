"""Loop hooks: they see what a loop left, what they return is what the model goes on with, and they go away."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VARIANTS, tiny_model, tokens

from looplm.exits import QExit
from looplm.model import loop_hook
from looplm.model.context import PassContext

PLAIN = tiny_model()
IDS = tokens(2, 5)


def steered(model, strength=1.0):
    """A hook that adds one vector to every state: it treats every position by itself."""
    step = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(5), dtype=model.dtype)
    return lambda state, loop: state + strength * loop * step


@pytest.mark.parametrize("name", VARIANTS)
def test_a_replaced_state_is_what_gate_head_and_the_next_loop_read(name):
    """Against loops called by hand, without hooks."""
    model, fn = tiny_model(**VARIANTS[name]), steered(tiny_model())
    core = model.model
    with torch.no_grad():
        with loop_hook(model, fn, loop=2):
            out = model(IDS, output_hidden_states=True)
        context = PassContext.build(core, core.embed(IDS, None), None, None, None, False, 3)
        first, gate1 = core.loop(core.begin(context, core.embed(IDS, None)), context, 1)
        second = fn(core.loop(first, context, 2)[0], 2)
        gate2 = core.gate(second, context)
        third, gate3 = core.loop(second, context, 3)
        logits, unhooked = model.lm_head(core.finish(third, context)), model(IDS).logits
    for seen, expected in zip(out.hidden_states[1:], (first, second, third), strict=True):
        assert torch.equal(seen, expected)
    assert torch.equal(out.gate_logits, torch.stack([gate1, gate2, gate3], dim=-1))
    assert torch.equal(out.logits, logits) and not torch.allclose(out.logits, unhooked)


@given(st.sampled_from(sorted(VARIANTS)), st.sampled_from([None, 1, 2, 3]), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_a_hook_that_returns_the_state_changes_nothing(name, loop, returns, seed):
    model, ids = tiny_model(**VARIANTS[name]), tokens(2, 6, seed=seed)
    with torch.no_grad():
        expected = model(ids, labels=ids, skip_logits=False)
        with loop_hook(model, lambda state, _: state if returns else None, loop):
            out = model(ids, labels=ids, skip_logits=False)
    for field in ("logits", "gate_logits", "loss", "loop_losses"):
        assert torch.equal(out[field], expected[field])


def test_hooks_are_called_in_order_with_the_loop_and_the_state_of_the_hook_before():
    calls = []
    with (
        loop_hook(PLAIN, lambda state, loop: calls.append(("a", loop)) or torch.zeros_like(state)),
        loop_hook(PLAIN, lambda state, loop: calls.append(("b", loop, float(state.abs().sum()), state.shape)), loop=2),
    ):
        PLAIN(IDS)
    assert calls == [("a", 1), ("a", 2), ("b", 2, 0.0, (2, 5, 32)), ("a", 3)]
    PLAIN(IDS)
    assert len(calls) == 4


def test_hooks_go_away_one_by_one_and_on_exceptions():
    def fail(state, loop):
        raise RuntimeError("no")

    def passive(state, loop):
        return None

    expected = PLAIN(IDS).logits
    with loop_hook(PLAIN, passive), loop_hook(PLAIN, passive):
        assert len(PLAIN.model.loop_hooks) == 2
        with pytest.raises(RuntimeError, match="no"), loop_hook(PLAIN.model, fail):
            PLAIN(IDS)
        assert len(PLAIN.model.loop_hooks) == 2
    assert PLAIN.model.loop_hooks == [] and torch.equal(PLAIN(IDS).logits, expected)


def test_a_state_is_differentiable_through_a_hook():
    model = tiny_model()
    vector = torch.zeros(32, dtype=torch.float64, requires_grad=True)

    def loss(vector):
        with loop_hook(model, lambda state, _: state + vector, loop=1):
            return model(IDS, labels=IDS).loss

    assert torch.autograd.gradcheck(loss, (vector,), fast_mode=True)


@pytest.mark.parametrize("prefill", ["full", "adaptive"])
@pytest.mark.parametrize("name", ["plain", "injection", "retrofit"])
def test_a_generation_under_a_hook_replays_exactly_under_it(name, prefill):
    model = tiny_model(**VARIANTS[name])
    with torch.no_grad(), loop_hook(model, steered(model, 0.3)):
        text = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            exit_threshold=0.6,
            prefill=prefill,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        replayed = model(text.sequences[:, :-1], exit_depths=text.position_depths)
    logits = torch.stack(text.logits, dim=1)
    assert len(set(text.exit_depths.flatten().tolist())) > 1
    torch.testing.assert_close(replayed.logits[:, 4:].float(), logits, rtol=1e-6, atol=1e-6)
    plain = model(text.sequences[:, :-1], exit_depths=text.position_depths)
    assert (plain.logits[:, 4:] - logits).abs().max() > 0.1


def test_full_depth_generation_under_a_hook_is_that_without_a_cache():
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with loop_hook(PLAIN, steered(PLAIN), loop=2):
        cached = PLAIN.generate(IDS, **options)
        assert torch.equal(cached, PLAIN.generate(IDS, use_cache=False, **options))
    assert not torch.equal(cached, PLAIN.generate(IDS, **options))


def test_in_decoding_a_hook_sees_the_rows_in_flight():
    ids, seen = tokens(4, 3, seed=8), []
    with loop_hook(PLAIN, lambda state, loop: seen.append((loop, *state.shape[:2]))):
        text = PLAIN.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            exit_rule=QExit(0.6),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert seen[:3] == [(1, 4, 3), (2, 4, 3), (3, 4, 3)]  # the prompt, at full depth
    depths = text.exit_depths[:, 1:]
    assert 1 < depths.double().mean() < 3
    expected = [(loop, int((step >= loop).sum()), 1) for step in depths.T for loop in (1, 2, 3) if (step >= loop).any()]
    assert seen[3:] == expected


def test_in_a_freezing_pass_a_hook_sees_frozen_states_and_cannot_change_them():
    depths, seen = torch.tensor([[1, 3, 2, 1, 3], [2, 2, 1, 3, 1]]), []
    with torch.no_grad(), loop_hook(PLAIN, lambda state, loop: seen.append(state.clone())):
        expected = PLAIN(IDS, exit_depths=depths).logits
    for loop in (2, 3):
        frozen = depths < loop
        assert torch.equal(seen[loop - 1][frozen], seen[loop - 2][frozen])
        assert not torch.equal(seen[loop - 1][~frozen], seen[loop - 2][~frozen])

    def spoil(state, loop):
        return torch.where((depths < loop)[..., None], torch.nan, state)

    with torch.no_grad(), loop_hook(PLAIN, spoil):
        assert torch.equal(PLAIN(IDS, exit_depths=depths).logits, expected)


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda state, _: state[:, :2], r"\(2, 2, 32\) torch.float64 on cpu"),
        (lambda state, _: state.float(), r"\(2, 5, 32\) torch.float32 on cpu"),
    ],
)
def test_a_returned_state_of_another_kind_is_refused(fn, got):
    with (
        loop_hook(PLAIN, fn, loop=2),
        pytest.raises(ValueError, match=f"the hook after loop 2 returned a state {got}; it must be .2, 5, 32."),
    ):
        PLAIN(IDS)


def test_a_loop_below_1_is_refused():
    with pytest.raises(ValueError, match="loop is 0; loops are counted from 1"), loop_hook(PLAIN, steered(PLAIN), 0):
        pass
    assert PLAIN.model.loop_hooks == []


def test_gradient_checkpointing_is_refused_in_training_only():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with loop_hook(model, steered(model)):
        model(IDS)
        model.train()
        with pytest.raises(ValueError, match="gradient checkpointing is on"):
            model(IDS, labels=IDS)
        with pytest.raises(ValueError, match="gradient checkpointing is on"):
            model(IDS, labels=IDS, exit_depths=torch.ones_like(IDS))

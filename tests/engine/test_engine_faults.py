"""Faults stay with the request that has them: NaN rows, requests too large, failing passes, cancellation."""

import gc
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import blocks_are_free
from tiny import tiny_config, tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.engine.kv_pool import BLOCK
from looplm.exits import Confidence, ExitRule, LoopView, QExit
from looplm.model.hooks import loop_hook
from looplm.model.modeling import OuroForCausalLM

POLICIES = ["per_loop", "last"]
PROMPTS = [tokens(length, seed=seed).tolist() for length, seed in ((6, 11), (19, 12), (3, 13))]
PARAMS = SamplingParams(max_tokens=6, exit_threshold=0.6)
PAGE = 2 * BLOCK * 2 * 32 * 8
MODEL = tiny_model()


def outcome(engine: Engine, prompts: list[list[int]] = PROMPTS, params: Any = PARAMS) -> list[tuple]:
    return [(c.finish_reason, c.token_ids, c.exit_depths) for c in engine.generate(prompts, params)]


# --- NaN ---


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_a_nan_in_a_prompt_ends_that_request_alone(policy: str, prefill: str) -> None:
    model, params = tiny_model(), SamplingParams(max_tokens=6, exit_threshold=0.6, prefill=prefill)
    clean = outcome(Engine(model, kv_policy=policy, kv_bytes=1 << 20), params=params)
    elsewhere = {token for _, new, _ in clean for token in new} | set(PROMPTS[0]) | set(PROMPTS[2])
    bad = next(token for token in PROMPTS[1] if token not in elsewhere)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    for chunk in (256, 4):
        # so few pages that those of the failed request are used again
        engine = Engine(model, kv_policy=policy, kv_bytes=10 * PAGE, chunk_tokens=chunk)
        found = engine.generate([*PROMPTS, PROMPTS[0], PROMPTS[2]], params)
        assert found[1].finish_reason == "error" and found[1].token_ids == []
        assert found[1].error == "the logits are not finite at position 18; check the weights"
        others = [(found[i].finish_reason, found[i].token_ids, found[i].exit_depths) for i in (0, 2, 3, 4)]
        assert others == [clean[0], clean[2], clean[0], clean[2]]
        blocks_are_free(engine)


def test_a_nan_in_decoding_ends_that_request_alone() -> None:
    model = tiny_model()
    clean = outcome(Engine(model, kv_bytes=1 << 20))
    elsewhere = set(clean[0][1]) | set(clean[2][1]) | {t for p in PROMPTS for t in p}
    place = next(i for i, token in enumerate(clean[1][1][:-1]) if token not in elsewhere)
    with torch.no_grad():
        model.model.embed_tokens.weight[clean[1][1][place]] = torch.nan
    engine = Engine(model, kv_bytes=1 << 20)
    found = engine.generate(PROMPTS, PARAMS)
    assert found[1].token_ids == clean[1][1][: place + 1]
    assert found[1].error == f"the exit gate is not finite at position {19 + place}; check the weights"
    assert [(found[i].finish_reason, found[i].token_ids, found[i].exit_depths) for i in (0, 2)] == [clean[0], clean[2]]
    blocks_are_free(engine)


def test_padding_may_be_poisoned() -> None:
    """Token 0 pads the chunks of a group: its embedding must not matter."""
    model = tiny_model(pad_token_id=None)
    clean = outcome(Engine(model, kv_bytes=1 << 20))
    assert all(0 not in new for _, new, _ in clean)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = torch.nan
    for _ in range(2):
        assert outcome(Engine(model, kv_bytes=1 << 20)) == clean


# --- passes that fail ---


class Failing:
    """A rule of a user's own, with a fault."""

    def __call__(self, view: LoopView) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory for that")


def test_a_pass_that_fails_ends_its_requests_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20)
    clean = outcome(engine)
    for prompt in PROMPTS:
        engine.add(prompt, PARAMS)
    for _ in range(4):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", lambda: Failing()(None))
        failed = engine.step()
    assert len(failed) == 3
    assert all(s.finish_reason == "error" and s.error == "OutOfMemoryError: no memory for that" for s in failed)
    blocks_are_free(engine)
    assert outcome(engine) == clean


def test_a_chunk_that_fails_leaves_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20, prefix_cache=False)
    clean = outcome(engine)
    first = engine.prepare(PROMPTS[0], PARAMS)[0]
    engine.submit([first])
    for _ in range(4):
        engine.step()
    assert first.new
    engine.add(PROMPTS[1], PARAMS)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "fill", lambda: Failing()(None))
        failed = engine.step()
    assert [s.finish_reason for s in failed if s is not first] == ["error"]
    while engine.busy:
        engine.step()
    assert (first.finish_reason, first.new, first.exit_depths) == clean[0]
    blocks_are_free(engine)


class Moody(Failing):
    """Fails at its second call of every token."""

    def __call__(self, view: LoopView) -> torch.Tensor:
        return super().__call__(view) if view.loop == 2 else torch.zeros_like(view.rows, dtype=torch.bool)


@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_a_rule_that_fails_is_an_error_of_its_pass(prefill: str) -> None:
    """Wherever in the judging it fails, with tokens in other loops in flight."""
    engine = Engine(MODEL, kv_bytes=1 << 20)
    clean = outcome(engine)
    for prompt in PROMPTS:
        engine.add(prompt, PARAMS)
        engine.step()
    bad = engine.prepare(PROMPTS[0], SamplingParams(max_tokens=4, exit_rule=Moody(), prefill=prefill))
    engine.submit(bad)
    while engine.busy:
        engine.step()
    assert bad[0].finish_reason == "error" and bad[0].error == "OutOfMemoryError: no memory for that"
    blocks_are_free(engine)
    assert outcome(engine) == clean


# --- refused before anything runs ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_policy": "first"}, "kv_policy is 'first'; the engine serves per_loop and last"),
        ({"kv_bytes": 1000}, "kv_bytes is 1000; one block of 16 positions needs at least 81920"),
        ({"max_rows": 0}, "max_rows is 0; it must be at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; it must be at least 1"),
        ({"max_loops": 0}, "max_loops is 0; it must be at least 1"),
    ],
)
def test_engines_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, **arguments)


def test_the_least_budget_is_enough() -> None:
    for policy in POLICIES:
        least = 5 * PAGE
        engine = Engine(MODEL, kv_policy=policy, kv_bytes=least)
        assert engine.pool.num_bytes <= least
        assert outcome(engine, [PROMPTS[0]])[0][0] == "length"
        with pytest.raises(ValueError, match="kv_bytes"):
            Engine(MODEL, kv_policy=policy, kv_bytes=least - 1)


def test_a_pooled_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="exit_gate_pooling is 'causal_mean': the engine needs 'token'"):
        Engine(OuroForCausalLM(tiny_config(exit_gate_pooling="causal_mean")))


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([3, 64], {}, r"spans token ids 3\.\.64; they must lie in 0\.\.63"),
        ("text", {}, "the engine has no tokenizer"),
        ([3], {"stop": "x"}, "stop strings need a tokenizer"),
        ([3] * 100, {"max_tokens": 29}, "the prompt has 100 tokens and max_tokens is 29, but the context holds 128"),
        ([3] * 60, {"max_tokens": 50}, "more than the whole pool .* raise kv_bytes"),
        ([3], {"max_loops": 4}, "max_loops is 4; this engine was made for 3: raise its max_loops"),
        ([3], {"min_loops": 4}, "min_loops is 4; it must lie in 1..max_loops = 3"),
        ([3], {"exit_threshold": 0.5, "depth_budget": 2.0}, "exit_threshold and depth_budget are both given"),
        ([3], {"prefill": "adaptive"}, "prefill is 'adaptive', but no exit rule is given"),
        ([3], {"exit_rule": QExit(torch.tensor([0.5, 0.6]))}, "QExit.threshold has 2 values; a request takes one"),
    ],
)
def test_requests_that_cannot_be(prompt: Any, arguments: dict[str, Any], message: str) -> None:
    engine = Engine(MODEL, kv_bytes=20 * PAGE)
    with pytest.raises(ValueError, match=message) as caught:
        engine.generate([[3, 4], prompt], [PARAMS, SamplingParams(**{"max_tokens": 4, **arguments})])
    assert "\n" not in str(caught.value)
    blocks_are_free(engine)
    assert engine.ticks == 0


def test_reading_the_coda_in_an_adaptive_prompt_is_refused() -> None:
    engine = Engine(tiny_model(num_coda_layers=1), kv_bytes=1 << 20)
    params = SamplingParams(exit_rule=Confidence("kl", 0.5), prefill="adaptive")
    with pytest.raises(ValueError, match=r"Confidence reads the coda's output, .* use prefill='full'"):
        engine.add([3, 4], params)


def test_loop_hooks_are_refused() -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20)
    with loop_hook(MODEL, lambda state, loop: None), pytest.raises(ValueError, match="loop hooks are set"):
        engine.generate([PROMPTS[0]], PARAMS)
    blocks_are_free(engine)


# --- cancelling ---


@settings(max_examples=30, deadline=None)
@given(data=st.data(), policy=st.sampled_from(POLICIES), pages=st.integers(6, 30))
def test_cancelling_at_any_moment_leaks_nothing(data: st.DataObject, policy: str, pages: int) -> None:
    engine = Engine(MODEL, kv_policy=policy, kv_bytes=(pages + 2) * PAGE, max_rows=3, chunk_tokens=8)
    seen = []
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["add", "step", "step", "cancel"]))
        if action == "add":
            length, rule = data.draw(st.integers(1, 25)), data.draw(st.sampled_from(RULES))
            params = SamplingParams(max_tokens=7, n=data.draw(st.integers(1, 2)), exit_rule=rule)
            seen += (made := engine.prepare(tokens(length, seed=length).tolist(), params))
            engine.submit(made)
        elif action == "step":
            engine.step()
        elif seen:
            engine.cancel(data.draw(st.sampled_from(seen)).request)
    kept = [s for s in seen if s.finish_reason is None]
    while engine.busy:
        engine.step()
    assert all(s.finish_reason == "length" and len(s.new) == 7 for s in kept)
    assert all(s.finish_reason in ("length", "cancelled") for s in seen)
    blocks_are_free(engine)


RULES: list[ExitRule | None] = [None, QExit(0.5)]


@pytest.mark.parametrize("requests", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests_leave_memory_flat(requests: int) -> None:
    """Random requests with random cancels, on the smallest of models."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    engine = Engine(tiny_model(**config, total_ut_steps=2), kv_bytes=40 * BLOCK * 2 * 8 * 8, max_rows=8)
    draw, done, objects = random.Random(0), 0, []
    for request in range(requests):
        engine.add([request % 60 + 3] * draw.randint(1, 29), SamplingParams(max_tokens=3, exit_threshold=0.5))
        for _ in range(2):
            done += sum(s.finish_reason is not None for s in engine.step())
        if request % 3 == 0:
            done += len(engine.cancel(draw.randint(max(request - 5, 0), request)))
        if request % (requests // 2) == requests // 2 - 1:
            while engine.busy:
                done += sum(s.finish_reason is not None for s in engine.step())
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert done == requests
    blocks_are_free(engine)
    assert abs(objects[1] - objects[0]) < 1000, "objects alive after half of the requests, and after all"


def test_an_interrupted_generate_cancels_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20)
    step, calls = engine.step, iter(range(5))

    def interrupted() -> list:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, PARAMS)
    blocks_are_free(engine)

"""Engine, `generate` and the oracle agree: every rule, policy and variant, whatever else is in the batch."""

from typing import Any

import pytest
import torch
from checks import ADAPTIVE, LOOPS, RULES, limited
from hypothesis import given, settings
from hypothesis import strategies as st
from references import asking, blocks_are_free, check, check_oracle, close, play
from tiny import tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.engine.kv_pool import BLOCK
from looplm.exits import Confidence, FixedDepth, QExit, SampledExit, StateDifference

POLICIES = ["per_loop", "last"]
PROMPTS = [tokens(length, seed=seed).tolist() for length, seed in ((6, 11), (19, 12), (1, 13), (33, 14))]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_equals_the_oracle(name: str, policy: str) -> None:
    rule, criterion = RULES[name]
    model = tiny_model()
    engine = Engine(model, kv_policy=policy, kv_bytes=1 << 20, max_rows=3, chunk_tokens=20)
    found = engine.generate([PROMPTS[0], PROMPTS[1][:4], PROMPTS[2]], asking(exit_rule=rule, max_tokens=4))
    for completion in found:
        check_oracle(model, completion, limited(criterion), LOOPS, policy, "full")
    blocks_are_free(engine)


@pytest.mark.parametrize("name", list(ADAPTIVE))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_every_variant_equals_generate(name: str, policy: str, prefill: str) -> None:
    model = tiny_model(**ADAPTIVE[name])
    engine = Engine(model, kv_policy=policy, kv_bytes=4 << 20, max_rows=3, chunk_tokens=24)
    params = asking(exit_threshold=0.6, prefill=prefill)
    for completion in engine.generate(PROMPTS, params):
        check(model, completion, policy)(params)
    blocks_are_free(engine)


def test_the_oracle_with_an_adaptive_prompt_of_many_blocks() -> None:
    model = tiny_model()
    rule, criterion = RULES["q"]
    engine = Engine(model, kv_bytes=1 << 20, chunk_tokens=7)
    found = engine.generate(PROMPTS[1:2], asking(exit_rule=rule, max_tokens=3, prefill="adaptive"))
    check_oracle(model, found[0], limited(criterion), LOOPS, "per_loop", "adaptive")
    assert set(found[0].position_depths[:19]) == {1, 2, 3}


DEPTHS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.floats(0.2, 1.0).map(lambda q: {"exit_threshold": q}),
    st.floats(1.0, 3.0).map(lambda budget: {"depth_budget": budget}),
    st.integers(0, 50).map(lambda seed: {"exit_rule": SampledExit(seed)}),
    st.integers(1, 3).map(lambda loops: {"exit_rule": FixedDepth(loops)}),
    st.floats(2.0, 6.0).map(lambda epsilon: {"exit_rule": StateDifference(epsilon)}),
    st.tuples(st.sampled_from(["max_probability", "entropy", "kl"]), st.floats(0.2, 0.9)).map(
        lambda drawn: {"exit_rule": Confidence(drawn[0], drawn[1] * (3 if drawn[0] == "entropy" else 1))}
    ),
)
LIMITS = st.sampled_from([{}, {"min_loops": 2}, {"max_loops": 2}, {"max_loops": 1}, {"min_loops": 2, "max_loops": 2}])


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    """A prompt, often one that begins as others do, and what is asked of it."""
    depth, limits = draw(DEPTHS), draw(LIMITS)
    if "depth_budget" in depth:
        limits = {}
    start = tokens(36, seed=draw(st.integers(0, 1))).tolist()[: draw(st.sampled_from([0, 1, 17, 32, 36]))]
    prompt = start + tokens(draw(st.integers(1, 6)), seed=draw(st.integers(0, 99))).tolist()
    prefill = draw(st.sampled_from(["full", "adaptive"])) if depth else "full"
    return prompt, asking(max_tokens=draw(st.integers(2, 7)), prefill=prefill, **depth, **limits)


@settings(max_examples=40, deadline=None)
@given(
    work=st.lists(requests(), min_size=1, max_size=5),
    policy=st.sampled_from(POLICIES),
    rows=st.integers(1, 4),
    chunk=st.sampled_from([1, 5, 16, 40, 256]),
    spare=st.integers(0, 8),
    waits=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    priorities=st.lists(st.integers(-1, 1), min_size=5, max_size=5),
    interrupted=st.dictionaries(st.integers(1, 30), st.integers(0, 3), max_size=4),
)
def test_any_schedule_gives_what_generate_gives(
    work: list[tuple[list[int], SamplingParams]],
    policy: str,
    rows: int,
    chunk: int,
    spare: int,
    waits: list[int],
    priorities: list[int],
    interrupted: dict[int, int],
) -> None:
    """Ragged prompts, mixed rules and limits, arrivals at any time, interruptions, shared prefixes, any chunk size."""
    model = MODEL
    pages = 3 * max(-(-(len(prompt) + params.max_tokens) // BLOCK) for prompt, params in work) + spare
    engine = Engine(model, kv_policy=policy, kv_bytes=(pages + 4) * PAGE, max_rows=rows, chunk_tokens=chunk)
    asked = ((prompt, params, priority) for (prompt, params), priority in zip(work, priorities, strict=False))
    seen = play(engine, asked, waits, interrupted)
    for sequence in seen:
        check(model, sequence.completion(), policy)(sequence.params)
    blocks_are_free(engine)


MODEL = tiny_model()
PAGE = 2 * BLOCK * 2 * 32 * 8


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_pool_preempts_and_changes_nothing(policy: str) -> None:
    model = tiny_model()
    prompts = [tokens(length, seed=length).tolist() for length in (14, 15, 16, 13)]
    pages = 3 * 4 if policy == "per_loop" else 7
    engine = Engine(model, kv_policy=policy, kv_bytes=(pages + 2) * PAGE, max_rows=4)
    params = asking(max_tokens=30, exit_threshold=0.6)
    found = engine.generate(prompts, params)
    assert engine.scheduler.preemptions > 0
    for completion in found:
        check(model, completion, policy)(params)
    blocks_are_free(engine)


def test_prompts_that_come_together_share_what_they_begin_with() -> None:
    """Those behind wait for the blocks of the first, unrelated ones do not; a first one that ends is no loss."""
    model, start = tiny_model(), tokens(40, seed=3).tolist()
    prompts = [[*start, end] for end in (5, 6, 7)] + [tokens(9, seed=4).tolist()]
    for cancelled in (False, True):
        engine = Engine(model, kv_bytes=1 << 20)
        requests = [engine.prepare(prompt, asking(exit_threshold=0.6)) for prompt in prompts]
        for sequences in requests:
            engine.submit(sequences)
        engine.step()
        assert [s.slot is not None for (s,) in requests] == [True, False, False, True]
        if cancelled:
            engine.cancel(requests[0][0].request)
        while engine.busy:
            engine.step()
        finished = [s.completion() for (s,) in requests]
        assert [c.cached_tokens for c in finished] == ([0, 0, 32, 0] if cancelled else [0, 32, 32, 0])
        for completion in finished[cancelled:]:
            check(model, completion, "per_loop")(asking(exit_threshold=0.6))
        blocks_are_free(engine)


@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_prefix_hits_change_nothing_but_the_work(prefill: str) -> None:
    model = tiny_model()
    engine = Engine(model, kv_bytes=1 << 20)
    start = tokens(40, seed=3).tolist()
    params = asking(exit_threshold=0.6, prefill=prefill)
    first = engine.generate([[*start, 5]], params)[0]
    calls: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape[1]))
    second, other = engine.generate([[*start, 9, 8]], params)[0], engine.generate([[*start, 7]], asking())[0]
    hook.remove()
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert calls[0] == 10, "the rest of the prompt alone is run"
    assert other.cached_tokens == (32 if prefill == "full" else 0), "another rule, other depths"
    check(model, second, "per_loop")(params)
    check(model, other, "per_loop")(asking())
    blocks_are_free(engine)


def test_what_parts_prefixes() -> None:
    """Loop limits, rules, thresholds; not the seed of the tokens or the rule behind a full-depth prompt."""
    model, prompt = tiny_model(), tokens(20, seed=3).tolist()
    cached = [
        (asking(), 0),
        (asking(exit_threshold=0.3), 20),
        (asking(temperature=1.0, seed=3), 20),
        (asking(max_loops=2), 0),
        (asking(exit_threshold=0.3, prefill="adaptive"), 0),
        (asking(exit_threshold=0.4, prefill="adaptive"), 0),
        (asking(exit_rule=QExit(0.3), prefill="adaptive"), 20),
        (asking(exit_threshold=0.3, min_loops=2, prefill="adaptive"), 0),
    ]
    engine = Engine(model, kv_bytes=1 << 20)
    assert [engine.generate([prompt], params)[0].cached_tokens for params, _ in cached] == [hit for _, hit in cached]
    for without in ({"prefix_cache": False}, {"kv_policy": "last"}):
        engine = Engine(model, kv_bytes=1 << 20, **without)
        assert [engine.generate([prompt], asking())[0].cached_tokens for _ in range(2)] == [0, 0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 5, BLOCK, BLOCK + 3, 2 * BLOCK]), min_size=1, max_size=3),
    samples=st.integers(2, 5),
    depth=st.sampled_from([{}, {"exit_threshold": 0.5}, {"exit_rule": SampledExit(3)}, {"max_loops": 2}]),
    prefill=st.sampled_from(["full", "adaptive"]),
    most=st.integers(1, 6),
    rows=st.integers(1, 8),
    chunk=st.sampled_from([7, 64]),
    pages=st.sampled_from([4 * 4, 99]),
)
def test_samples_of_a_prompt_that_is_run_once(lengths, samples, depth, prefill, most, rows, chunk, pages) -> None:
    """Copied ends of prompts change nothing: against an engine that runs every prompt by itself."""
    prefill = prefill if depth.keys() & {"exit_threshold", "exit_rule"} else "full"
    model, prompts = tiny_model(), [tokens(n, seed=n).tolist() for n in lengths]
    params = SamplingParams(
        max_tokens=most, temperature=1.0, seed=5, n=samples, logprobs=2, prefill=prefill, ignore_eos=True, **depth
    )
    made = [
        Engine(model, kv_bytes=(pages + 2) * PAGE, max_rows=rows, chunk_tokens=chunk, prefix_cache=cache)
        for cache in (True, False)
    ]
    shared, alone = (engine.generate(prompts, params) for engine in made)
    for one, other in zip(shared, alone, strict=True):
        assert (one.token_ids, one.exit_depths, one.error) == (other.token_ids, other.exit_depths, None)
        assert one.position_depths == other.position_depths
        close(torch.tensor(one.logprobs), torch.tensor(other.logprobs))
        for name in ("exit_log_probabilities", "log_survival"):
            for left, right in zip(getattr(one, name), getattr(other, name), strict=True):
                close(torch.tensor(left), torch.tensor(right), 1e-5)
    for engine in made:
        blocks_are_free(engine)


def test_what_the_prompt_is_run_once_for() -> None:
    """One row a prompt, whoever ends first; requests that come later need no pass for it either."""
    model, prompt = tiny_model(), tokens(BLOCK + 5, seed=1).tolist()
    rows: list[tuple[int, int]] = []
    model.model.layers[0].register_forward_hook(lambda _, inputs, __: rows.append(tuple(inputs[0].shape[:2])))
    engine = Engine(model, kv_bytes=1 << 20, max_rows=3)
    first = engine.generate([prompt], SamplingParams(max_tokens=1, n=7))
    assert rows == [(1, BLOCK + 5)] * 3 and [c.cached_tokens for c in first] == [0] + [BLOCK + 5] * 6
    later = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=1.0, seed=1))
    assert len(rows) == 3 and later[0].cached_tokens == BLOCK + 5
    blocks_are_free(engine)


@pytest.mark.parametrize("length", [BLOCK - 2, 2 * BLOCK])
def test_the_end_of_a_prompt_gives_way_to_the_prompt_itself(length: int) -> None:
    """A pool that holds one such request and nothing beside it."""
    model, prompt = tiny_model(), tokens(length, seed=1).tolist()
    pages = -(-length // BLOCK) * LOOPS
    engine = Engine(model, kv_bytes=(pages + 2) * PAGE)
    found = engine.generate([prompt] * 3, SamplingParams(max_tokens=1))
    assert [c.finish_reason for c in found] == ["length"] * 3 and len({c.token_ids[0] for c in found}) == 1
    blocks_are_free(engine)


def test_the_recorded_depths_replay() -> None:
    """`position_depths` is ready for the parallel pass."""
    model = tiny_model()
    engine = Engine(model, kv_bytes=1 << 20)
    completion = engine.generate([PROMPTS[1]], asking(exit_threshold=0.6))[0]
    ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
    logits = model(ids[:, :-1], exit_depths=torch.tensor([completion.position_depths])).logits[0, 18:]
    assert logits.argmax(-1).tolist() == completion.token_ids


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_float32_agrees_too(backend: str) -> None:
    model = tiny_model(num_key_value_heads=2).float()
    model.set_attn_implementation(backend)
    engine = Engine(model, kv_bytes=1 << 20, chunk_tokens=10)
    for completion in engine.generate(PROMPTS, SamplingParams(max_tokens=6, exit_threshold=0.6)):
        result = model.generate(
            torch.tensor([completion.prompt_token_ids]), exit_threshold=0.6, max_new_tokens=6, do_sample=False
        )
        assert completion.token_ids == result[0, len(completion.prompt_token_ids) :].tolist()

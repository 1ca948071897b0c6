"""`generate` at every depth: tokens, logits and recorded depths equal a slow oracle, and loops not run cost nothing."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Look, Stop, slow_generate, sweep
from tiny import VARIANTS, tiny_config, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, SampledExit, StateDifference, keyed_uniform
from looplm.model.cache import LoopCache
from looplm.model.generation import DepthOptions, DepthSession
from looplm.model.modeling import OuroForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:running . loops")

STEPS, LOOPS = 6, 3
ADAPTIVE = {name: fields for name, fields in VARIANTS.items() if name not in ("causal-mean", "all")}
ADAPTIVE["all"] = {**VARIANTS["all"], "exit_gate_pooling": "token"}
PROMPTS = [tokens(length, seed=seed) for length, seed in ((6, 11), (4, 12), (1, 13))]
FULL = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": STEPS}


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :], mask[b, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def close(actual: Tensor, expected: Tensor) -> None:
    """`generate` keeps its logits in fp32."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-6, atol=1e-6)


# --- the rules once more, in plain Python ---


def q_exit(q: float) -> Callable[[Look, int], bool]:
    return lambda look, low: 1 - math.prod(1 - h for h in look.hazards[low - 1 :]) >= q


def probabilities(look: Look, back: int = 1) -> list[float]:
    return look.read(look.states[-back]).exp().tolist()


def kl(look: Look) -> float:
    if look.loop == 1:
        return math.inf
    return sum(p * math.log(p / q) for p, q in zip(probabilities(look), probabilities(look, 2), strict=True))


def difference(look: Look) -> float:
    return math.inf if look.loop == 1 else math.dist(look.states[-1].tolist(), look.states[-2].tolist())


def sampled(seed: int) -> Callable[[Look, int], bool]:
    return lambda look, _: (
        float(keyed_uniform(torch.tensor(seed), torch.tensor(look.position), look.loop)) < (look.hazards[-1])
    )


RULES: dict[str, tuple[ExitRule, Callable[[Look, int], bool]]] = {
    "q": (QExit(0.6), q_exit(0.6)),
    "fixed": (FixedDepth(2), lambda look, _: look.loop >= 2),
    "max-probability": (Confidence("max_probability", 0.3), lambda look, _: max(probabilities(look)) >= 0.3),
    "entropy": (
        Confidence("entropy", 2.4),
        lambda look, _: -sum(p * math.log(p) for p in probabilities(look)) <= 2.4,
    ),
    "kl": (Confidence("kl", 0.8), lambda look, _: kl(look) <= 0.8),
    "difference": (StateDifference(4.0), lambda look, _: difference(look) < 4.0),
    "sampled": (SampledExit(3), sampled(3)),
}


def limited(criterion: Callable[[Look, int], bool], min_loops: int = 1) -> Stop:
    return lambda look: look.loop >= min_loops and criterion(look, min_loops)


def check_rows(
    model: OuroForCausalLM, result: Any, prompts: list[Tensor], stops: list[Stop], max_loops: int = LOOPS
) -> None:
    """Tokens, logits and depths of every row against the oracle."""
    logits = torch.stack(result.logits, dim=1)
    for b, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
        new, expected, depths = slow_generate(model, prompt.tolist(), STEPS, stop, max_loops)
        assert result.sequences[b, -STEPS:].tolist() == new
        assert result.exit_depths[b].tolist() == depths
        close(logits[b], expected)


# --- full depth ---


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("loops", [1, 3, 4])
@torch.no_grad()
def test_full_depth_is_greedy_from_scratch(name: str, loops: int) -> None:
    model = tiny_model(**VARIANTS[name])
    result = model.generate(**left_padded(PROMPTS), **FULL, adaptive_loop=False, num_loop_steps=loops)
    for b, prompt in enumerate(PROMPTS):
        ids = prompt
        for step in range(STEPS):
            logits = model(ids[None], num_loop_steps=loops).logits[0, -1]
            close(result.logits[step][b], logits)
            ids = torch.cat([ids, logits.argmax()[None]])
        assert torch.equal(result.sequences[b, -STEPS:], ids[-STEPS:])
    assert result.exit_depths.shape == (3, STEPS) and (result.exit_depths == loops).all()
    uncached = model.generate(
        **left_padded(PROMPTS), **FULL, adaptive_loop=False, num_loop_steps=loops, use_cache=False
    )
    assert torch.equal(uncached.sequences, result.sequences) and torch.equal(uncached.exit_depths, result.exit_depths)


def test_max_loops_is_the_full_depth() -> None:
    model = tiny_model()
    two = model.generate(PROMPTS[0][None], **FULL, num_loop_steps=2)
    assert torch.equal(model.generate(PROMPTS[0][None], **FULL, max_loops=2).sequences, two.sequences)
    assert (two.exit_depths == 2).all()


def test_the_plain_call_returns_a_tensor() -> None:
    model = tiny_model()
    settings = {"max_new_tokens": STEPS, "do_sample": False}
    assert torch.equal(model.generate(PROMPTS[0][None], **settings), model.generate(PROMPTS[0][None], **FULL).sequences)


# --- early exit ---


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_equals_the_oracle_in_a_padded_batch(name: str) -> None:
    rule, criterion = RULES[name]
    model = tiny_model()
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=rule)
    check_rows(model, result, PROMPTS, [limited(criterion)] * 3)
    assert (result.exit_depths[:, 0] == LOOPS).all()
    if name != "fixed":
        later = result.exit_depths[:, 1:]
        assert len(later.unique()) >= 2 and (later != later[0]).any(), "the rows should part"


@pytest.mark.parametrize("name", list(ADAPTIVE))
@pytest.mark.parametrize("rule", ["q", "kl"])
def test_every_variant_equals_the_oracle(name: str, rule: str) -> None:
    model = tiny_model(**ADAPTIVE[name])
    result = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_rule=RULES[rule][0])
    check_rows(model, result, PROMPTS[:2], [limited(RULES[rule][1])] * 2)


@pytest.mark.parametrize(("min_loops", "max_loops"), [(2, 3), (1, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("rule", ["q", "kl", "sampled"])
def test_depth_limits(rule: str, min_loops: int, max_loops: int) -> None:
    model = tiny_model()
    limits = {"min_loops": min_loops, "max_loops": max_loops}
    result = model.generate(**left_padded(PROMPTS[1:]), **FULL, exit_rule=RULES[rule][0], **limits)
    check_rows(model, result, PROMPTS[1:], [limited(RULES[rule][1], min_loops)] * 2, max_loops)
    assert result.exit_depths.min() >= min_loops and result.exit_depths.max() <= max_loops


def test_thresholds_one_a_row() -> None:
    model, thresholds = tiny_model(), [0.3, 0.9, 1.0]
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=torch.tensor(thresholds))
    check_rows(model, result, PROMPTS, [limited(q_exit(q)) for q in (0.3, 0.9, 2.0)])


def test_the_configured_threshold_is_the_default() -> None:
    model = tiny_model(early_exit_threshold=0.6)
    asked = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    for arguments in ({}, {"adaptive_loop": True}, {"exit_rule": QExit(0.6)}):
        result = model.generate(**left_padded(PROMPTS), **FULL, **arguments)
        assert torch.equal(result.exit_depths, asked.exit_depths)
        assert torch.equal(result.sequences, asked.sequences)
    assert (model.generate(**left_padded(PROMPTS), **FULL, adaptive_loop=False).exit_depths == LOOPS).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_early_exit_saves_the_loops(rows: int) -> None:
    model, calls, heads = tiny_model(), [], []
    model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].shape))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    result = model.generate(**left_padded(PROMPTS[:rows]), **FULL, exit_threshold=0.6)
    prompt = [shape for shape in calls if shape[1] > 1]
    assert len(prompt) == 2 * LOOPS  # layers x loops, whole batch
    later = result.exit_depths[:, 1:]
    assert sum(shape[0] for shape in calls if shape[1] == 1) == 2 * int(later.sum())
    assert len(calls) - len(prompt) == 2 * int(later.max(0).values.sum())
    assert int(later.sum()) < later.numel() * LOOPS
    assert heads == [(rows, 1, 32)] * STEPS


def test_outputs_of_a_decoding_pass() -> None:
    """Exit probabilities are equation 3 up to the exit and NaN beyond it."""
    model, outputs = tiny_model(), []
    model.register_forward_hook(lambda _, __, output: outputs.append(output))
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.8, min_loops=2)
    assert outputs[0].exit_probabilities.shape == (3, 6, LOOPS)
    for step, output in enumerate(outputs[1:], start=1):
        depths = result.exit_depths[:, step]
        assert torch.equal(output.exit_depths[:, 0], depths)
        for p, depth in zip(output.exit_probabilities[:, 0], depths, strict=True):
            assert p[:depth].isfinite().all() and p[depth:].isnan().all() and p[0] == 0
            assert p[:depth].sum() >= (0.8 if depth < LOOPS else 1 - 1e-6)


def test_depths_recorded_beyond_the_last_token_are_dropped() -> None:
    """Some devices and sharded runs go on for a pass or two after the last token."""
    session = DepthSession(DepthOptions(QExit(0.5), 1, 3), prompt_end=4, eos_token_id=[9])
    session.depths = [torch.tensor([[d], [d]]) for d in (3, 1, 2, 2)]
    assert session.recorded(torch.tensor([[5, 9, 0], [5, 6, 7]])).tolist() == [[3, 1, 0], [3, 1, 2]]


@pytest.mark.parametrize("name", ["q", "max-probability"])
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    model, rule = tiny_model(), RULES[name][0]
    together = model.generate(**left_padded(PROMPTS), **FULL, exit_rule=rule)
    for b, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **FULL, exit_rule=rule)
        assert torch.equal(together.sequences[b, -STEPS:], alone.sequences[0, -STEPS:])
        assert torch.equal(together.exit_depths[b], alone.exit_depths[0])


def test_eager_attention_agrees() -> None:
    results = []
    for backend in ("sdpa", "eager"):
        model = tiny_model(num_key_value_heads=2)
        model.set_attn_implementation(backend)
        results.append(model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].exit_depths, results[1].exit_depths)
    close(torch.stack(results[0].logits), torch.stack(results[1].logits))


@pytest.mark.parametrize("many", [False, True])
def test_depths_are_0_after_the_end(many: bool) -> None:
    model = tiny_model()
    free = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6)
    end = int(free.sequences[0, -4])  # the third new token of the first row
    ends = [end, 63] if many else end
    result = model.generate(**left_padded(PROMPTS), **FULL, exit_threshold=0.6, eos_token_id=ends)
    depths = torch.zeros(3, result.exit_depths.shape[1], dtype=torch.long)
    for b in range(3):
        new = free.sequences[b, -STEPS:].tolist()
        stop = min([i + 1 for i, token in enumerate(new) if token in ([end, 63] if many else [end])], default=STEPS)
        depths[b, :stop] = free.exit_depths[b, :stop]
        assert result.sequences[b, 6 : 6 + stop].tolist() == new[:stop]
        assert (result.sequences[b, 6 + stop :] == 0).all()
    assert torch.equal(result.exit_depths, depths) and (depths == 0).any()


# --- what transformers' generate can do besides ---


def test_a_prompt_may_be_prefilled_in_chunks() -> None:
    model = tiny_model()
    whole = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6)
    for size in (2, 5):  # 5 leaves a chunk of a single token, which is no new token
        chunked = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6, prefill_chunk_size=size)
        assert torch.equal(chunked.sequences, whole.sequences)
        assert torch.equal(chunked.exit_depths, whole.exit_depths)


def test_a_second_turn_on_the_same_cache() -> None:
    """Positions keep the depth they were generated at; the new prompt runs at full depth."""
    model, cache = tiny_model(), LoopCache(tiny_config())
    first = model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, past_key_values=cache)
    conversation = torch.cat([first.sequences, PROMPTS[1][None]], dim=1)
    second = model.generate(conversation, **FULL, exit_threshold=0.6, past_key_values=cache)
    generated = [*range(6, 6 + STEPS - 1), *range(conversation.shape[1], 100)]  # the last token was not run yet
    stop = limited(q_exit(0.6))
    slow = sweep(model, second.sequences[0].tolist(), lambda look: look.position in generated and stop(look), LOOPS)
    at = slice(conversation.shape[1] - 1, -1)
    close(torch.stack(second.logits)[:, 0], torch.stack(slow.logits[at]))
    assert second.exit_depths[0].tolist() == slow.depths[at]
    assert set(slow.depths[6 : 6 + STEPS - 1]) != {LOOPS}


@pytest.mark.parametrize("adaptive", [False, True])
def test_without_a_prompt_it_starts_from_bos(adaptive: bool) -> None:
    model = tiny_model()
    threshold = {"exit_rule": FixedDepth(1)} if adaptive else {}
    result = model.generate(**FULL, **threshold)
    explicit = model.generate(torch.tensor([[1]]), **FULL, **threshold)
    assert torch.equal(result.sequences, explicit.sequences)
    assert torch.equal(result.exit_depths, explicit.exit_depths) and result.exit_depths[0].tolist() == (
        [LOOPS] + [1 if adaptive else LOOPS] * (STEPS - 1)
    )


def test_embeddings_as_prompt() -> None:
    model = tiny_model()
    ids = model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6)
    embedded = model.generate(inputs_embeds=model.model.embed_tokens(PROMPTS[0][None]), **FULL, exit_threshold=0.6)
    assert torch.equal(embedded.sequences, ids.sequences[:, 6:])
    assert torch.equal(embedded.exit_depths, ids.exit_depths)


def test_sampling_with_a_seed_is_reproducible() -> None:
    model, results = tiny_model(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        settings = {**FULL, "do_sample": True, "temperature": 1.5, "num_return_sequences": 2}
        results.append(model.generate(**left_padded(PROMPTS), **settings, exit_rule=SampledExit(5)))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert torch.equal(results[0].exit_depths, results[1].exit_depths)
    assert not torch.equal(results[0].sequences, results[2].sequences)
    assert results[0].exit_depths.shape == (6, STEPS)


@torch.no_grad()
def test_recorded_depths_replay_a_sampled_text() -> None:
    """Whatever was sampled, the oracle at the recorded depths gives the logits that were sampled from."""
    model = tiny_model()
    torch.manual_seed(0)
    result = model.generate(PROMPTS[1][None], **{**FULL, "do_sample": True}, exit_rule=SampledExit(5))
    depths = [LOOPS] * 4 + result.exit_depths[0, 1:].tolist()
    slow = sweep(model, result.sequences[0, :-1].tolist(), lambda look: look.loop >= depths[look.position], LOOPS)
    close(torch.stack(result.logits)[:, 0], torch.stack(slow.logits[3:]))


def test_streamer() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    result = tiny_model().generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, streamer=streamer)
    assert streamer.pieces == result.sequences[0].tolist() and streamer.ended


def test_beam_search_at_full_depth() -> None:
    model, prompts = tiny_model(), tokens(8, 3, seed=1)
    beams = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    results = [model.generate(prompts, **FULL, **beams, use_cache=cached) for cached in (True, False)]
    assert torch.equal(results[0].sequences, results[1].sequences)
    close(results[0].sequences_scores, results[1].sequences_scores)
    greedy = model.generate(prompts, **FULL)
    assert not torch.equal(results[0].sequences[::2], greedy.sequences)
    assert results[0].exit_depths.shape == (16, STEPS) and (results[0].exit_depths == LOOPS).all()


@pytest.mark.parametrize("draft", ["itself", "another", "shallow", "lookup"])
def test_assisted_generation_at_full_depth(draft: str) -> None:
    model, calls = tiny_model(), []
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    greedy = model.generate(PROMPTS[0][None], **settings)
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assistants = {"itself": tiny_model(), "another": tiny_model(seed=1), "shallow": tiny_model()}
    assistants["shallow"].config.early_exit_threshold = 0.3
    helped = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": assistants[draft]}
    drafted = model.generate(PROMPTS[0][None], **settings, **helped)
    assert torch.equal(greedy.sequences, drafted.sequences)
    assert drafted.exit_depths.shape == (1, 12) and (drafted.exit_depths == LOOPS).all()
    assert draft != "itself" or len(calls) < 12


@torch.no_grad()
def test_the_released_exits_work_in_generate() -> None:
    """`exit_at_step` and `use_weighted_exit` select a state after all loops have run."""
    model = tiny_model()
    for arguments in ({"exit_at_step": 0}, {"use_weighted_exit": True}):
        result = model.generate(PROMPTS[0][None], **FULL, **arguments)
        ids = PROMPTS[0][None]
        for step in range(STEPS):
            logits = model(ids, **arguments).logits[:, -1]
            close(result.logits[step], logits)
            ids = torch.cat([ids, logits.argmax(-1)[None]], dim=1)
        assert torch.equal(result.sequences, ids)
    assert "exit_depths" not in result  # a mixture has none


# --- refusals ---


def assistant() -> OuroForCausalLM:
    return tiny_model(seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adaptive_loop": False, "exit_threshold": 0.5}, "adaptive_loop is False, but an exit rule is given"),
        ({"adaptive_loop": False, "exit_rule": QExit(0.5)}, "adaptive_loop is False, but an exit rule is given"),
        ({"exit_threshold": 0.5, "exit_rule": QExit(0.5)}, "exit_threshold and exit_rule are both given"),
        ({"exit_threshold": 0.0}, "exit_threshold is 0.0"),
        ({"exit_threshold": torch.tensor([0.5, 0.5])}, "has 2 values; the batch has 1 rows"),
        ({"min_loops": 4}, r"min_loops is 4; it must lie in 1\.\.max_loops = 3"),
        ({"min_loops": 0}, "min_loops is 0"),
        ({"num_loop_steps": 0}, "min_loops is 1; .*max_loops = 0"),
        ({"exit_threshold": 0.5, "use_cache": False}, "use_cache is False: early exit needs the cache"),
        ({"exit_threshold": 0.5, "num_beams": 2}, "run at full depth"),
        ({"exit_threshold": 0.5, "generation_config": GenerationConfig(num_beams=2)}, "run at full depth"),
        ({"exit_threshold": 0.5, "prompt_lookup_num_tokens": 2}, "run at full depth"),
        ({"exit_threshold": 0.5, "assistant_model": assistant}, "run at full depth"),
        ({"exit_threshold": 0.5, "exit_at_step": 1}, "exit_at_step"),
        ({"exit_threshold": 0.5, "use_weighted_exit": True}, "use_weighted_exit"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation is 'quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation is 'offloaded'"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        ({"past_key_values": StaticCache(tiny_config(), max_cache_len=32)}, "past_key_values is a StaticCache"),
        ({"past_key_values": LoopCache(tiny_config(num_hidden_layers=3))}, r"holds layers \(0, 3, 0\)"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    arguments = {k: v() if v is assistant else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model().generate(PROMPTS[0][None], max_new_tokens=3, **arguments)
    assert "\n" not in str(caught.value)


def test_beams_of_the_models_own_generation_config_are_refused_too() -> None:
    model = tiny_model()
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="run at full depth"):
        model.generate(PROMPTS[0][None], max_new_tokens=3, exit_threshold=0.5)


def test_pooled_gates_cannot_decode_adaptively() -> None:
    model = tiny_model(exit_gate_pooling="causal_mean")
    for arguments in ({"exit_threshold": 0.5}, {"adaptive_loop": True}, {"exit_rule": FixedDepth(1)}):
        with pytest.raises(ValueError, match="exit_gate_pooling is 'causal_mean'"):
            model.generate(PROMPTS[0][None], max_new_tokens=3, **arguments)


def test_empty_and_endless_prompts() -> None:
    model = tiny_model(max_position_embeddings=8)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match="9 positions, but max_position_embeddings is 8"):
        model.generate(tokens(1, 9), max_new_tokens=3)


def test_more_loops_than_trained_warn_once() -> None:
    model = tiny_model(total_ut_steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = model.generate(PROMPTS[0][None], **FULL, num_loop_steps=5)
    assert (result.exit_depths == 5).all()
    messages = [str(warning.message) for warning in caught if "loops" in str(warning.message)]
    assert len(messages) == 1 and messages[0].startswith("running 5 loops, but the model was trained with 2: ")


def test_generation_leaves_the_configuration_alone() -> None:
    model = tiny_model()
    before = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
    model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, min_loops=2)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before

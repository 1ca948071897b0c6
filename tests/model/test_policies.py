"""KV policies in generation: what later positions see, what is kept in memory, and what has no parallel form."""

from typing import Any

import pytest
import torch
from checks import ADAPTIVE, FULL, LOOPS, PROMPTS, RULES, STEPS, check_rows, close, left_padded, limited, q_exit
from oracle import sweep
from tiny import tiny_config, tiny_model, tokens
from torch import Tensor

from looplm.exits import Confidence, ExitRule, FixedDepth
from looplm.model.cache import KV_POLICIES, LoopCache
from looplm.model.modeling import OuroForCausalLM

SINGLE = [policy for policy in KV_POLICIES if policy != "per_loop"]


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_and_policy_equals_the_oracle_with_adaptive_prefill(rule: str, policy: str) -> None:
    model = tiny_model()
    result = model.generate(
        **left_padded(PROMPTS), **FULL, exit_rule=RULES[rule][0], kv_policy=policy, prefill="adaptive"
    )
    check_rows(model, result, PROMPTS, [limited(RULES[rule][1])] * 3, LOOPS, policy, "adaptive", [1, 1, 1])
    if rule != "fixed":
        prompt = result.position_depths[0, :6]
        assert len(prompt.unique()) >= 2 and (prompt < LOOPS).any()


@pytest.mark.parametrize("policy", SINGLE)
@pytest.mark.parametrize("name", list(ADAPTIVE))
def test_every_variant_equals_the_oracle_under_every_policy(name: str, policy: str) -> None:
    model = tiny_model(**ADAPTIVE[name])
    result = model.generate(**left_padded(PROMPTS[:2]), **FULL, exit_threshold=0.6, kv_policy=policy)
    check_rows(model, result, PROMPTS[:2], [limited(q_exit(0.6))] * 2, LOOPS, policy)


@pytest.mark.parametrize("policy", SINGLE)
def test_full_depth_one_number_of_loops_a_row(policy: str) -> None:
    """The prompt of a row stops at the row's own full depth."""
    model, loops = tiny_model(), [1, 3, 2]
    settings = {"adaptive_loop": False, "num_loop_steps": torch.tensor(loops), "kv_policy": policy}
    result = model.generate(**left_padded(PROMPTS), **FULL, **settings)
    check_rows(model, result, PROMPTS, [lambda _: False] * 3, loops, policy)
    for b, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt[None], **FULL, num_loop_steps=loops[b], kv_policy=policy)
        assert torch.equal(alone.sequences[0, -STEPS:], result.sequences[b, -STEPS:])
        close(torch.stack(alone.logits)[:, 0], torch.stack(result.logits)[:, b])


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize("prefill", ["full", "adaptive"])
def test_chunked_prefill(policy: str, prefill: str) -> None:
    model = tiny_model(num_prelude_layers=1)
    settings = {**FULL, "exit_threshold": 0.6, "kv_policy": policy, "prefill": prefill}
    whole = model.generate(**left_padded(PROMPTS[:2]), **settings)
    for size in (1, 2, 5):
        chunked = model.generate(**left_padded(PROMPTS[:2]), **settings, prefill_chunk_size=size)
        assert torch.equal(chunked.sequences, whole.sequences)
        assert torch.equal(chunked.position_depths, whole.position_depths)
        close(torch.stack(chunked.logits), torch.stack(whole.logits))


# --- memory ---


def core_bytes(cache: LoopCache) -> int:
    return sum(s.keys.untyped_storage().nbytes() + s.values.untyped_storage().nbytes() for s in cache.core)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_memory_after_the_prompt(policy: str) -> None:
    """Single-slot policies keep one slot a layer: a T-th of the core's memory, from the prompt's end on."""
    model, seen = tiny_model(num_key_value_heads=2, num_prelude_layers=1, num_coda_layers=1), []
    model.register_forward_hook(
        lambda _, __, output: seen.append((output.past_key_values.num_bytes, core_bytes(output.past_key_values)))
    )
    result = model.generate(PROMPTS[0][None].expand(3, -1), **FULL, exit_threshold=0.6, kv_policy=policy)
    slots = LOOPS if policy == "per_loop" else 1
    one = 2 * 3 * 2 * 8 * 8  # keys and values, 3 rows, 2 heads of 8, fp64: bytes of one slot at one position
    filled = [(2 * slots + 2) * one * length for length in range(6, 6 + STEPS)]  # 2 core layers, prelude and coda
    assert [filled_bytes for filled_bytes, _ in seen] == filled
    assert {allocated for _, allocated in seen} == {2 * slots * one * (6 + STEPS - 1)}
    assert result.past_key_values.policy == policy


@pytest.mark.parametrize("policy", SINGLE)
def test_growing_a_collapsed_cache_keeps_one_slot(policy: str) -> None:
    model, cache = tiny_model(), LoopCache(tiny_config())
    settings = {**FULL, "max_new_tokens": 40, "exit_threshold": 0.6, "kv_policy": policy}
    grown = model.generate(PROMPTS[0][None], **settings, past_key_values=cache)
    planned = model.generate(PROMPTS[0][None], **settings)
    assert cache.core[0].keys.shape[0] == 1 and cache.core[0].keys.shape[3] >= 45
    assert torch.equal(grown.sequences, planned.sequences)


# --- going on with a cache ---


@torch.no_grad()
@pytest.mark.parametrize("policy", SINGLE)
def test_a_second_turn_token_by_token(policy: str) -> None:
    """Behind a collapsed prompt a new prompt runs one token at a time; each sees the kept slot of those before."""
    model, cache = tiny_model(), LoopCache(tiny_config())
    settings = {**FULL, "exit_threshold": 0.6, "kv_policy": policy, "past_key_values": cache}
    first = model.generate(PROMPTS[0][None], **settings)
    conversation = torch.cat([first.sequences, PROMPTS[1][None]], dim=1)
    with pytest.raises(ValueError, match=r"is collapsed .* no parallel form: it takes one new token at a time, not 5"):
        model.generate(conversation, **settings)
    second = model.generate(conversation, **settings, prefill_chunk_size=1)
    end = conversation.shape[1]
    generated = [*range(6, 6 + STEPS - 1), *range(end, 100)]
    stop = limited(q_exit(0.6))
    ids = second.sequences[0, :-1].tolist()
    slow = sweep(model, ids, lambda look: look.position in generated and stop(look), LOOPS, policy, 6)
    close(torch.stack(second.logits)[:, 0], torch.stack(slow.logits[end - 1 :]))
    assert second.position_depths[0].tolist() == slow.depths
    assert second.exit_depths[0].tolist() == slow.depths[end - 1 :]


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_a_second_turn_of_one_token(policy: str) -> None:
    """A turn that adds nothing to the cached text but its last token is the same generation going on."""
    model, cache = tiny_model(), LoopCache(tiny_config())
    settings = {"exit_rule": FixedDepth(LOOPS), "kv_policy": policy}  # prompts are read at full depth
    whole = model.generate(PROMPTS[0][None], **FULL, **settings)
    half = {**FULL, "max_new_tokens": 3}
    first = model.generate(PROMPTS[0][None], **half, **settings, past_key_values=cache)
    second = model.generate(first.sequences, **half, **settings, past_key_values=cache)
    assert torch.equal(second.sequences, whole.sequences)
    close(torch.stack(first.logits + second.logits), torch.stack(whole.logits))
    assert torch.equal(second.position_depths, whole.position_depths)


@torch.no_grad()
@pytest.mark.parametrize("policy", KV_POLICIES)
def test_cropping_and_reordering_a_collapsed_cache(policy: str) -> None:
    """Taking positions back and permuting rows leave the rest as it was."""
    model = tiny_model()
    ids = tokens(3, 6, seed=4)
    result = model.generate(ids, **FULL, exit_threshold=0.6, kv_policy=policy)
    cache, last = result.past_key_values, result.sequences[:, -2:-1]
    cache.crop(-1)
    assert cache.depths.shape == (3, 6 + STEPS - 2)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    # no session here: the token runs all loops, so its logits are those of full depth behind what is kept
    again = model(last[order], past_key_values=cache, use_cache=True).logits[:, -1]
    for b, row in enumerate(order.tolist()):
        depths = result.position_depths[row].tolist()
        depths[-1] = LOOPS
        sequence = result.sequences[row, :-1].tolist()
        slow = sweep(model, sequence, lambda look, d=depths: look.loop >= d[look.position], LOOPS, policy, 6)
        close(again[b], slow.logits[-1])


# --- what has no parallel form, and other refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_policy": "mean"}, "kv_policy is 'mean'; it must be one of per_loop, last, average, first"),
        ({"kv_policy": "last", "num_beams": 2}, "'last' has no parallel form, .* use kv_policy 'per_loop'"),
        ({"kv_policy": "average", "prompt_lookup_num_tokens": 2}, "'average' has no parallel form"),
        ({"kv_policy": "first", "assistant_model": tiny_model}, "'first' has no parallel form"),
        ({"kv_policy": "last", "use_cache": False}, "use_cache is False: early exit and KV policies need the cache"),
        ({"num_loop_steps": torch.tensor([2]), "num_beams": 2}, "run at full depth"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    arguments = {k: v() if v is tiny_model else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message) as caught:
        tiny_model().generate(PROMPTS[0][None], max_new_tokens=3, **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def collapsed() -> tuple[OuroForCausalLM, LoopCache, Tensor]:
    model = tiny_model()
    result = model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.6, kv_policy="average")
    return model, result.past_key_values, result.sequences[:, -1:]


def test_a_collapsed_cache_cannot_replay_or_freeze(collapsed: tuple[OuroForCausalLM, LoopCache, Tensor]) -> None:
    model, cache, last = collapsed
    for arguments in ({"exit_depths": torch.tensor([[2]])}, {"exit_mode": "freeze", "exit_threshold": 0.5}):
        with pytest.raises(ValueError, match=r"is collapsed \(kv_policy 'average'\); .*: use kv_policy 'per_loop'"):
            model(last, past_key_values=cache, use_cache=True, **arguments)
    with pytest.raises(ValueError, match="no parallel form: it takes one new token at a time, not 2"):
        model(last.expand(1, 2), past_key_values=cache, exit_depths=torch.tensor([[2, 2]]))


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_a_collapsed_cache_keeps_its_policy(collapsed: tuple[OuroForCausalLM, LoopCache, Tensor], policy: str) -> None:
    model, cache, last = collapsed
    text = torch.cat([tokens(1, cache.get_seq_length()), last], dim=1)
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=rf"is collapsed under 'average'; kv_policy '{policy}' needs an empty one"):
        model.generate(text, **FULL, kv_policy=policy, past_key_values=cache)
    assert cache.get_seq_length() == length, "refused before anything ran"


@pytest.mark.parametrize("rule", [Confidence("kl", 0.8), Confidence("entropy", 2.4)])
def test_reading_the_coda_has_no_parallel_form(rule: ExitRule) -> None:
    """A read-out after loop t sees the exits of the positions before, which one pass does not know yet."""
    model = tiny_model(num_coda_layers=1)
    with pytest.raises(ValueError, match=r"Confidence reads the coda's output, .* use prefill='full'"):
        model.generate(PROMPTS[0][None], **FULL, exit_rule=rule, prefill="adaptive")
    with pytest.raises(ValueError, match="Confidence reads the coda's output"):
        model(PROMPTS[0][None], exit_rule=rule, exit_mode="freeze")
    model.generate(PROMPTS[2][None], **FULL, exit_rule=rule, prefill="adaptive")  # one position is decoding
    model.generate(PROMPTS[0][None], **FULL, exit_threshold=0.5, prefill="adaptive")

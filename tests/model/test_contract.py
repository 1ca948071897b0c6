"""The depth-exact contract on drawn configurations: `generate` and the parallel replay against the slow oracle."""

from typing import Any

import pytest
import torch
from checks import FULL, LOOPS, RULES, check_rows, close, left_padded, limited, q_exit
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tokens

from looplm.exits import Confidence, QExit
from looplm.model.cache import KV_POLICIES

pytestmark = pytest.mark.filterwarnings("ignore:running . loops")


def per_row(draw: st.DataObject, name: str, batch: int, low: list[int], high: list[int]) -> list[int]:
    """One number a row, all the same in half of the cases."""
    if draw.draw(st.booleans(), label=f"{name} uniform"):
        return [draw.draw(st.integers(max(low), min(high)), label=name)] * batch
    return [draw.draw(st.integers(a, b), label=name) for a, b in zip(low, high, strict=True)]


def argument(values: list[int]) -> int | torch.Tensor:
    return values[0] if len(set(values)) == 1 else torch.tensor(values)


def drawn_fields(draw: st.DataObject) -> dict[str, Any]:
    heads = draw.draw(st.sampled_from([1, 2, 4]), label="heads")
    return {
        "num_hidden_layers": draw.draw(st.integers(1, 2), label="layers"),
        "total_ut_steps": draw.draw(st.sampled_from([3, 4, 2, 1]), label="loops"),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.draw(st.sampled_from([h for h in (1, 2, 4) if heads % h == 0]), label="kv heads"),
        "num_prelude_layers": draw.draw(st.integers(0, 1), label="prelude"),
        "num_coda_layers": draw.draw(st.integers(0, 1), label="coda"),
        "input_injection": draw.draw(st.sampled_from(["none", "add"]), label="injection"),
        "attn_implementation": draw.draw(st.sampled_from(["sdpa", "eager"]), label="attention"),
    }


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_generation_and_replay_equal_the_oracle(draw: st.DataObject) -> None:
    fields = drawn_fields(draw)
    model = tiny_model(draw.draw(st.integers(0, 5), label="seed"), **fields)
    policy = draw.draw(st.sampled_from(["per_loop", *KV_POLICIES]), label="policy")
    prefill = draw.draw(st.sampled_from(["full", "adaptive"]), label="prefill")
    name = draw.draw(st.sampled_from(["drawn q", *RULES, "none"]), label="rule")
    q = draw.draw(st.sampled_from([0.2, 0.5, 0.9, 1.0]), label="q")
    rule, criterion = {**RULES, "drawn q": (QExit(q), q_exit(q if q < 1 else 2)), "none": (None, None)}[name]
    if rule is None or (fields["num_coda_layers"] and isinstance(rule, Confidence)):
        prefill = "full"  # the others are refused
    lengths = draw.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="prompts")
    prompts, batch = [tokens(length, seed=b) for b, length in enumerate(lengths)], len(lengths)
    most = per_row(draw, "max_loops", batch, [1] * batch, [fields["total_ut_steps"] + 1] * batch)
    least = per_row(draw, "min_loops", batch, [1] * batch, most)
    limits = {"min_loops": argument(least), "max_loops": argument(most), "max_new_tokens": 4}
    chunk = {"prefill_chunk_size": draw.draw(st.sampled_from([1, 2, 3]), label="chunk")} if batch > 1 else {}

    options = {"exit_rule": rule, "kv_policy": policy, "prefill": prefill}
    result = model.generate(**left_padded(prompts), **{**FULL, **limits, **chunk}, **options)
    stops = [limited(criterion, low) if criterion else (lambda _: False) for low in least]
    check_rows(model, result, prompts, stops, most, policy, prefill, least)
    if policy == "per_loop":
        ids, width = result.sequences[:, :-1], max(lengths)
        mask = torch.nn.functional.pad(left_padded(prompts)["attention_mask"], (0, ids.shape[1] - width), value=1)
        replay = model(
            ids, attention_mask=mask, exit_depths=result.position_depths, num_loop_steps=max(most), use_cache=False
        )
        close(replay.logits[:, width - 1 :].detach(), torch.stack(result.logits, dim=1))


def test_the_oracle_tells_the_policies_apart() -> None:
    """What the tests above compare with differs by policy: no policy is the other by accident."""
    found = {}
    prompts = [tokens(5, seed=1)]
    for policy in KV_POLICIES:
        result = tiny_model().generate(**left_padded(prompts), **FULL, exit_threshold=0.6, kv_policy=policy)
        found[policy] = result.logits[-1]
        assert 1 < len(result.exit_depths.unique()) <= LOOPS
    assert len({tuple(logits[0].tolist()) for logits in found.values()}) == len(KV_POLICIES)

"""What the tests of generation share: prompts, the exit rules in plain Python, and rows against the oracle."""

import math
from collections.abc import Callable
from typing import Any

import torch
from oracle import Look, Slow, Stop, slow_generate
from tiny import VARIANTS, tokens
from torch import Tensor

from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, SampledExit, StateDifference, keyed_uniform
from looplm.model.modeling import OuroForCausalLM

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
    model: OuroForCausalLM,
    result: Any,
    prompts: list[Tensor],
    stops: list[Stop],
    max_loops: int | list[int] = LOOPS,
    policy: str = "per_loop",
    prefill: str = "full",
    min_loops: list[int] | None = None,
) -> None:
    """Tokens, logits, depths and, given `min_loops`, exit probabilities of every row against the oracle."""
    logits, width = torch.stack(result.logits, dim=1), max(map(len, prompts))
    steps = logits.shape[1]
    for b, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
        most = max_loops if isinstance(max_loops, int) else max_loops[b]
        slow = slow_generate(model, prompt.tolist(), steps, stop, most, policy, prefill)
        assert result.sequences[b, -steps:].tolist() == slow.tokens
        assert result.exit_depths[b].tolist() == slow.depths
        padding = [0] * (width - len(prompt))
        assert result.position_depths[b].tolist() == padding + slow.position_depths
        close(logits[b], slow.logits)
        if min_loops is not None:
            check_probabilities(result, b, slow, min_loops[b], most, prefill)


def check_probabilities(result: Any, b: int, slow: Slow, min_loops: int, max_loops: int, prefill: str) -> None:
    """p_t up to the exit and NaN beyond, and the survival; a full-depth prompt is read at T whatever its gates say."""
    steps = result.exit_depths.shape[1]
    first = len(slow.position_depths) - steps
    for step in range(0 if prefill == "adaptive" else 1, steps):
        p, survival = slow.probabilities(first + step, min_loops, max_loops)
        found = result.exit_probabilities[b, step]
        torch.testing.assert_close(found[: len(p)].float(), torch.tensor(p), rtol=1e-4, atol=1e-6)
        assert found[len(p) :].isnan().all()
        assert math.isclose(float(result.survival[b, step]), survival, rel_tol=1e-4, abs_tol=1e-6)

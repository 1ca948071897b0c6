"""Log-probabilities under KV policies that have no parallel form: the target is generated, each token forced.

Ouro Table 14. Under `last` and `average` a query in loop 1 needs the last loop of the token before, so a text can only
be scored as it would be generated: the prompt in one pass, its keys collapsed, then one token after the other. The
numbers are those of `generate` itself; the target decides what it goes on with.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from looplm.evaluation.depths import Depth
from looplm.evaluation.scoring import Request, Scored
from looplm.model.cache import KVPolicy
from looplm.model.modeling import OuroForCausalLM

_NEVER = -1
"""An end token that no text holds: every row goes on to the end of the longest target."""


class Forced(LogitsProcessor):
    """Leaves one token to choose, that of the target, and keeps what the model thought of it.

    Args:
        targets: (B, N), what is to be generated; start: tokens before it.

    Attributes:
        log_probabilities, greedy: N tensors (B,), of each target, and whether it was the likeliest.
    """

    def __init__(self, targets: Tensor, start: int) -> None:
        self.targets, self.start = targets, start
        self.log_probabilities: list[Tensor] = []
        self.greedy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Read the logits (B, V) of the next token, and force it."""
        wanted = self.targets[:, input_ids.shape[1] - self.start]
        wide = scores if scores.dtype == torch.float64 else scores.float()
        self.log_probabilities.append(wide.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
        self.greedy.append(scores.argmax(-1) == wanted)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


@torch.no_grad()
def score_forced(
    model: OuroForCausalLM,
    requests: Sequence[Request],
    depths: Sequence[Depth],
    kv_policy: KVPolicy,
    *,
    batch_size: int,
    done: Collection[int] = (),
) -> Iterator[dict[int, Scored]]:
    """As `looplm.evaluation.scoring.score_batches`, under a KV policy; one run for each depth.

    Raises:
        ValueError: a rule that selects; more tokens than the context holds.
        FloatingPointError: logits or a gate that are not finite.
    """
    for depth in depths:
        if depth.rule is not None and depth.mode == "select":
            raise ValueError(f"kv_policy {kv_policy!r} scores as it generates, so exits freeze: use exit mode freeze")
    order = sorted(range(len(requests)), key=lambda n: (-len(requests[n][0]) - len(requests[n][1]), n))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        if all(place in done for place in places):
            continue
        part = [requests[place] for place in places]
        readings = [_run(model, part, depth, kv_policy) for depth in depths]
        yield {place: _scored(part[row], row, readings) for row, place in enumerate(places)}


def _run(
    model: OuroForCausalLM, requests: Sequence[Request], depth: Depth, kv_policy: KVPolicy
) -> tuple[Tensor, Tensor, Any]:
    """Log-probabilities and matches (B, N), and the result of the generation."""
    width, most = max(len(context) for context, _ in requests), max(len(target) for _, target in requests)
    device = model.device
    ids = torch.tensor([[0] * (width - len(context)) + context for context, _ in requests], device=device)
    mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context, _ in requests], device=device)
    targets = torch.tensor([target + [0] * (most - len(target)) for _, target in requests], device=device)
    forced = Forced(targets, width)
    depths: dict[str, Any] = {"adaptive_loop": False, "num_loop_steps": depth.loops}
    if depth.rule is not None:
        depths = {"exit_rule": depth.rule, "max_loops": depth.loops, "prefill": depth.prefill}
    quiet = logging.getLogger("transformers.generation.utils")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of the end token that never comes
    result = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=_NEVER,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([forced]),
        return_dict_in_generate=True,
        kv_policy=kv_policy,
        **depths,
    )
    quiet.setLevel(level)
    failed = [error for error in result.errors if error]
    if failed:
        raise FloatingPointError(failed[0])
    return torch.stack(forced.log_probabilities, 1), torch.stack(forced.greedy, 1), result


def _scored(request: Request, row: int, readings: Sequence[tuple[Tensor, Tensor, Any]]) -> Scored:
    """One row at every depth; the last target token is read, but not run."""
    context, target = request
    count, positions = len(target), len(context) + len(target) - 1
    start = readings[0][2].position_depths.shape[1] - (readings[0][0].shape[1] - 1)
    run = [result.position_depths[row, start - len(context) : start + count - 1].sum() for _, _, result in readings]
    return Scored(
        torch.stack([log_p[row, :count] for log_p, _, _ in readings]).cpu(),
        torch.stack([match[row, :count] for _, match, _ in readings]).cpu(),
        torch.stack([result.exit_depths[row, :count] for _, _, result in readings]).cpu(),
        torch.stack(run).cpu(),
        positions,
    )

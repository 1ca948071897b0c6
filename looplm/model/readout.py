"""One pass kept loop by loop, and what the head reads of it (logit lens): what tracing and patching are made of.

Ouro section 3.1: every loop's state can be read by the same head, so the lens is the model's own p^(t), not an
approximation. With coda layers a loop's read-out runs the coda. No function holds the logits of all loops of a text:
they are taken for a chunk of positions and one loop at a time, the softmax in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from looplm.model.context import PassContext
from looplm.model.modeling import OuroForCausalLM

CACHE_BYTES = 3 << 19
"""Log-probabilities written at a time, in bytes."""
READ_BYTES = 32 << 20
"""Log-probabilities held of one loop at a time, in bytes (two or three such buffers live at once)."""


@dataclass(frozen=True)
class LoopRun:
    """A pass at full depth, kept loop by loop; nothing here carries gradients.

    Attributes:
        start: (B, S, D), the core's input: the embeddings, behind the prelude where there is one.
        states: T tensors (B, S, D), the state after each loop, as `OuroModel.loop` returns it.
        reads: T tensors (B, S, D), what the head reads after each loop: the state, or the coda's output.
        gate_logits: (B, S, T) fp32.
        head: the model's own.
    """

    start: Tensor
    states: list[Tensor]
    reads: list[Tensor]
    gate_logits: Tensor
    head: nn.Linear

    @torch.no_grad()
    def logits(self, loop: int | None = None) -> Tensor:
        """(B, S, V) after `loop` (counted from 1), or after the last one.

        Raises:
            ValueError: a loop that was not run.
        """
        number = len(self.reads)
        if loop is not None and not 1 <= loop <= number:
            raise ValueError(f"loop is {loop}; this pass ran loops 1..{number}")
        return self.head(self.reads[number - 1 if loop is None else loop - 1])

    @torch.no_grad()
    def logit_difference(self, token: int, other: int) -> Tensor:
        """Logit of `token` less that of `other` after every loop, (B, S, T) fp32; takes no vocabulary product.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        for name, value in (("token", token), ("other", other)):
            if not 0 <= value < len(self.head.weight):
                raise ValueError(f"{name} is {value}; it must lie in 0..{len(self.head.weight) - 1}")
        direction = _wide(self.head.weight[token]) - _wide(self.head.weight[other])
        return torch.stack([_wide(read) @ direction for read in self.reads], dim=-1)

    def chunks(self) -> Iterator[slice]:
        """Slices of the flattened (B, S) whose log-probabilities fit into `READ_BYTES`."""
        rows, size = self.reads[0].shape[:2].numel(), max(READ_BYTES // (4 * len(self.head.weight)), 1)
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    @torch.no_grad()
    def log_probabilities(self, loop: int, part: slice) -> Tensor:
        """log p^(loop) at some of the flattened positions, (n, V) fp32 (fp64 for fp64 states)."""
        return _wide(self.head(self.reads[loop - 1].flatten(0, 1)[part])).log_softmax(-1)


@torch.no_grad()
def run_loops(model: OuroForCausalLM, ids: Tensor, loops: int | None = None, name: str = "ids") -> LoopRun:
    """Run `ids` (B, S) int64, without padding, through all loops in evaluation mode and keep what each one left.

    Args:
        loops: the configuration's `total_ut_steps` by default; more than that warns.
        name: what the ids are called in errors.

    Raises:
        ValueError: ids of another shape or outside the vocabulary, more positions than the context, loops below 1.
    """
    check_ids(ids, model, name)
    core, training = model.model, model.training
    model.eval()
    try:
        embedded = core.embed(ids.to(model.device), None)
        number = core.num_loops(loops)
        context = PassContext.build(core, embedded, None, None, None, False, number)
        states, gate_logits = core.run(embedded, context, number)
        assert gate_logits is not None  # nothing is cached
        reads = [core.finish(state, context) for state in states]
    finally:
        model.train(training)
    return LoopRun(context.core_input, states, reads, gate_logits, model.lm_head)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) over the last axis, in nats; rounding below 0 is cut off."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def check_ids(ids: Tensor, model: OuroForCausalLM, name: str) -> None:
    """Refuse ids that `run_loops` cannot run; raises its ValueErrors."""
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        kind = f"{tuple(ids.shape)} {ids.dtype}"
        raise ValueError(f"{name} is {kind}; it must be (B, S) token ids with at least one row and one token")
    low, high, most = int(ids.min()), int(ids.max()), model.config.vocab_size - 1
    if low < 0 or high > most:
        raise ValueError(f"{name} spans token ids {low}..{high}; they must lie in 0..{most}")
    if ids.shape[1] > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"{name} has {ids.shape[1]} tokens, but the context holds {limit}; shorten it")


def at_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target (C,), and whether it is the likeliest token, of logits (C, V).

    Only so many rows of log-probabilities exist at a time as a processor's cache holds. The likeliest token is looked
    for where the target has the largest value; of equal ones it is the first, as `argmax` has it.
    """
    size = max(CACHE_BYTES // (4 * logits.shape[1]), 1) if logits.is_cpu else len(logits)
    values, matches = [], []
    for first in range(0, len(logits), size):
        found, wanted = log_probabilities(logits[first : first + size]), targets[first : first + size]
        value = found.gather(1, wanted[:, None])[:, 0]
        match = value == found.amax(-1)
        match[match.clone()] = found[match].argmax(-1) == wanted[match]
        values.append(value)
        matches.append(match)
    return torch.cat(values), torch.cat(matches)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits (..., V), in fp32 (fp64 for fp64)."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)

"""Selecting: every loop runs, and each position's logits are read from the state at its exit.

This is what the released code does and the default of `forward`; it saves nothing. The two that stop for real are
`looplm.model.freezing` (one parallel pass) and `looplm.model.decoding` (one new token a row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from looplm.exit_tracker import ExitTracker
from looplm.exits import ExitRule, check_rows
from looplm.model.context import PassContext

if TYPE_CHECKING:
    from looplm.model.modeling import OuroForCausalLM
    from looplm.model.outputs import OuroCausalLMOutput


def add_logits(
    model: OuroForCausalLM,
    output: OuroCausalLMOutput,
    states: list[Tensor],
    rule: ExitRule | None,
    weighted: bool,
    context: PassContext,
    logits_to_keep: int | Tensor,
) -> None:
    """Read one state a position, then the head: by linearity a weighted exit is the head of the mixed state.

    Args:
        output: has the gate's numbers already; `logits` and `exit_depths` are set.
        states: T tensors (B, S, D), the state after every loop.
        rule: None reads the last loop. weighted: mix all loops instead of asking the rule.
    """
    if not model.config.num_coda_layers:  # a coda attends to every position, so it cannot be cut first
        states = [slice_logits_to_keep(state, logits_to_keep) for state in states]
    if weighted:
        read = _mixed(model, states, output.exit_probabilities, context, logits_to_keep)
    elif rule is None:
        output.exit_depths = torch.full(states[-1].shape[:2], len(states), device=states[-1].device)
        read = model.model.finish(states[-1], context)
    else:
        chosen, output.exit_depths = select(model, states, output.gate_logits, rule, context, logits_to_keep)
        read = model.model.finish(chosen, context)
    if model.config.num_coda_layers:
        read = slice_logits_to_keep(read, logits_to_keep)
    output.logits = model.lm_head(read)


def _mixed(
    model: OuroForCausalLM,
    states: list[Tensor],
    probabilities: Tensor | None,
    context: PassContext,
    logits_to_keep: int | Tensor,
) -> Tensor:
    if probabilities is None:
        raise ValueError("use_weighted_exit needs the gate: exit_gate_pooling='causal_mean' has none behind a cache")
    weights = keep(model, probabilities, logits_to_keep).unbind(-1)
    read = [model.model.finish(state, context) for state in states]
    parts = (w[..., None].to(s.dtype) * s for w, s in zip(weights, read, strict=True))
    return sum(parts, start=torch.zeros_like(read[0]))


def keep(model: OuroForCausalLM, per_position: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are asked for; all of them with a coda, which attends to every position."""
    return per_position if model.config.num_coda_layers else slice_logits_to_keep(per_position, logits_to_keep)


def select(
    model: OuroForCausalLM,
    states: list[Tensor],
    gate_logits: Tensor | None,
    rule: ExitRule,
    context: PassContext,
    logits_to_keep: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """The state of each kept position after the loop where `rule` stops it (B, S, D), and that loop (B, S)."""
    if gate_logits is None:
        raise ValueError("exit rules need the gate, and exit_gate_pooling='causal_mean' has none behind a cache")
    gates = keep(model, gate_logits, logits_to_keep)
    batch, length = gates.shape[:2]
    check_rows(rule, batch)
    rows = torch.arange(batch, device=gates.device)[:, None].expand(batch, length)
    positions = keep(model, context.positions.expand(batch, -1)[..., None], logits_to_keep)[..., 0]
    tracker = ExitTracker(rule, rows.reshape(-1), positions.reshape(-1), 1, len(states))
    for loop, state in enumerate(states, start=1):
        active = tracker.active
        if not len(active):
            break

        def read(_: Tensor, state: Tensor = state, active: Tensor = active) -> Tensor:
            return model.log_probabilities(model.model.finish(state, context).flatten(0, 1)[active])

        gate = gates[..., loop - 1].reshape(-1)[active]
        tracker.step(loop, gate, state.reshape(batch * length, -1)[active], read)
    depths = tracker.depths.view(batch, length)
    chosen = states[-1]
    for loop, state in enumerate(states[:-1], start=1):
        chosen = torch.where((depths == loop)[..., None], state, chosen)
    return chosen, depths

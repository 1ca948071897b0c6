"""Which exit rule is in force, and `select`: every loop runs, each position reads the state at its exit.

Select is what the released code does and the default of `forward`; it saves nothing. The two that stop for real are
`looplm.model.freezing` (one parallel pass) and `looplm.model.decoding` (one new token a row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from looplm.exit_tracker import ExitTracker
from looplm.exits import ExitRule, FixedDepth, QExit, check_rows
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext

if TYPE_CHECKING:
    from looplm.model.modeling import OuroForCausalLM


def rule_in_force(
    rule: ExitRule | None,
    exit_at_step: int | None,
    exit_threshold: float | Tensor | None,
    config: OuroConfig,
    num_loops: int,
) -> ExitRule | None:
    """The rule by the released precedence; None reads the last loop.

    Raises:
        ValueError: `exit_at_step` (0-based) outside the loops, a threshold outside (0, 1].
    """
    if rule is not None:
        return rule
    if exit_at_step is not None:
        if not 0 <= exit_at_step < num_loops:
            raise ValueError(f"exit_at_step is {exit_at_step}; it is 0-based and must lie in 0..{num_loops - 1}")
        return FixedDepth(exit_at_step + 1)
    threshold = config.early_exit_threshold if exit_threshold is None else exit_threshold
    return None if isinstance(threshold, int | float) and threshold == 1.0 else QExit(threshold)


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

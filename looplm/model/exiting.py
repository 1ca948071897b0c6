"""How an exit rule meets the model: `select` among loops that all ran, and `decode`, which does not run the others.

Select is what the released code does and the default of `forward`: every loop runs, each position reads at its exit.
Decode is one new token a row behind a cache: a row leaves the loop as soon as its own rule fires (Ouro section 3.2),
the batch is compacted, and under `per_loop` its keys of the loops not run are those of its exit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from looplm.exits import ExitRule, ExitTracker, FixedDepth, QExit, check_rows
from looplm.model.configuration import OuroConfig
from looplm.model.context import PassContext
from looplm.model.outputs import OuroCausalLMOutput

if TYPE_CHECKING:
    from looplm.model.generation import DepthSession
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


def decode(model: OuroForCausalLM, embedded: Tensor, context: PassContext, depth: DepthSession) -> OuroCausalLMOutput:
    """One new token a row behind the cache, each row to its own depth.

    Args:
        embedded: (B, 1, D).

    Returns:
        Logits (B, 1, V) at each row's exit; `exit_depths` (B, 1); `exit_probabilities` (B, 1, T), NaN beyond the
        exit. Keys of loops that were not run are those of the exit (policy `per_loop`).
    """
    rule, max_loops = depth.options.rule, depth.options.max_loops
    assert rule is not None
    check_rows(rule, len(embedded))
    state, whole = model.model.begin(context, embedded), context
    read, rows = torch.empty_like(state), torch.arange(len(state), device=state.device)
    positions = context.positions.expand(len(rows), 1)[:, 0]
    tracker = ExitTracker(rule, rows, positions, depth.options.min_loops, max_loops)
    for loop in range(1, max_loops + 1):
        state, gate = model.model.loop(state, context, loop)

        def look(state: Tensor, context: PassContext = context) -> Tensor:
            return model.log_probabilities(model.model.finish(state[:, None], context)[:, 0])

        stops = tracker.step(loop, gate[:, 0], state[:, 0], look)
        if stops.any():
            leaving, rows = rows[stops], rows[~stops]
            read[leaving] = state[stops]
            context.leave(loop, leaving)
            if not len(rows):
                break
            state, context = state[~stops], whole.take(rows)
    logits = model.lm_head(model.model.finish(read, whole))
    whole.advance()
    return OuroCausalLMOutput(
        logits=logits,
        past_key_values=whole.cache,
        exit_depths=tracker.depths[:, None],
        exit_probabilities=tracker.log_probabilities[:, None].exp(),
    )

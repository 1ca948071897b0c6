"""One parallel pass in which positions stop for good: exact replay, and scoring as generation does it.

After its exit a position's state is frozen, and so are the keys and values that it offers: a query in loop t sees
K_min(t, e_j)[j], which is what step-by-step generation under the KV policy `per_loop` shows it. Replaying recorded
depths therefore gives the logits of the generation, in one pass and with gradients; a rule finds the same depths by
itself, because whether a position stops after loop t depends only on what loops up to t have shown it.

Every loop runs on the positions that still loop and on no others (`looplm.model.packing`), so the cost goes with the
mean depth. A pooled gate (`causal_mean`) averages the frozen states as they stand.

With gradient checkpointing every loop pass is recomputed, and the frozen keys and values cross the checkpoint
boundary: 2 L H_kv D_h values a position and loop are kept beside the state's D. Measured on a test model with D = 32,
L = 3, H_kv = 2, D_h = 8: 134 values for the 128 of the formula, against 1432 without checkpointing. In Ouro-1.4B the
formula gives 49 D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import slice_logits_to_keep

from looplm.exit_tracker import ExitTracker
from looplm.exits import ExitRule, FixedDepth, RecordedDepth, check_rows, exit_probabilities
from looplm.model.context import PassContext
from looplm.model.outputs import OuroCausalLMOutput
from looplm.model.request import Goal, Reading, Wanted
from looplm.objectives.expected_loss import number_of_items
from looplm.objectives.token_losses import weighted_token_losses

if TYPE_CHECKING:
    from looplm.model.configuration import OuroConfig
    from looplm.model.modeling import OuroForCausalLM
    from looplm.model.stack import OuroModel


@dataclass(frozen=True)
class Frozen:
    """Each position at its exit.

    Attributes:
        state: (B, S, D) after the exit loop.
        depths: (B, S) int64.
        gate_logits: (B, S, T) fp32, NaN beyond the exit.
        exit_probabilities: (B, S, T) fp32, NaN beyond the exit.
        survival: (B, S) fp32, the probability of having gone on at the exit; 0 where it was forced.
    """

    state: Tensor
    depths: Tensor
    gate_logits: Tensor
    exit_probabilities: Tensor
    survival: Tensor


def freezing_rule(reading: Reading, config: OuroConfig, context: PassContext, num_loops: int) -> ExitRule:
    """The rule of a freezing pass: the one in force, full depth where there is none, or recorded depths.

    Raises:
        ValueError: a rule outside its range; limits or recorded depths that do not describe the pass (`check_depths`).
    """
    least = reading.min_loops
    if isinstance(least, Tensor) and least.shape != (context.batch,):
        raise ValueError(f"min_loops has shape {tuple(least.shape)}; it must be a number or ({context.batch},)")
    if reading.depths is not None:
        check_depths(reading.depths, context.batch, context.length, least, num_loops)
        return RecordedDepth(reading.depths.to(context.positions.device))
    return reading.rule_in_force(config, num_loops) or FixedDepth(num_loops)


def check_depths(depths: Tensor, batch: int, length: int, min_loops: int | Tensor, num_loops: int) -> None:
    """Refuse recorded depths that do not describe the pass.

    Raises:
        ValueError: a shape other than (B, S), a depth outside min_loops..num_loops, or a 0 between two depths (0
            stands for padding before a text and for what comes after its end).
    """
    if depths.shape != (batch, length):
        raise ValueError(f"exit_depths has shape {tuple(depths.shape)}; it must be {(batch, length)}, one a position")
    least = torch.as_tensor(min_loops, device=depths.device).reshape(-1, 1)
    ran = depths > 0
    outside = (depths < 0) | (depths > num_loops) | (ran & (depths < least))
    if depths.is_floating_point() or bool(outside.any()):
        limits = f"{min_loops}..{num_loops}"
        raise ValueError(f"exit_depths spans {depths.min()}..{depths.max()}; it must hold whole loops in {limits}")
    inside = ran.cummax(1).values & ran.flip(1).cummax(1).values.flip(1)
    if bool((inside & ~ran).any()):
        raise ValueError("exit_depths has a 0 between two depths; 0 is for padding and for positions after the end")


def freezing_pass(
    model: OuroForCausalLM,
    embedded: Tensor,
    context: PassContext,
    rule: ExitRule,
    limits: tuple[int | Tensor, int | Tensor],
    wanted: Wanted,
    goal: Goal,
) -> OuroCausalLMOutput:
    """A whole `forward` in which positions stop for good; its loss is the cross entropy at the exits.

    Args:
        embedded: (B, S, D).
        rule: as in `freeze`; limits: its min_loops and max_loops.
    """
    _check(model, context, rule, wanted, goal)
    frozen = freeze(model, embedded, context, rule, *limits)
    read = model.model.finish(frozen.state, context)
    output = OuroCausalLMOutput(
        past_key_values=context.cache,
        gate_logits=frozen.gate_logits,
        exit_probabilities=frozen.exit_probabilities,
        exit_depths=slice_logits_to_keep(frozen.depths[..., None], wanted.logits_to_keep)[..., 0],
        survival=frozen.survival,
        expected_depth=context.mean(frozen.depths.float()),
    )
    if not wanted.skip_logits:
        output.logits = model.lm_head(slice_logits_to_keep(read, wanted.logits_to_keep))
    if goal.targets is not None:
        ones = torch.ones(1, *goal.targets.shape, device=read.device)
        total, losses = weighted_token_losses([read], model.lm_head.weight, goal.targets, ones)
        output.loss, output.token_losses = total / number_of_items(goal.targets, goal.num_items), losses[0]
    context.advance(frozen.depths)
    return output


def _check(model: OuroForCausalLM, context: PassContext, rule: ExitRule, wanted: Wanted, goal: Goal) -> None:
    if model.config.exit_gate_pooling != "token" and not isinstance(rule, RecordedDepth | FixedDepth):
        raise ValueError(
            "exit_gate_pooling is 'causal_mean': a rule that freezes needs 'token'; use exit_mode='select'"
        )
    if wanted.hidden_states:
        raise ValueError("output_hidden_states is True, but a freezing pass has no state of every loop; drop it")
    if goal.targets is not None and goal.objective != "expected":
        raise ValueError(
            f"objective is {goal.objective!r}, but a freezing pass has one loss, at the exits; drop objective"
        )
    cache = context.cache
    if cache is not None and cache.policy != "per_loop":
        raise ValueError(
            f"past_key_values is collapsed (kv_policy {cache.policy!r}); positions cannot freeze behind "
            "it, because a query in loop 1 needs the last loop of the token before: use kv_policy 'per_loop'"
        )
    if cache is not None and torch.is_grad_enabled() and model.training:
        raise ValueError("use_cache is True in training, but a cache carries no gradients: pass use_cache=False")


def freeze(
    model: OuroForCausalLM,
    embedded: Tensor,
    context: PassContext,
    rule: ExitRule,
    min_loops: int | Tensor,
    max_loops: int | Tensor,
) -> Frozen:
    """Run all positions of a pass, each up to its own exit.

    Args:
        embedded: (B, S, D).
        rule: when a position stops; `RecordedDepth` replays.
        min_loops, max_loops: limits, numbers or (B,).
    """
    core, (batch, length) = model.model, embedded.shape[:2]
    check_rows(rule, batch)
    state = core.begin(context, embedded)
    rows = torch.arange(batch, device=state.device).repeat_interleave(length)
    positions = context.positions.expand(batch, length).reshape(-1)
    tracker = ExitTracker(rule, rows, positions, _spread(min_loops, rows), _spread(max_loops, rows))
    inside, kept = context, list[Tensor]()
    gates, num_loops = [], int(torch.as_tensor(max_loops).max())
    for loop in range(1, num_loops + 1):
        state, gate, *kept = _pass(core, state, inside, loop, kept)
        gates.append(gate)
        index = tracker.active

        def read(_: Tensor, state: Tensor = state, index: Tensor = index) -> Tensor:
            if core.config.num_coda_layers and length > 1:
                raise ValueError(
                    f"{type(rule).__name__} reads the coda's output, which has no parallel form (it sees the exits of "
                    "the positions before): use prefill='full', or exit_mode='select' in forward"
                )
            return model.log_probabilities(core.finish(state, context).flatten(0, 1)[index])

        tracker.step(loop, gate.flatten()[index], state.flatten(0, 1)[index], read)
        if not len(tracker.active):
            break
        inside = context.packed(tracker.active)
    context.leave(loop, None, num_loops)
    return _collect(state, gates, tracker, min_loops, max_loops)


def _pass(core: OuroModel, state: Tensor, context: PassContext, loop: int, kept: list[Tensor]) -> tuple[Tensor, ...]:
    if core.gradient_checkpointing and core.training:
        return core._gradient_checkpointing_func(_frozen_loop, core, state, context, loop, *kept)
    return _frozen_loop(core, state, context, loop, *kept)


def _frozen_loop(core: OuroModel, state: Tensor, context: PassContext, loop: int, *kept: Tensor) -> tuple[Tensor, ...]:
    """One loop with the positions past their exit frozen; what it offers goes in and out as tensors, layer by layer."""
    first = context.num_prelude_layers
    pairs = {first + n: pair for n, pair in enumerate(zip(kept[::2], kept[1::2], strict=True))}
    state, gate = core.loop(state, replace(context, kept=pairs), loop)
    return (state, gate, *(part for layer in sorted(pairs) for part in pairs[layer]))


def _spread(limit: int | Tensor, rows: Tensor) -> int | Tensor:
    return limit.to(rows.device)[rows] if isinstance(limit, Tensor) else limit


def _collect(
    state: Tensor, gates: list[Tensor], tracker: ExitTracker, min_loops: int | Tensor, max_loops: int | Tensor
) -> Frozen:
    """Shape the records; with uniform limits the probabilities are differentiable."""
    batch, length = state.shape[:2]
    depths, table = tracker.depths.view(batch, length), tracker.log_probabilities.shape[1]
    gates = gates + [torch.zeros_like(gates[0])] * (table - len(gates))
    logits = torch.stack(gates, dim=-1)
    ran = torch.arange(1, table + 1, device=state.device) <= depths[..., None]
    if isinstance(min_loops, int) and isinstance(max_loops, int):
        probabilities = exit_probabilities(logits, min_loops).masked_fill(~ran, torch.nan)
    else:
        probabilities = tracker.log_probabilities.exp().view(batch, length, table)
    survival = tracker.log_survival.exp().view(batch, length)
    return Frozen(state, depths, logits.masked_fill(~ran, torch.nan), probabilities, survival)

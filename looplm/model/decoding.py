"""One new token a row behind the cache: a row leaves the loop as soon as its own rule fires, the others go on.

This is where early exit saves (Ouro section 3.2; the released code runs every loop): the batch is compacted, not
masked, so the layers are called on the rows that still loop and on no others. Rows that have ended are not run at all.
A row whose gate or logits are not finite is ended with an error of its own; rows do not mix, so no other is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from looplm.exit_tracker import ExitTracker
from looplm.exits import check_rows
from looplm.model.context import PassContext
from looplm.model.outputs import OuroCausalLMOutput

if TYPE_CHECKING:
    from looplm.model.depth import DepthSession
    from looplm.model.modeling import OuroForCausalLM


def decode(model: OuroForCausalLM, embedded: Tensor, context: PassContext, session: DepthSession) -> OuroCausalLMOutput:
    """One new token a row, each row to its own depth.

    Args:
        embedded: (B, 1, D).
        context: of the whole batch.
        session: the options, the rows that have ended, and where errors go.

    Returns:
        Logits (B, 1, V) at each row's exit, zeros for ended rows; `exit_depths` (B, 1), 0 for ended rows;
        `exit_probabilities` (B, 1, T), NaN beyond the exit; `survival` (B, 1).
    """
    options, running = session.options, session.running(len(embedded), embedded.device)
    rule = session.rule()
    check_rows(rule, len(embedded))
    whole = context
    if not bool(running.all()):
        embedded, context = embedded[running], context.take(running)
    rows = running.nonzero()[:, 0]
    live, state = context, model.model.begin(context, embedded)
    read, places = torch.empty_like(state), torch.arange(len(rows), device=rows.device)
    positions = whole.positions.expand(len(running), 1)[rows, 0]
    least, most = session.limits(rows)
    tracker = ExitTracker(rule, rows, positions, least, most, options.num_loops)
    finite = torch.ones_like(places, dtype=torch.bool)
    for loop in range(1, options.num_loops + 1):
        if not len(places):
            break
        state, gate = model.model.loop(state, context, loop)
        finite[places] &= gate[:, 0].isfinite()

        def look(state: Tensor, context: PassContext = context) -> Tensor:
            return model.log_probabilities(model.model.finish(state[:, None], context)[:, 0])

        stops = tracker.step(loop, gate[:, 0], state[:, 0], look)
        if stops.any():
            leaving = places[stops]
            read[leaving] = state[stops]
            whole.leave(loop, rows[leaving] if len(leaving) < len(running) else None, options.num_loops)
            places, state = places[~stops], state[~stops]
            context = context.take(~stops) if len(places) else context
    logits = (
        model.lm_head(model.model.finish(read, live)) if len(rows) else read.new_zeros(0, 1, model.config.vocab_size)
    )
    depths = _widen(tracker.depths[:, None], running, 0)
    output = OuroCausalLMOutput(
        logits=_widen(logits, running, 0.0),
        past_key_values=whole.cache,
        exit_probabilities=_widen(tracker.log_probabilities[:, None].exp(), running, torch.nan),
        exit_depths=depths,
        survival=_widen(tracker.log_survival[:, None].exp(), running, torch.nan),
    )
    session.guard(output, whole, _widen(finite, running, True))
    whole.advance(depths)
    return output


def _widen(values: Tensor, running: Tensor, fill: float) -> Tensor:
    """Rows of those that run back in their places among all; `fill` for the others."""
    if len(values) == len(running):
        return values
    wide = values.new_full((len(running), *values.shape[1:]), fill)
    wide[running] = values
    return wide

"""Runs an exit rule loop by loop over many positions, and records where each one stopped and with what probability.

One tracker serves every path that has depth: selecting among loops that all ran, freezing in one parallel pass, and
decoding, where positions that stopped are no longer computed (Ouro section 3.2; limits as in `looplm.exits`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from looplm.exits import ExitRule, LoopView


@dataclass
class ExitTracker:
    """Carries one rule through the loops for N positions and records what happened.

    The caller runs a loop for `active` positions, calls `step`, and goes on with those that are left. All rules see
    the hazards with the depth limits applied; the limits are numbers, or (N,) with one a position. `num_loops` is T,
    where no position here may go that far.

    Attributes after the last step: `depths` (N,) int64; `log_probabilities` (N, T) fp32, log p_t up to the
    exit and NaN beyond it; `log_survival` (N,) fp32, log S at the exit (-inf where the exit was forced).
    """

    rule: ExitRule
    rows: Tensor
    positions: Tensor
    min_loops: int | Tensor
    max_loops: int | Tensor
    num_loops: int | None = None
    active: Tensor = field(init=False)
    depths: Tensor = field(init=False)
    log_probabilities: Tensor = field(init=False)
    log_survival: Tensor = field(init=False)
    _previous_state: Tensor | None = field(default=None, init=False)
    _previous_read: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        n, device = self.rows.shape[0], self.rows.device
        self._least = torch.as_tensor(self.min_loops, device=device).expand(n)
        self._most = torch.as_tensor(self.max_loops, device=device).expand(n)
        if bool(((self._least < 1) | (self._least > self._most)).any()):
            raise ValueError(f"min_loops is {self.min_loops}; it must lie in 1..max_loops = {self.max_loops}")
        table = self.num_loops or int(self._most.max())
        self.active = torch.arange(n, device=device)
        self.depths = torch.zeros(n, dtype=torch.int64, device=device)
        self.log_probabilities = torch.full((n, table), math.nan, device=device)
        self.log_survival = torch.zeros(n, device=device)

    def enter(self, places: Tensor, positions: Tensor, min_loops: Tensor, max_loops: Tensor) -> None:
        """Start anew at some places that are not active, (n,) int64 each: they join behind those that are.

        What they did in an earlier loop is NaN to the rules that compare loops, which cannot fire on it.
        """
        self.positions[places], self._least[places], self._most[places] = positions, min_loops, max_loops
        self.depths[places], self.log_probabilities[places], self.log_survival[places] = 0, math.nan, 0.0
        self.active = torch.cat((self.active, places))
        self._previous_state = _with_nan(self._previous_state, len(places))
        self._previous_read = _with_nan(self._previous_read, len(places))

    def step(self, loop: int | Tensor, gate_logit: Tensor, state: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
        """Judge the active positions after a loop.

        Args:
            loop: 1..max_loops; a number, or (A,) with one a position.
            gate_logit: (A,) for the A active positions.
            state: (A, D).
            read: maps (A, D) states to (A, V) log-probabilities; called at most once.

        Returns:
            (A,) bool, True where a position stops here; `active` has already dropped those.
        """
        least, most = self._least[self.active], self._most[self.active]
        early, stops = loop < least, loop >= most
        view = self._view(loop, gate_logit.detach(), early, stops, state.detach(), read)
        # one loop ahead: at min_loops, rules that compare loops have a predecessor
        if not bool(stops.all()) and bool((loop >= least - 1).any()):
            stops = stops | (self.rule(view) & ~early)
        self._previous_state, self._previous_read = view.state, self._read
        if bool(stops.any()):
            self.depths[self.active[stops]] = loop if isinstance(loop, int) else loop[stops]
            self.drop(stops)
        return stops

    def drop(self, gone: Tensor) -> None:
        """Forget some of the active positions, (A,) bool: they go no further, and nothing more is recorded of them."""
        stays = ~gone
        self.active = self.active[stays]
        self._previous_state = None if self._previous_state is None else self._previous_state[stays]
        self._previous_read = None if self._previous_read is None else self._previous_read[stays]

    def _view(
        self,
        loop: int | Tensor,
        gate_logit: Tensor,
        early: Tensor,
        last: Tensor,
        state: Tensor,
        read: Callable[[Tensor], Tensor],
    ) -> LoopView:
        logit = gate_logit.float()
        log_exit = logsigmoid(logit).masked_fill(early, -math.inf).masked_fill(last, 0.0)
        log_stay = logsigmoid(-logit).masked_fill(early, 0.0).masked_fill(last, -math.inf)
        before = self.log_survival[self.active]
        self.log_probabilities[self.active, loop - 1] = log_exit + before
        self.log_survival[self.active] = before + log_stay
        self._read = None

        def log_probabilities() -> Tensor:
            if self._read is None:
                self._read = read(state)
            return self._read

        return LoopView(
            loop=loop,
            log_hazard=log_exit,
            log_survival=before + log_stay,
            state=state,
            previous_state=self._previous_state,
            log_probabilities=log_probabilities,
            previous_log_probabilities=self._previous_read,
            rows=self.rows[self.active],
            positions=self.positions[self.active],
            index=self.active,
        )


def _with_nan(rows: Tensor | None, count: int) -> Tensor | None:
    """(A, ...) with `count` more rows of NaN."""
    return rows if rows is None else torch.cat((rows, rows.new_full((count, *rows.shape[1:]), math.nan)))

"""One exit rule for many requests: each row is judged by its own.

The rules are those of `looplm.exits`, unchanged. Requests whose rules differ only in their numbers (thresholds, seeds)
become one rule with a number a row; rules of different kinds each judge their own members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from looplm.exits import Confidence, ExitRule, FixedDepth, LoopView, QExit, SampledExit, StateDifference

_NUMBERED = (Confidence, FixedDepth, QExit, SampledExit, StateDifference)
"""Rules that take a number a row."""


@dataclass(frozen=True)
class Each:
    """Several rules, each for the members (R,) bool of a pass's rows that it is to judge."""

    parts: tuple[tuple[ExitRule, Tensor], ...]

    def __call__(self, view: LoopView) -> Tensor:
        """(A,) bool for the positions still looping."""
        stops = torch.zeros_like(view.rows, dtype=torch.bool)
        for rule, members in self.parts:
            mine = members[view.rows]
            if bool(mine.any()):
                stops[mine] = rule(_narrow(view, mine))
        return stops


@dataclass(frozen=True)
class LoopByLoop:
    """A rule of the user's own, which expects positions of one loop at a time."""

    rule: ExitRule

    def __call__(self, view: LoopView) -> Tensor:
        """(A,) bool for the positions still looping."""
        if isinstance(view.loop, int):
            return self.rule(view)
        stops = torch.zeros_like(view.rows, dtype=torch.bool)
        for loop in view.loop.unique().tolist():
            mine = view.loop == loop
            own = replace(_narrow(view, mine), loop=loop)
            if loop == 1:
                own = replace(own, previous_state=None, previous_log_probabilities=None)
            stops[mine] = self.rule(own)
        return stops


@dataclass(frozen=True)
class Replayed:
    """Positions whose depth is known (`depths` (N,), 0 elsewhere) stop there; the others are judged by `otherwise`."""

    depths: Tensor
    otherwise: ExitRule

    def __call__(self, view: LoopView) -> Tensor:
        """(A,) bool for the positions still looping."""
        depths = self.depths[view.index]
        known = depths > 0
        return (
            depths <= view.loop if bool(known.all()) else torch.where(known, depths <= view.loop, self.otherwise(view))
        )


def merge(rules: Sequence[ExitRule], device: torch.device) -> ExitRule:
    """The rule of a pass whose row i is judged by `rules[i]`, which hold single numbers."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for row, rule in enumerate(rules):
        kinds.setdefault(_kind(rule), []).append(row)
    if len(kinds) == 1:
        return _stack(rules, range(len(rules)))
    parts = []
    for rows in kinds.values():
        members = torch.zeros(len(rules), dtype=torch.bool, device=device)
        members[rows] = True
        parts.append((_stack(rules, rows), members))
    return Each(tuple(parts))


def _kind(rule: ExitRule) -> tuple[object, ...]:
    """What rules must share to be judged at once."""
    if isinstance(rule, Confidence):
        return Confidence, rule.measure
    return (type(rule),) if isinstance(rule, _NUMBERED) else (id(rule),)


def _stack(rules: Sequence[ExitRule], rows: Sequence[int]) -> ExitRule:
    """The rules of `rows`, all of a kind, as one; other rows hold a number that is never asked for."""
    if not isinstance(rules[rows[0]], _NUMBERED):
        return LoopByLoop(rules[rows[0]])
    first: Any = rules[rows[0]]
    if all(rules[row] is first or rules[row] == first for row in rows):
        return first
    changed = {}
    for field in fields(first):
        values = [getattr(first, field.name)] * len(rules)
        for row in rows:
            values[row] = getattr(rules[row], field.name)
        if not isinstance(values[0], str):
            whole = all(isinstance(value, int) for value in values)
            changed[field.name] = torch.tensor(values, dtype=torch.int64 if whole else torch.float64)
    return replace(first, **changed)


def _narrow(view: LoopView, mine: Tensor) -> LoopView:
    previous_state, previous_read = view.previous_state, view.previous_log_probabilities
    return replace(
        view,
        loop=view.loop if isinstance(view.loop, int) else view.loop[mine],
        log_hazard=view.log_hazard[mine],
        log_survival=view.log_survival[mine],
        state=view.state[mine],
        previous_state=None if previous_state is None else previous_state[mine],
        log_probabilities=lambda: view.log_probabilities()[mine],
        previous_log_probabilities=None if previous_read is None else previous_read[mine],
        rows=view.rows[mine],
        positions=view.positions[mine],
        index=view.index[mine],
    )

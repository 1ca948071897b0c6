"""The new tokens in flight: one a sequence, each between two loops of its own.

All of them are judged at once after a tick, by one rule with a number a row and one `ExitTracker` whose places are the
slots of the pool: the rules, limits and records are those of `generate`. Rows that leave are taken out and the state is
compacted; newcomers join behind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from looplm.engine.adapters import Adaptation
from looplm.engine.kv_pool import KVPool
from looplm.engine.paged_pass import PagedPass
from looplm.engine.prefill import Look
from looplm.engine.rules import merge
from looplm.engine.sequence import Sequence
from looplm.exit_tracker import ExitTracker
from looplm.exits import ExitRule
from looplm.model.stack import OuroModel


class Note(NamedTuple):
    """A sequence whose position has left its loops.

    `log_probabilities` are log p_1 .. log p_depth, `log_survival` log S at the exit; `finite` says whether all gate
    logits were.
    """

    sequence: Sequence
    depth: int
    log_probabilities: list[float]
    log_survival: float
    finite: bool = True


class Flight:
    """R sequences with one new token each.

    Attributes:
        sequences: in the order of the rows.
        state: (R, D) after `loops` (R,) loops; `core_input` (R, D) what went into the first.
        finite: (R,) bool, whether all gate logits so far were finite.
        tracker: its places are the pool's slots, `slots` (R,) those in flight and `positions` (R,) theirs.
    """

    def __init__(self, core: OuroModel, pool: KVPool) -> None:
        self._core, self._pool = core, pool
        weight, rows = core.embed_tokens.weight, len(pool.tables)
        self.sequences: list[Sequence] = []
        self.state = self.core_input = weight.new_empty(0, weight.shape[1])
        self.loops = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self.finite = self.loops > 0
        self._rules: dict[int | None, ExitRule] = {}
        every = torch.arange(rows, device=weight.device)
        least, most = torch.ones_like(every), torch.full_like(every, pool.num_loops)
        # no rule is asked while nothing is in flight, and `start` sets it
        self.tracker = ExitTracker(lambda view: view.rows < 0, every, every.clone(), least, most, pool.num_loops)
        self.tracker.active = every[:0]

    @property
    def slots(self) -> Tensor:
        """(R,) int64."""
        return self.tracker.active

    @property
    def positions(self) -> Tensor:
        """(R,) int64."""
        return self.tracker.positions[self.tracker.active]

    def start(self, sequences: list[Sequence]) -> None:
        """Send the newest token of each into loop 1, behind the prelude where there is one."""
        core, device = self._core, self.loops.device
        numbers = [(s.new[-1], s.slot, s.filled, s.options.min_loops, s.loops) for s in sequences]
        ids, slots, positions, least, most = torch.tensor(numbers, device=device).unbind(1)
        state = core.embed_tokens(ids)
        if core.config.num_prelude_layers:
            ones = torch.ones_like(slots)
            context = PagedPass.over(core, self._pool, slots, ones, positions[:, None])
            context.adaptation = Adaptation.of([s.adapter for s in sequences], device)
            state = core.begin(context, state[:, None])[:, 0]
        self.sequences = self.sequences + sequences
        self.state, self.core_input = torch.cat((self.state, state)), torch.cat((self.core_input, state))
        self.loops = torch.cat((self.loops, torch.zeros_like(slots)))
        self.finite = torch.cat((self.finite, slots >= 0))
        self.tracker.enter(slots, positions, least, most)
        self._judge_by_rules_of(sequences)

    def _judge_by_rules_of(self, starting: list[Sequence]) -> None:
        """See to it that the tracker's rule holds those of all sequences, one a slot.

        Most sequences bring the same rule for every token. Slots that are not in flight may hold any.
        """
        rules = {s.slot: s.rule() for s in starting}
        if all(slot in self._rules and self._rules[slot] == rule for slot, rule in rules.items()):
            return
        known = {**self._rules, **rules}
        self._rules = {s.slot: known[s.slot] for s in self.sequences}
        some = next(iter(rules.values()))
        by_slot = [self._rules.get(slot, some) for slot in range(len(self._pool.tables))]
        self.tracker.rule = merge(by_slot, self.loops.device)

    def advance(self, state: Tensor, gate: Tensor, look: Look) -> tuple[Tensor, list[Note]]:
        """A loop was run: (R, D) and gate logits (R,).

        Returns:
            (R,) bool, the rows that leave, and what is noted of them; see `keep`.
        """
        self.loops, self.state, self.finite = self.loops + 1, state, self.finite & gate.isfinite()
        slots = self.slots
        stops = self.tracker.step(self.loops, gate, state, look)
        rows = stops.nonzero()[:, 0]
        if not len(rows):
            return stops, []
        left, tracker = slots[rows], self.tracker
        columns = self.loops[rows], tracker.log_probabilities[left], tracker.log_survival[left], self.finite[rows]
        numbers = zip(rows.tolist(), *(column.tolist() for column in columns), strict=True)
        return stops, [
            Note(self.sequences[row], depth, record[:depth], survival, finite)
            for row, depth, record, survival, finite in numbers
        ]

    def keep(self, stays: Tensor) -> None:
        """Go on with some rows, (R,) bool; the tracker knows."""
        self.sequences = [s for s, stay in zip(self.sequences, stays.tolist(), strict=True) if stay]
        self.state, self.core_input = self.state[stays], self.core_input[stays]
        self.loops, self.finite = self.loops[stays], self.finite[stays]

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out in mid-flight."""
        gone = torch.tensor([s is sequence for s in self.sequences], device=self.loops.device)
        self.tracker.drop(gone)
        self.keep(~gone)

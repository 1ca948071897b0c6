"""The one that calls the model: a tick is one pass of the stack over all new tokens in flight, and one over the chunks.

Rows at different loops share the pass, because every loop has the same weights (Ouro section 3.1): `OuroModel.loop` is
called once for all of them, and each row's loop only decides which pages it reads. Rows whose rule fires leave, their
keys are put where deeper loops look for them, and one product with the head reads them all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from looplm.engine.adapters import Adaptation
from looplm.engine.cohorts import Chunk, Cohort, Prefill
from looplm.engine.kv_pool import KVPool
from looplm.engine.paged_pass import PagedPass
from looplm.engine.sampling import best_tokens
from looplm.engine.sequence import Read, Sequence
from looplm.exit_tracker import ExitTracker
from looplm.model.modeling import OuroForCausalLM


class Runner:
    """What is in flight, and the passes over it.

    Attributes:
        cohorts: new tokens in flight, one cohort a loop at most; `prefill` the chunks in flight.
        model_seconds: spent in the model's passes and read-outs.
        row_passes: loops x rows of new tokens run so far.
    """

    def __init__(self, model: OuroForCausalLM, pool: KVPool) -> None:
        self.model, self.pool = model, pool
        self.cohorts: list[Cohort] = []
        self.prefill: Prefill | None = None
        self.model_seconds, self.row_passes = 0.0, 0

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences with a new token in flight, in the order of the pass."""
        return [sequence for cohort in self.cohorts for sequence in cohort.sequences]

    @property
    def chunked(self) -> list[Sequence]:
        """Sequences with a chunk in flight."""
        return [] if self.prefill is None else [chunk.sequence for chunk in self._live(self.prefill)]

    def start(self, sequences: list[Sequence]) -> None:
        """Send the newest token of each into loop 1."""
        self.cohorts.append(Cohort.start(self.model.model, self.pool, sequences))

    def start_prefill(self, chunks: list[Chunk]) -> None:
        """Send chunks into loop 1."""
        self.prefill = Prefill.start(self.model.model, self.pool, chunks)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out of flight, whatever it is doing."""
        for cohort in self.cohorts:
            if sequence in cohort.sequences:
                cohort.drop(sequence)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.sequences]
        if sequence in self.chunked:
            assert self.prefill is not None
            self.prefill.drop(sequence)
            self.prefill = self.prefill if self.chunked else None

    def abandon_decoding(self) -> None:
        """After a pass that failed: forget the new tokens in flight."""
        self.cohorts = []

    def abandon_prefill(self) -> None:
        """After a pass that failed: forget the chunks in flight."""
        self.prefill = None

    def decode(self) -> list[Read]:
        """One pass over all new tokens in flight; gives those that exit."""
        if not self.cohorts:
            return []
        core = self.model.model
        numbers = [(s.slot, cohort.loop + 1, s.filled) for cohort in self.cohorts for s in cohort.sequences]
        slots, loops, positions = torch.tensor(numbers, device=self.pool.tables.device).unbind(1)
        places = positions[:, None]
        context = PagedPass.over(core, self.pool, slots, loops, places, places >= 0)
        context.adaptation = Adaptation.of([s.adapter for s in self.decoding], slots.device)
        if core.config.input_injection == "add":  # nothing is added before loop 1
            inputs = [c.core_input if c.loop else torch.zeros_like(c.core_input) for c in self.cohorts]
            context.core_input = torch.cat(inputs)[:, None]
        state = torch.cat([cohort.state for cohort in self.cohorts])[:, None]
        with self._timed():
            state, gate = core.loop(state, context, 2)  # any loop but the first: rows are in loops of their own
        self.row_passes += len(state)
        return self._leave(context, slots, positions, state, gate)

    def _leave(self, context: PagedPass, slots: Tensor, positions: Tensor, state: Tensor, gate: Tensor) -> list[Read]:
        """Judge every cohort after its loop, and read the rows that stop."""
        start, stopped, notes = 0, [], []
        for cohort in self.cohorts:
            part = slice(start, start + len(cohort.sequences))
            start = part.stop

            def look(state: Tensor, part: slice = part) -> Tensor:
                rows = torch.arange(part.start, part.stop, device=state.device)
                return self.model.log_probabilities(self._finish(state[:, None], context, rows)[:, 0])

            stops = cohort.advance(state[part, 0], gate[part, 0], look)
            stopped.append(stops)
            notes += _notes(cohort, stops)
        leaving = torch.cat(stopped).nonzero()[:, 0]
        for cohort, stops in zip(self.cohorts, stopped, strict=True):
            cohort.keep(~stops)
        self.cohorts = [cohort for cohort in self.cohorts if cohort.sequences]
        if not notes:
            return []
        if not self.pool.single_slot:
            depths, most = torch.tensor([(depth, s.loops) for s, depth, *_ in notes], device=slots.device).unbind(1)
            self.pool.fill(slots[leaving], positions[leaving], depths, most)
        for sequence, depth, *_ in notes:
            sequence.filled += 1
            sequence.depths.append(depth)
        return self._read(state[leaving], context, leaving, notes)

    def _read(self, state: Tensor, context: PagedPass, rows: Tensor, notes: list[Note]) -> list[Read]:
        """The head on the states (n, 1, D) of rows that have left: one product for all of them."""
        with self._timed():
            logits = self.model.lm_head(self._finish(state, context, rows))[:, 0]
        return _reads(logits, notes)

    def fill(self) -> list[Read]:
        """One pass over the chunks in flight; gives the prompts that are through."""
        group = self.prefill
        if group is None:
            return []
        context = group.pass_at(self.pool, group.loop + 1)
        context.core_input = group.core_input

        def look(state: Tensor) -> Tensor:
            if self.model.config.num_coda_layers:
                raise ValueError("a rule reads the coda's output, which has no parallel form: use prefill='full'")
            return self.model.log_probabilities(self.model.model.finish(state[:, None], context)[:, 0])

        with self._timed():
            state, gate = self.model.model.loop(group.state, context, group.loop + 1)
        group.advance(self.pool, state, gate, look)
        if not group.over:
            return []
        self.prefill = None
        return self._end_chunks(group)

    def _end_chunks(self, group: Prefill) -> list[Read]:
        """Note the depths of a group that is through, and read the last position of every prompt that ends in it."""
        live = self._live(group)
        reading = {id(c) for c in live if c.start + c.count == c.sequence.target and not c.sequence.new}
        depths, notes, rows, ends, end = group.tracker.depths.tolist(), [], [], [], 0
        for row, chunk in enumerate(group.chunks):
            end, sequence = end + chunk.count, chunk.sequence
            if row in group.dropped:
                continue
            if id(chunk) in reading:
                rows.append(row)
                ends.append(chunk.count - 1)
                notes.append((sequence, depths[end - 1], *_record(group.tracker, end - 1, depths[end - 1]), True))
            sequence.depths[chunk.start : chunk.start + chunk.count] = depths[end - chunk.count : end]
            sequence.filled, sequence.flying = chunk.start + chunk.count, False
        state = group.state
        with self._timed():
            if self.model.config.num_coda_layers:  # it leaves keys at every position
                alive = torch.tensor([r for r in range(len(group.chunks)) if r not in group.dropped])
                state = state.index_copy(0, alive, self._finish(state[alive], group.context, alive))
            if not notes:
                return []
            read = state[rows, ends][:, None]
            read = read if self.model.config.num_coda_layers else self.model.model.finish(read, group.context)
            logits = self.model.lm_head(read)[:, 0]
        return _reads(logits, notes)

    def _finish(self, state: Tensor, context: PagedPass, rows: Tensor) -> Tensor:
        """What the head reads of states (n, S, D) of some rows of a pass."""
        return self.model.model.finish(state, context.select(rows) if self.model.config.num_coda_layers else context)

    @staticmethod
    def _live(group: Prefill) -> list[Chunk]:
        return [chunk for row, chunk in enumerate(group.chunks) if row not in group.dropped]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.model_seconds += time.perf_counter() - began


Note = tuple[Sequence, int, list[float], float, bool]
"""A sequence that exits: its depth, log p_1 .. log p_depth, log S at the exit, and whether its gates were finite."""


def _notes(cohort: Cohort, stops: Tensor) -> list[Note]:
    """Of the rows of a cohort that stop, (R,) bool."""
    if not bool(stops.any()):
        return []
    places, tracker, depth = cohort.places[stops], cohort.tracker, cohort.loop
    records = tracker.log_probabilities[places, :depth].tolist()
    survival, finite = tracker.log_survival[places].tolist(), cohort.finite[stops].tolist()
    rows = stops.nonzero()[:, 0].tolist()
    return [
        (cohort.sequences[row], depth, record, last, good)
        for row, record, last, good in zip(rows, records, survival, finite, strict=True)
    ]


def _record(tracker: ExitTracker, place: int, depth: int) -> tuple[list[float], float]:
    return tracker.log_probabilities[place, :depth].tolist(), float(tracker.log_survival[place])


def _reads(logits: Tensor, notes: list[Note]) -> list[Read]:
    """Logits (n, V) with what is known of their rows."""
    wide = logits if logits.dtype == torch.float64 else logits.float()  # reductions of bf16 are slow on a CPU
    finite, best = wide.sum(-1).isfinite().tolist(), best_tokens(wide).tolist()  # NaN and infinity stay in a sum
    reads = []
    for row, (sequence, depth, record, survival, good) in enumerate(notes):
        what = "exit gate is" if not good else None if finite[row] else "logits are"
        place = len(sequence.prompt) + len(sequence.new) - 1
        error = what and f"the {what} not finite at position {place}; check the weights"
        reads.append(Read(sequence, logits[row], best[row], depth, record, survival, error))
        sequence.flying = False
    return reads

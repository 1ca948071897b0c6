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
from looplm.engine.flight import Flight, Note
from looplm.engine.kv_pool import KVPool
from looplm.engine.paged_pass import PagedPass
from looplm.engine.prefill import Chunk, Prefill
from looplm.engine.sampling import best_tokens
from looplm.engine.sequence import Read, Sequence
from looplm.exit_tracker import ExitTracker
from looplm.model.modeling import OuroForCausalLM


class Runner:
    """What is in flight, and the passes over it.

    Attributes:
        flight: the new tokens in flight; `prefill` the chunks.
        model_seconds: spent in the model's passes and read-outs.
        row_passes: loops x rows of new tokens run so far.
    """

    def __init__(self, model: OuroForCausalLM, pool: KVPool) -> None:
        self.model, self.pool = model, pool
        self.flight = Flight(model.model, pool)
        self._last: tuple[list[Sequence], PagedPass] | None = None
        self.prefill: Prefill | None = None
        self.model_seconds, self.row_passes = 0.0, 0

    @property
    def decoding(self) -> list[Sequence]:
        """Sequences with a new token in flight, in the order of the pass."""
        return self.flight.sequences

    @property
    def chunked(self) -> list[Sequence]:
        """Sequences with a chunk in flight."""
        return [] if self.prefill is None else [chunk.sequence for chunk in self._live(self.prefill)]

    def start(self, sequences: list[Sequence]) -> None:
        """Send the newest token of each into loop 1."""
        self.flight.start(sequences)

    def start_prefill(self, chunks: list[Chunk]) -> None:
        """Send chunks into loop 1."""
        self.prefill = Prefill.start(self.model.model, self.pool, chunks)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out of flight, whatever it is doing."""
        if sequence in self.decoding:
            self.flight.drop(sequence)
        if sequence in self.chunked:
            assert self.prefill is not None
            self.prefill.drop(sequence)
            self.prefill = self.prefill if self.chunked else None

    def abandon_decoding(self) -> None:
        """After a pass that failed: forget the new tokens in flight."""
        self.flight = Flight(self.model.model, self.pool)

    def abandon_prefill(self) -> None:
        """After a pass that failed: forget the chunks in flight."""
        self.prefill = None

    def decode(self) -> list[Read]:
        """One pass over all new tokens in flight; gives those that exit."""
        flight, core = self.flight, self.model.model
        if not flight.sequences:
            return []
        context = self._context()
        if core.config.input_injection == "add":  # nothing is added before loop 1
            context.core_input = torch.where(flight.loops[:, None] > 0, flight.core_input, 0.0)[:, None]
        with self._timed():
            state, gate = core.loop(flight.state[:, None], context, 2)  # not the first: rows are in loops of their own
        self.row_passes += len(state)
        return self._leave(context, state, gate[:, 0])

    def _context(self) -> PagedPass:
        """The pass of this tick: while no row comes or goes, that of the tick before in other pages."""
        flight, last = self.flight, self._last
        slots, loops = flight.slots, flight.loops + 1
        if last is not None and last[0] is flight.sequences:
            context = last[1].in_loops(loops)
        else:
            context = PagedPass.over(self.model.model, self.pool, slots, loops, flight.positions[:, None])
            context.adaptation = Adaptation.of([s.adapter for s in flight.sequences], slots.device)
        self._last = flight.sequences, context
        return context

    def _leave(self, context: PagedPass, state: Tensor, gate: Tensor) -> list[Read]:
        """Judge all rows after their loop, (R, 1, D) and (R,), and read those that stop."""
        flight, slots, positions = self.flight, self.flight.slots, context.positions[:, 0]

        def look(state: Tensor) -> Tensor:
            rows = torch.arange(len(state), device=state.device)
            return self.model.log_probabilities(self._finish(state[:, None], context, rows)[:, 0])

        stops, notes = flight.advance(state[:, 0], gate, look)
        if not notes:
            return []
        flight.keep(~stops)
        leaving = stops.nonzero()[:, 0]
        if not self.pool.single_slot and any(note.depth < note.sequence.loops for note in notes):
            depths, most = torch.tensor([(n.depth, n.sequence.loops) for n in notes], device=slots.device).unbind(1)
            self.pool.fill(slots[leaving], positions[leaving], depths, most)
        for note in notes:
            note.sequence.filled += 1
            note.sequence.depths.append(note.depth)
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
        context = group.context.in_loops(group.loop + 1, group.active)
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
                notes.append(Note(sequence, depths[end - 1], *_record(group.tracker, end - 1, depths[end - 1])))
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


def _record(tracker: ExitTracker, place: int, depth: int) -> tuple[list[float], float]:
    return tracker.log_probabilities[place, :depth].tolist(), float(tracker.log_survival[place])


def _reads(logits: Tensor, notes: list[Note]) -> list[Read]:
    """Logits (n, V) with what is known of their rows."""
    wide = logits if logits.dtype == torch.float64 else logits.float()  # reductions of bf16 are slow on a CPU
    finite = wide.sum(-1).isfinite().tolist()  # NaN and infinity stay in a sum
    plain = any(note.sequence.params.plain for note in notes)
    best = best_tokens(wide).tolist() if plain else [None] * len(notes)
    reads, rows = [], logits.unbind()
    for row, (sequence, depth, record, survival, finite_gates) in enumerate(notes):
        what = "exit gate is" if not finite_gates else None if finite[row] else "logits are"
        place = len(sequence.prompt) + len(sequence.new) - 1
        error = what and f"the {what} not finite at position {place}; check the weights"
        reads.append(Read(sequence, rows[row], best[row], depth, record, survival, error))
        sequence.flying = False
    return reads

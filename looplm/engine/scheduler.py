"""Who runs next: admission, chunks of prompts beside decoding, room for growth, and who gives way.

Service is in order of rank: the number of arrival, less `PATIENCE` for each unit of priority. So a request of higher
priority overtakes those that came up to `PATIENCE` requests before it, and none is overtaken for ever. The first in
line is never passed by a smaller one behind it, but while a prefix that it can share is being filled for another. When
pages run out, the running sequence of the highest rank gives way and waits at its old place: under `per_loop` its
positions are run again later at their recorded depths, which gives the same keys; under `last`, which has no parallel
form, its pages are copied out and back.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from array import array
from collections.abc import Hashable, Iterator
from functools import partial

from looplm.engine.kv_pool import BLOCK, Block, KVPool
from looplm.engine.prefill import Chunk
from looplm.engine.runner import Runner
from looplm.engine.sequence import Read, Sequence

PATIENCE = 64
"""Arrivals that a unit of priority overtakes."""


class Scheduler:
    """Sequences that wait, and those that run.

    Args:
        rows: sequences that run at once at most.
        chunk_tokens: positions of all prompt chunks in one pass, padding included.
        prefix_cache: whether prompts reuse the blocks of earlier ones (`per_loop`).
    """

    def __init__(self, pool: KVPool, runner: Runner, *, rows: int, chunk_tokens: int, prefix_cache: bool) -> None:
        self.pool, self.runner, self.chunk_tokens = pool, runner, chunk_tokens
        self.prefix_cache = prefix_cache and not pool.single_slot
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._spare = 0  # pages of a block of new tokens for each that runs
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._slots = list(range(rows - 1, -1, -1))
        self._changed = False  # whether anything came, went or was filled since those that wait were looked at

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        heapq.heappush(self._waiting, (sequence.rank, sequence))
        self._changed = True

    def remove(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it stands: its rows and pages are free."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        else:
            self._unseat(sequence)
        sequence.saved = None
        self._changed = True

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, at its old place."""
        if self.pool.single_slot and not sequence.prefilling:
            sequence.saved = self.pool.save(sequence.blocks[: -(-sequence.filled // BLOCK)])
        self._unseat(sequence)
        self.preemptions += 1
        self.add(sequence)

    def admit(self) -> list[Read]:
        """Seat those that wait, in order, while there is room; those whose prefix is on its way wait for it.

        Gives the reads of those whose whole prompt was there: they need not be run.
        """
        if not (self._waiting and self._slots and self._changed):
            return []
        self._changed = False
        reads: list[Read] = []
        coming = {key for s in self.running if s.prefilling for key in self._missing(s)[:1]}
        held = []
        while self._waiting and self._slots:
            missing = self._missing(self._waiting[0][1])[:1]
            if not coming.isdisjoint(missing):
                held.append(heapq.heappop(self._waiting))
            elif self._seat(self._waiting[0][1], reads):
                coming.update(missing)
                heapq.heappop(self._waiting)
            else:
                break
        for entry in held:
            heapq.heappush(self._waiting, entry)
        return reads

    def _missing(self, sequence: Sequence) -> list[Hashable]:
        """Keys of the blocks that its prompt could share and nobody has put into the pool yet, from the first on."""
        *shared, whole = self._keys(sequence) or (None,)
        missing = list(itertools.dropwhile(self.pool.knows, shared))
        return missing if whole is None or self.pool.knows_end(whole) or sequence.new else [*missing, whole]

    def starters(self) -> list[Sequence]:
        """Sequences whose newest token starts loop 1 now, each with room for it; some may have to give way."""
        if self.runner.flight.sequences and self.in_step():
            return []
        ready = [s for s in self.running if not s.prefilling and not s.flying]
        starting = [s for s in sorted(ready, key=_order) if s.slot is not None and self._grow(s)]
        starting = [s for s in starting if s.slot is not None]
        for sequence in starting:
            sequence.flying = True
        return starting

    def in_step(self) -> bool:
        """Whether all tokens go equally deep: rows that start together then stay together, and share the head.

        A row that comes in between waits, once, for those in flight (docs/performance.md).
        """
        return len({s.loops for s in self.running}) == 1 and not any(s.options.adaptive for s in self.running)

    def chunks(self) -> list[Chunk]:
        """The chunks that start loop 1 next, in order of rank and as many as `chunk_tokens` holds."""
        group: list[Chunk] = []
        for sequence in sorted((s for s in self.running if s.prefilling and not s.flying), key=_order):
            chunk = Chunk(sequence, sequence.filled, min(sequence.target - sequence.filled, self.chunk_tokens))
            width = max(c.count for c in [*group, chunk])
            if group and (len(group) + 1) * width > self.chunk_tokens:
                break
            group.append(chunk)
        for chunk in group:
            chunk.sequence.flying = True
        return group

    def chunk_done(self, sequence: Sequence) -> None:
        """A chunk is in the pool: blocks of the prompt can be found, and a prompt that is through collapses."""
        self._changed = True
        for number, key in enumerate(self._keys(sequence)):
            block, end = sequence.blocks[number], min((number + 1) * BLOCK, len(sequence.prompt))
            if end > sequence.filled:
                break
            if block.key is None:
                self.pool.publish(block, key, tuple(sequence.depths[number * BLOCK : end]))
        if self.pool.single_slot and not sequence.prefilling:
            for block in sequence.blocks:
                self.pool.collapse(block)
            assert sequence.slot is not None
            self.pool.bind(sequence.slot, sequence.blocks)

    def prompt_read(self, read: Read) -> None:
        """A prompt was run and read: whoever has the same one need not run it."""
        keys = self._keys(read.sequence)
        if keys and read.error is None:
            kept = {**vars(read), "logits": read.logits.clone()}  # not all rows of that read, and not the sequence
            del kept["sequence"]
            self.pool.publish_end(keys[-1], partial(Read, **kept))

    def _keys(self, sequence: Sequence) -> tuple[Hashable, ...]:
        """What the blocks of its prompt are found by, the last by the whole prompt; none where none are shared."""
        if not self.prefix_cache or sequence.saved is not None:
            return ()
        if sequence.keys is None:
            sequence.keys = tuple(_keys(sequence))
        return sequence.keys

    def _pages(self, sequence: Sequence) -> int:
        """Pages that a block of new tokens takes."""
        return 1 if self.pool.single_slot else sequence.loops

    def _seat(self, sequence: Sequence, reads: list[Read]) -> bool:
        """Give a sequence its blocks and a slot, leaving those that run a block each to grow; False: no room yet.

        `reads` gets what was read where another one's prompt ends, if it is the same.
        """
        sequence.target = max(len(sequence.prompt), len(sequence.depths))
        found = self._prefix(sequence)
        count = -(-sequence.target // BLOCK) - len(found)
        twin = self._twin(sequence) if count == 1 else None
        after = found[-1] if found else None
        blocks = self._blocks(sequence, count, after, 0 if twin is None else len(twin.depths))
        if blocks is None and twin is not None:  # it may hold the very pages that are wanted
            self.pool.release(twin)
            twin, blocks = None, self._blocks(sequence, count, after)
        if blocks is None:
            for block in reversed(found):
                self.pool.release(block)
            return False
        sequence.blocks, sequence.slot = found + blocks, self._slots.pop()
        self.pool.bind(sequence.slot, sequence.blocks)
        sequence.filled = len(found) * BLOCK
        sequence.depths[: sequence.filled] = [depth for block in found for depth in block.depths]
        if twin is not None:
            self._copy_end(sequence, twin, reads)
        if not sequence.new:
            sequence.cached = sequence.filled
        if sequence.saved is not None:
            self.pool.restore(blocks, sequence.saved)
            sequence.saved, sequence.filled = None, sequence.target
        self.running.append(sequence)
        self._spare += self._pages(sequence)
        return True

    def _blocks(self, sequence: Sequence, count: int, after: Block | None, filled: int = 0) -> list[Block] | None:
        """Blocks for a sequence that is to be seated, where those that run still have room to grow."""
        pages = 1 if sequence.saved is not None else sequence.loops
        if self.pool.available < count * pages + self._spare:
            return None
        return self.pool.allocate(count, pages, after, filled)

    def _prefix(self, sequence: Sequence) -> list[Block]:
        """Blocks of earlier prompts that this one begins with; at least one position is left to run."""
        found = []
        for number, key in enumerate(self._keys(sequence), start=1):
            whole = number * BLOCK < sequence.target and number * BLOCK <= len(sequence.prompt)
            block = self.pool.find(key) if whole else None
            if block is None:
                break
            found.append(block)
        return found

    def _twin(self, sequence: Sequence) -> Block | None:
        """The last block of the same prompt, where that was read."""
        keys = self._keys(sequence)
        return self.pool.find(keys[-1]) if keys and not sequence.new and self.pool.knows_end(keys[-1]) else None

    def _copy_end(self, sequence: Sequence, twin: Block, reads: list[Read]) -> None:
        """Fill the last block of a prompt from its twin, and read what was read there."""
        assert twin.end is not None
        self.pool.copy(twin, sequence.blocks[-1])
        self.pool.release(twin)
        sequence.depths[sequence.filled :] = twin.depths
        sequence.filled = sequence.target
        reads.append(twin.end(sequence))

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the next position; False where the sequence itself had to give way."""
        while sequence.filled // BLOCK >= len(sequence.blocks):
            blocks = self.pool.allocate(1, self._pages(sequence), sequence.blocks[-1])
            if blocks is not None:
                sequence.blocks += blocks
                assert sequence.slot is not None
                self.pool.bind(sequence.slot, sequence.blocks, len(sequence.blocks) - 1)
                continue
            last = max(self.running, key=_order)
            self.preempt(last)
            if last is sequence:
                return False
        return True

    def _unseat(self, sequence: Sequence) -> None:
        if sequence.flying:
            self.runner.drop(sequence)
        assert sequence.slot is not None
        self.pool.unbind(sequence.slot)
        self._slots.append(sequence.slot)
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        self.running.remove(sequence)
        self._spare -= self._pages(sequence)
        sequence.blocks, sequence.slot, sequence.flying, sequence.filled = [], None, False, 0


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _keys(sequence: Sequence) -> Iterator[Hashable]:
    """What the blocks of a prompt are found by: all tokens up to their end, adapter, what decides their depths."""
    adapter = sequence.params.adapter
    decides: Hashable = (adapter, sequence.loops)
    if sequence.options.prefill == "adaptive":
        rule = sequence.prompt_rule()
        if not isinstance(rule, Hashable):
            return
        decides = (adapter, rule, sequence.options.min_loops, sequence.loops)
    digest = hashlib.sha256()
    for start in range(0, len(sequence.prompt), BLOCK):
        digest.update(array("q", sequence.prompt[start : start + BLOCK]).tobytes())
        yield digest.digest(), decides

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

from looplm.engine.cohorts import Chunk
from looplm.engine.kv_pool import BLOCK, KVPool
from looplm.engine.runner import Runner
from looplm.engine.sequence import Sequence

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
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._slots = list(range(rows - 1, -1, -1))

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

    def remove(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it stands: its rows and pages are free."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        else:
            self._unseat(sequence)
        sequence.saved = None

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, at its old place."""
        if self.pool.single_slot and not sequence.prefilling:
            sequence.saved = self.pool.save(sequence.blocks[: -(-sequence.filled // BLOCK)])
        self._unseat(sequence)
        self.preemptions += 1
        self.add(sequence)

    def admit(self) -> None:
        """Seat those that wait, in order, while there is room; those whose prefix is on its way wait for it."""
        if not (self._waiting and self._slots):
            return
        coming = {key for s in self.running if s.prefilling for key in self._missing(s)[:1]}
        held = []
        while self._waiting and self._slots:
            missing = self._missing(self._waiting[0][1])[:1]
            if not coming.isdisjoint(missing):
                held.append(heapq.heappop(self._waiting))
            elif self._seat(self._waiting[0][1]):
                coming.update(missing)
                heapq.heappop(self._waiting)
            else:
                break
        for entry in held:
            heapq.heappush(self._waiting, entry)

    def _missing(self, sequence: Sequence) -> list[Hashable]:
        """Keys of the blocks that its prompt could share and nobody has put into the pool yet, from the first on."""
        keys = list(_keys(sequence)) if self.prefix_cache and sequence.saved is None else []
        shared = [key for number, key in enumerate(keys, start=1) if number * BLOCK < len(sequence.prompt)]
        return list(itertools.dropwhile(self.pool.knows, shared))

    def starters(self) -> list[Sequence]:
        """Sequences whose newest token starts loop 1 now, each with room for it; some may have to give way."""
        if self.runner.cohorts and self.in_step():
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
        """A chunk is in the pool: full blocks of the prompt can be found, and a prompt that is through collapses."""
        if self.prefix_cache:
            for number, key in enumerate(_keys(sequence)):
                block = sequence.blocks[number]
                if (number + 1) * BLOCK > sequence.filled:
                    break
                if block.key is None:
                    self.pool.publish(block, key, tuple(sequence.depths[number * BLOCK : (number + 1) * BLOCK]))
        if self.pool.single_slot and not sequence.prefilling:
            for block in sequence.blocks:
                self.pool.collapse(block)
            assert sequence.slot is not None
            self.pool.bind(sequence.slot, sequence.blocks)

    def _pages(self, sequence: Sequence) -> int:
        """Pages that a block of new tokens takes."""
        return 1 if self.pool.single_slot else sequence.loops

    def _seat(self, sequence: Sequence) -> bool:
        """Give a sequence its blocks and a slot, leaving those that run a block each to grow; False: no room yet."""
        sequence.target = max(len(sequence.prompt), len(sequence.depths))
        found = [] if sequence.saved is not None else self._prefix(sequence)
        count = -(-sequence.target // BLOCK) - len(found)
        pages = 1 if sequence.saved is not None else sequence.loops
        spare = sum(map(self._pages, self.running))
        after, room = found[-1] if found else None, self.pool.available >= count * pages + spare
        blocks = self.pool.allocate(count, pages, after) if room else None
        if blocks is None:
            for block in reversed(found):
                self.pool.release(block)
            return False
        sequence.blocks, sequence.slot = found + blocks, self._slots.pop()
        self.pool.bind(sequence.slot, sequence.blocks)
        sequence.filled = len(found) * BLOCK
        sequence.depths[: sequence.filled] = [depth for block in found for depth in block.depths]
        if not sequence.new:
            sequence.cached = sequence.filled
        if sequence.saved is not None:
            self.pool.restore(blocks, sequence.saved)
            sequence.saved, sequence.filled = None, sequence.target
        self.running.append(sequence)
        return True

    def _prefix(self, sequence: Sequence) -> list:
        """Blocks of earlier prompts that this one begins with; at least one position is left to run."""
        found = []
        for number, key in enumerate(_keys(sequence)) if self.prefix_cache else ():
            block = self.pool.find(key) if (number + 1) * BLOCK < sequence.target else None
            if block is None:
                break
            found.append(block)
        return found

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
        sequence.blocks, sequence.slot, sequence.flying, sequence.filled = [], None, False, 0


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _keys(sequence: Sequence) -> Iterator[Hashable]:
    """What the full blocks of a prompt are found by: all tokens up to their end, adapter, what decides their depths."""
    adapter = sequence.params.adapter
    decides: Hashable = (adapter, sequence.loops)
    if sequence.options.prefill == "adaptive":
        rule = sequence.prompt_rule()
        if not isinstance(rule, Hashable):
            return
        decides = (adapter, rule, sequence.options.min_loops, sequence.loops)
    digest = hashlib.sha256()
    for end in range(BLOCK, len(sequence.prompt) + 1, BLOCK):
        digest.update(array("q", sequence.prompt[end - BLOCK : end]).tobytes())
        yield digest.digest(), decides

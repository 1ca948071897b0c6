"""Prompt chunks in flight: padded side by side, all in the same loop, judged by one `ExitTracker`.

Positions of a chunk stop one by one and are frozen (their slots in deeper loops are filled, and not written any more)
until the whole group is through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from looplm.engine.adapters import Adaptation
from looplm.engine.kv_pool import KVPool
from looplm.engine.paged_pass import PagedPass
from looplm.engine.rules import Replayed, merge
from looplm.engine.sequence import Sequence
from looplm.exit_tracker import ExitTracker
from looplm.model.stack import OuroModel

Look = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Chunk:
    """Positions `start` .. `start + count - 1` of a sequence, to be put into the pool."""

    sequence: Sequence
    start: int
    count: int

    @property
    def depths(self) -> list[int]:
        """The depths known before: full depth, or recorded; 0 where a rule is to find it."""
        known = self.sequence.depths[self.start : self.start + self.count]
        default = 0 if self.sequence.options.prefill == "adaptive" else self.sequence.loops
        return known + [default] * (self.count - len(known))


@dataclass
class Prefill:
    """B chunks in flight, padded to (B, S) on the right; N positions are real.

    Attributes:
        state: (B, S, D); a position past its exit keeps the state it left with.
        active: (B, S) bool, the positions that still loop.
        flat: (N,) places of the real positions in the flattened (B, S).
        dropped: rows that were taken out.
    """

    chunks: list[Chunk]
    tracker: ExitTracker
    context: PagedPass
    state: Tensor
    core_input: Tensor
    active: Tensor
    flat: Tensor
    slots: Tensor
    dropped: set[int] = field(default_factory=set)
    loop: int = 0

    @classmethod
    def start(cls, core: OuroModel, pool: KVPool, chunks: list[Chunk]) -> Prefill:
        """Some chunks before loop 1."""
        device, width = core.embed_tokens.weight.device, max(chunk.count for chunk in chunks)
        ids = [c.sequence.token_at(c.start, c.count) + [0] * (width - c.count) for c in chunks]
        numbers = [(c.sequence.slot, c.start, c.count, c.sequence.options.min_loops, c.sequence.loops) for c in chunks]
        slots, begins, counts, least, most = torch.tensor(numbers, device=device).unbind(1)
        steps = torch.arange(width, device=device)
        active, positions = steps < counts[:, None], begins[:, None] + steps
        positions = torch.where(active, positions, begins[:, None])  # padding looks at what is there, and is dropped
        context = PagedPass.over(core, pool, slots, torch.ones_like(slots), positions, active)
        context.adaptation = Adaptation.of([c.sequence.adapter for c in chunks], device)
        state = core.begin(context, core.embed_tokens(torch.tensor(ids, device=device)))
        flat = active.flatten().nonzero()[:, 0]
        rows, known = flat // width, torch.tensor([depth for c in chunks for depth in c.depths], device=device)
        rule = Replayed(known, merge([c.sequence.prompt_rule() for c in chunks], device))
        least = torch.where(known > 0, 1, least[rows])  # what is known was decided within its limits
        tracker = ExitTracker(rule, rows, positions.flatten()[flat], least, most[rows], pool.num_loops)
        return cls(chunks, tracker, context, state, state, active, flat, slots)

    @property
    def over(self) -> bool:
        """Whether no position loops any more."""
        return not len(self.tracker.active)

    def advance(self, pool: KVPool, state: Tensor, gate: Tensor, look: Look) -> None:
        """A loop was run: (B, S, D) and (B, S); freeze what stops here and fill its slots in deeper loops."""
        self.loop += 1
        self.state = torch.where(self.active[..., None], state, self.state)
        judged = self.tracker.active
        places = self.flat[judged]
        stops = self.tracker.step(self.loop, gate.flatten()[places], self.state.flatten(0, 1)[places], look)
        self.active = torch.zeros_like(self.active).flatten()
        self.active[self.flat[self.tracker.active]] = True
        self.active = self.active.view(self.state.shape[:2])
        left = judged[stops]
        rows, depths = self.tracker.rows[left], self.tracker.depths[left]
        most = torch.tensor([chunk.sequence.loops for chunk in self.chunks], device=depths.device)[rows]
        pool.fill(self.slots[rows], self.tracker.positions[left], depths, most)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out in mid-flight: its positions write nothing any more."""
        row = next(i for i, chunk in enumerate(self.chunks) if chunk.sequence is sequence)
        self.tracker.drop(self.tracker.rows[self.tracker.active] == row)
        self.active[row] = False
        self.dropped.add(row)

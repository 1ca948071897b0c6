"""One pass of the stack over rows of any length at any loop, with keys and values in the pool's pages.

`PagedPass` stands where `PassContext` stands in `generate`: the model's own layers ask it for their memory. Each row
has a position range of its own and reads the pages of the loop it is in, so rows in different loops share the pass.
The pages of all rows are gathered into one padded batch a layer, which any attention backend takes on any device; a
mask hides what lies behind each query. Where one position a row is decoded on a CPU and texts are long, copying would
cost more than all else: there each row is attended to by itself, where its pages lie (`Pages.apart`; docs/engine.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looplm.engine.kv_pool import BLOCK, TRASH
from looplm.model.context import PassContext

if TYPE_CHECKING:
    from looplm.engine.adapters import Adaptation
    from looplm.engine.kv_pool import KVPool
    from looplm.model.few_rows import FewMemory
    from looplm.model.layers import Adapt, Memory
    from looplm.model.stack import OuroModel


SHORT = 128 << 10
"""Bytes of a row's keys and values in a layer up to which one call on a copy of all rows is as fast as a call a row."""


class Span(NamedTuple):
    """The positions of a row with one query: `length` of them from place `start` on, or in `pages` here and there."""

    start: int | None
    pages: Tensor
    length: int

    @classmethod
    def of(cls, table: Tensor, positions: Tensor) -> list[Span]:
        """Of rows with pages (R, n) whose queries stand at `positions` (R,) and see themselves and all before."""
        spans = []
        for row, pages, position in zip(table, table.tolist(), positions.tolist(), strict=True):
            first, count = pages[0], position // BLOCK + 1
            unbroken = pages[:count] == list(range(first, first + count))
            spans.append(cls(first * BLOCK if unbroken else None, row[:count], position + 1))
        return spans


@dataclass(frozen=True)
class Pages:
    """Where R rows of a pass read, `table` (R, n) pages, and write, `places` (R x S,) positions in the flat pages.

    `spans` says it row by row where rows are to be attended to by themselves.
    """

    table: Tensor
    places: Tensor
    spans: list[Span] | None

    @classmethod
    def at(cls, pool: KVPool, table: Tensor, positions: Tensor, written: Tensor | None) -> Pages:
        """Pages (R, n) of rows with queries at `positions` (R, S); those `written` (R, S) bool are kept, or all."""
        block = positions // BLOCK if written is None else (positions // BLOCK).clamp(max=table.shape[1] - 1)
        places = table.gather(1, block) * BLOCK + positions % BLOCK
        apart = positions.shape[1] == 1 and (len(table) == 1 or table.shape[1] * pool.layer_bytes > SHORT)
        spans = Span.of(table, positions[:, 0]) if apart else None
        kept = places if written is None else torch.where(written, places, TRASH * BLOCK)
        return cls(table, kept.flatten(), spans)

    def exchange(self, key: Tensor, value: Tensor, store: Tensor, pool: KVPool, longest: int) -> tuple[Tensor, Tensor]:
        """Write (R, H_kv, S, D_h) into `store` (pages, BLOCK, 2, H_kv, D_h); give (R, H_kv, longest, D_h) to see."""
        self._write(key, value, store)
        seen = pool.gather(store, self.table.flatten()).unflatten(0, self.table.shape).flatten(1, 2)[:, :longest]
        return seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)

    def apart(self, key: Tensor, value: Tensor, store: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same row by row, (1, H_kv, its length, D_h) each; only pages that are scattered are copied."""
        assert self.spans is not None
        self._write(key, value, store)
        whole, seen = _by_head(store), []
        for start, pages, length in self.spans:
            kept = _by_head(store.index_select(0, pages)) if start is None else whole
            keys, values = kept.narrow(3, start or 0, length).unbind(0)
            seen.append((keys, values))
        return seen

    def _write(self, key: Tensor, value: Tensor, store: Tensor) -> None:
        new = torch.stack((key, value), dim=1).movedim(3, 1).flatten(0, 1)
        store.flatten(0, 1).index_copy_(0, self.places, new)

    def take(self, rows: Tensor, length: int) -> Pages:
        """Those of some rows; `length` is S."""
        spans = self.spans and [self.spans[row] for row in torch.arange(len(self.table))[rows.cpu()].tolist()]
        return Pages(self.table[rows], self.places.view(-1, length)[rows].flatten(), spans)


def _by_head(store: Tensor) -> Tensor:
    """Pages (n, BLOCK, 2, H_kv, D_h) as (2, 1, H_kv, n x BLOCK, D_h): keys and values of one row."""
    return store.flatten(0, 1).permute(1, 2, 0, 3).unsqueeze(1)


@dataclass
class PagedPass(PassContext):
    """R rows with S queries each, in `slots` (R,) of the pool.

    `looped` are their pages of the core, `once` those of prelude and coda. `adaptation` is what the rows' adapters add,
    set by whoever knows the rows.
    """

    pool: KVPool = field(kw_only=True)
    slots: Tensor = field(kw_only=True)
    looped: Pages = field(kw_only=True)
    once: Pages | None = field(kw_only=True)
    longest: int = field(kw_only=True)
    adaptation: Adaptation | None = field(default=None, kw_only=True)

    @classmethod
    def over(
        cls,
        core: OuroModel,
        pool: KVPool,
        slots: Tensor,
        loops: Tensor,
        positions: Tensor,
        written: Tensor | None = None,
    ) -> PagedPass:
        """A pass over rows in the pool.

        Args:
            slots, loops: (R,) each row's place in the tables and the loop it runs, from 1.
            positions: (R, S) int64.
            written: (R, S) bool, all by default; keys of others are dropped (padding, positions past their exit).
        """
        weight = core.embed_tokens.weight
        least, most = (int(end) for end in positions.aminmax())
        longest = most + 1
        count = -(-longest // BLOCK)
        edges = core.config.num_prelude_layers + core.config.num_coda_layers
        once = Pages.at(pool, pool.edge_tables[slots, :count], positions, written) if edges else None
        return cls(
            rotary=core.rotary_emb(positions, weight.dtype),
            mask=None if least == most else _mask(positions, longest, weight.dtype),
            positions=positions,
            valid=None,
            cache=None,
            past_length=0,
            length=positions.shape[1],
            num_prelude_layers=core.config.num_prelude_layers,
            num_core_layers=core.config.num_hidden_layers,
            core_input=weight,  # set by OuroModel.begin, or by the runner
            pool=pool,
            slots=slots,
            looped=Pages.at(pool, pool.tables[slots, loops - 1, :count], positions, written),
            once=once,
            longest=longest,
        )

    def memory(self, layer: int, loop: int) -> Memory:
        """Where layer `layer` keeps its keys and values; each row's own loop is in its pages, `loop` says nothing."""
        pages, store = self._home(layer)
        return partial(pages.exchange, store=store, pool=self.pool, longest=self.longest)

    def few_memory(self, layer: int, loop: int) -> FewMemory:
        """As `memory`; row by row where that is faster."""
        pages, store = self._home(layer)
        return self.memory(layer, loop) if pages.spans is None else partial(pages.apart, store=store)

    def _home(self, layer: int) -> tuple[Pages, Tensor]:
        """The pages of a layer and what they are pages of."""
        index = layer - self.num_prelude_layers
        if 0 <= index < self.num_core_layers:
            return self.looped, self.pool.layers[index]
        assert self.once is not None
        return self.once, self.pool.edge_layers[layer if index < 0 else layer - self.num_core_layers]

    def adapt(self, layer: int) -> Adapt | None:
        """What the rows' adapters add in `layer`."""
        return None if self.adaptation is None else partial(self.adaptation.add, layer=layer)

    def select(self, rows: Tensor) -> PagedPass:
        """The same pass for some rows, (n,) indices or (R,) bool."""
        cos, sin = self.rotary
        return replace(
            self,
            rotary=(cos[rows], sin[rows]),
            mask=None if self.mask is None else self.mask[rows],
            positions=self.positions[rows],
            slots=self.slots[rows],
            looped=self.looped.take(rows, self.length),
            once=None if self.once is None else self.once.take(rows, self.length),
            adaptation=None if self.adaptation is None else self.adaptation.take(rows),
        )

    def in_loops(self, loops: Tensor | int, written: Tensor | None = None) -> PagedPass:
        """The same pass in other loops, (R,) or one; of its positions those that are `written` (R, S) bool, or all."""
        table = self.pool.tables[self.slots, loops - 1, : self.looped.table.shape[1]]
        return replace(self, looped=Pages.at(self.pool, table, self.positions, written))


def _mask(positions: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
    """(R, 1, S, longest), 0 where a query at `positions` (R, S) may look and -inf elsewhere."""
    hidden = torch.arange(longest, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill(hidden, -math.inf)

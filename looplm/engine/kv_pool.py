"""Where keys and values live: pages of a few positions under a hard byte budget, shared by all sequences.

A *page* holds keys and values of `BLOCK` positions in all core layers of one loop; prelude and coda layers, which run
once, have edge pages of their own. A *block* is what a sequence holds for `BLOCK` of its positions:

    per_loop   a page for each of its loops. When a position leaves after loop e, the slots beyond e are filled with
               K_e (`fill`), so a query in loop t reads page t and sees K_min(t, e_j)[j] (design: KV policies).
    last       one page. A prompt in flight has a page a loop, filled likewise, so its last page holds K_e_j of every
               position: to collapse is to free the others, and nothing is copied.

Pages are zeroed when they are handed out: what a sequence left there (a NaN, say) must not reach another one through
0 x NaN behind the mask. Page 0 stays zero and pads tables; page 1 takes what padding writes.

Prefix cache (`per_loop`): a block of prompt positions is found again by its tokens, the block before it, and all that
decides how deep its positions went (rule, limits). Blocks that nobody holds stay until their pages are needed. The last
block of a prompt, full or not, also keeps what was read there: the same prompt copies it, and is not run at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from looplm.engine.free_pages import FreePages
from looplm.model.configuration import OuroConfig

if TYPE_CHECKING:
    from looplm.engine.sequence import Read, Sequence

BLOCK = 16
"""Positions of a page."""
ZERO, TRASH = 0, 1
"""Pages that belong to nobody."""


@dataclass(eq=False)
class Block:
    """`BLOCK` positions of a sequence: pages by loop (or one), the edge page, and who holds it.

    One that can be found has a `key` and the `depths` of its prompt positions; where a prompt ends with them and was
    read, `end` makes the same read for another sequence.
    """

    pages: list[int]
    edge: int
    holders: int = 1
    key: Hashable = None
    depths: tuple[int, ...] = ()
    end: Callable[[Sequence], Read] | None = None


@dataclass(frozen=True)
class Saved:
    """A collapsed sequence's pages, copied out of the pool: (L, blocks, BLOCK, 2, H_kv, D_h) on the CPU."""

    core: Tensor
    edge: Tensor


class KVPool:
    """Pages for all sequences, and the tables that say which row of a pass reads which.

    Args:
        budget: bytes of all pages together at most.
        num_loops: pages a block may have.
        rows: sequences at once; each has a slot in the tables.
        max_positions: of one sequence.

    Attributes:
        core: (L, pages, BLOCK, 2, H_kv, D_h), keys and values side by side; `edge` likewise for prelude and coda.
        layers, edge_layers: the same, layer by layer.
        page_bytes: of a page, `layer_bytes` of it in each layer; `edge_bytes` of an edge page.
        tables: (rows, T, blocks) int64, the page of each block in each loop; `edge_tables` (rows, blocks).

    Raises:
        ValueError: a budget below what a single block takes.
    """

    def __init__(
        self,
        config: OuroConfig,
        *,
        budget: int,
        num_loops: int,
        single_slot: bool,
        rows: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        edges = config.num_prelude_layers + config.num_coda_layers
        page = (BLOCK, 2, config.num_key_value_heads or 0, config.head_dim or 0)
        self.layer_bytes = BLOCK * 2 * page[2] * page[3] * dtype.itemsize
        self.page_bytes, self.edge_bytes = config.num_hidden_layers * self.layer_bytes, edges * self.layer_bytes
        self.single_slot, self.num_loops = single_slot, num_loops
        loops = 1 if single_slot else num_loops
        reserved = 2 * (self.page_bytes + self.edge_bytes)
        blocks = -(-max_positions // BLOCK)
        most = rows * blocks * (num_loops if single_slot else 1)  # more would never be used
        count = min((budget - reserved) // (loops * self.page_bytes + self.edge_bytes), most)
        if count * loops < num_loops:
            least = reserved + max(num_loops // loops, 1) * (loops * self.page_bytes + self.edge_bytes)
            raise ValueError(f"kv_bytes is {budget}; one block of {BLOCK} positions needs at least {least}")
        self.core = torch.empty(config.num_hidden_layers, count * loops + 2, *page, dtype=dtype, device=device)
        blocks_at_once = count if edges else count * loops
        self.edge = torch.empty(edges, blocks_at_once + 2, *page, dtype=dtype, device=device)
        for pages in (self.core, self.edge):
            pages[:, :2] = 0
        self.layers, self.edge_layers = self.core.unbind(), self.edge.unbind()
        self.tables = torch.zeros(rows, num_loops, blocks, dtype=torch.int64, device=device)
        self.edge_tables = torch.zeros(rows, blocks, dtype=torch.int64, device=device)
        self._scratch = self.core.new_empty(0, *page)
        self._numbers = torch.arange(1, num_loops + 1, device=device)
        self._firsts = torch.arange(len(self.core), device=device)[:, None] * (self.core.shape[1] * BLOCK)
        self._free = FreePages(2, count * loops + 2)
        self._free_edges = FreePages(2, blocks_at_once + 2)
        self._known: dict[Hashable, Block] = {}
        self._idle: OrderedDict[int, Block] = OrderedDict()
        self._idle_pages = 0

    # --- accounting ---

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.core.nbytes + self.edge.nbytes

    @property
    def capacity(self) -> int:
        """Pages there are."""
        return self.core.shape[1] - 2

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those of prefixes that nobody holds."""
        return len(self._free) + self._idle_pages

    @property
    def pages_in_use(self) -> int:
        """Pages that sequences hold."""
        return self.capacity - self.available

    def pages_for(self, positions: int, loops: int) -> int:
        """Pages of so many positions with keys of `loops` loops each."""
        return -(-positions // BLOCK) * loops

    def fits(self, prompt: int, positions: int, loops: int) -> bool:
        """Whether a sequence could ever run alone: its prompt per loop, then all its positions as they are kept."""
        pages = max(self.pages_for(prompt, loops), self.pages_for(positions, 1 if self.single_slot else loops))
        return pages <= self.capacity and self.pages_for(positions, 1) <= self.edge.shape[1] - 2

    # --- blocks ---

    def allocate(self, count: int, pages: int, after: Block | None = None, filled: int = 0) -> list[Block] | None:
        """So many blocks of so many pages each, zeroed; None, and nothing taken, where the budget is spent.

        In each loop pages lie side by side, those of the block `after` included, as far as there is room. The first
        `filled` positions of each are not zeroed: the caller writes them at once.
        """
        while (len(self._free) < count * pages or len(self._free_edges) < count) and self._idle:
            self._discard(self._idle.popitem(last=False)[1])
        if len(self._free) < count * pages or len(self._free_edges) < count:
            return None
        lanes = [self._free.take(count, page) for page in ([None] * pages if after is None else after.pages)]
        edges = self._free_edges.take(count, None if after is None else after.edge)
        for lane in lanes:
            _zero(self.core, lane, filled)
        if len(self.edge):
            _zero(self.edge, edges, filled)
        return [Block(list(own), edge) for *own, edge in zip(*lanes, edges, strict=True)]

    def release(self, block: Block) -> None:
        """One holder less; a block that can be found again stays as long as there is room."""
        block.holders -= 1
        if block.holders:
            return
        if block.key is not None:
            self._idle[id(block)] = block
            self._idle_pages += len(block.pages)
        else:
            self._give_back(block)

    def collapse(self, block: Block) -> None:
        """Keep the page of the last loop alone."""
        self._free.give(block.pages[:-1])
        block.pages = block.pages[-1:]

    def knows(self, key: Hashable) -> bool:
        """Whether `find` would find a block."""
        return key in self._known

    def find(self, key: Hashable) -> Block | None:
        """A block made by an earlier prompt, held once more; None where there is none."""
        block = self._known.get(key)
        if block is not None:
            if self._idle.pop(id(block), None) is not None:
                self._idle_pages -= len(block.pages)
            block.holders += 1
        return block

    def knows_end(self, key: Hashable) -> bool:
        """Whether `find` would find the last block of a prompt that was read."""
        return key in self._known and self._known[key].end is not None

    def publish(self, block: Block, key: Hashable, depths: tuple[int, ...]) -> None:
        """Let later prompts find a block that is filled; the first of its kind stays the known one."""
        if key not in self._known:
            block.key, block.depths = key, depths
            self._known[key] = block

    def publish_end(self, key: Hashable, end: Callable[[Sequence], Read]) -> None:
        """Keep what was read at the end of a prompt with the block that is known by `key`."""
        if key in self._known:
            self._known[key].end = end

    def copy(self, source: Block, target: Block) -> None:
        """Bring the prompt positions of a block that can be found into another one."""
        count = len(source.depths)
        for kept, page in zip(source.pages, target.pages, strict=True):
            self.core[:, page, :count] = self.core[:, kept, :count]
        if len(self.edge):
            self.edge[:, target.edge, :count] = self.edge[:, source.edge, :count]

    def _discard(self, block: Block) -> None:
        self._idle_pages -= len(block.pages)
        del self._known[block.key]
        block.key = block.end = None
        self._give_back(block)

    def _give_back(self, block: Block) -> None:
        self._free.give(block.pages)
        self._free_edges.give([block.edge])

    # --- tables and contents ---

    def bind(self, slot: int, blocks: list[Block], start: int = 0) -> None:
        """Enter blocks from `start` on into a slot; a collapsed block serves every loop with its one page."""
        if start == len(blocks):
            return
        new = blocks[start:]
        rows = [b.pages + b.pages[-1:] * (self.num_loops - len(b.pages)) for b in new]
        device = self.tables.device
        self.tables[slot, :, start : len(blocks)] = torch.tensor(rows, device=device).t()
        if len(self.edge):
            self.edge_tables[slot, start : len(blocks)] = torch.tensor([b.edge for b in new], device=device)

    def unbind(self, slot: int) -> None:
        """A slot that is free reads zeros."""
        self.tables[slot] = ZERO
        self.edge_tables[slot] = ZERO

    def fill(self, slots: Tensor, positions: Tensor, depths: Tensor, loops: Tensor) -> None:
        """Positions have left: later ones in deeper loops are to see the keys of their exit.

        Args:
            slots, positions, depths, loops: (N,) int64: row, position, the loop it left after, and its full depth.
        """
        pages = self.tables[slots, :, positions // BLOCK] * BLOCK + (positions % BLOCK)[:, None]
        beyond = (self._numbers > depths[:, None]) & (self._numbers <= loops[:, None])
        row, loop = beyond.nonzero().unbind(1)
        source, target = (self._firsts + pages[row, at] for at in (depths[row] - 1, loop))
        flat = self.core.flatten(0, 2).flatten(1)
        flat.index_copy_(0, target.flatten(), flat.index_select(0, source.flatten()))

    def gather(self, store: Tensor, pages: Tensor) -> Tensor:
        """Pages (n,) of one layer's `store`, copied side by side: (n, BLOCK, 2, H_kv, D_h), good until the next call.

        The buffer is used again and again: fresh memory costs a CPU more than the copying (docs/engine.md).
        """
        if len(self._scratch) < len(pages):
            self._scratch = store.new_empty(len(pages), *store.shape[1:])
        return torch.index_select(store, 0, pages, out=self._scratch[: len(pages)])

    def save(self, blocks: list[Block]) -> Saved:
        """Copy collapsed blocks out."""
        core = self.core[:, [page for block in blocks for page in block.pages]]
        return Saved(core.cpu(), self.edge[:, [block.edge for block in blocks]].cpu())

    def restore(self, blocks: list[Block], saved: Saved) -> None:
        """Copy them back into blocks of one page."""
        self.core[:, [block.pages[0] for block in blocks]] = saved.core.to(self.core.device)
        self.edge[:, [block.edge for block in blocks]] = saved.edge.to(self.edge.device)


def _zero(store: Tensor, pages: list[int], filled: int) -> None:
    """Clear pages (L, pages, BLOCK, ...), a run at a time: an index over many of them takes several times as long."""
    start = 0
    for place in range(1, len(pages) + 1):
        if place == len(pages) or pages[place] != pages[place - 1] + 1:
            store[:, pages[start] : pages[place - 1] + 1, filled:] = 0
            start = place

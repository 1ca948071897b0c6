"""Some of the positions of a pass, packed one behind the other, so that the layers run on no others.

After some exits the positions of a freezing pass (`looplm.model.freezing`) that still loop are scattered over its rows,
few in one and many in another. Norms, projections and MLP take a position by itself: they get the N that loop as one
row (1, N, D), without a gap. Only attention needs the rows apart: there the queries are laid out (B, A), A being the
most that a row has, against all keys of their row. So a frozen position costs nothing but room for its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """N of the B x S positions of a pass.

    Attributes:
        index: (N,) int64 ascending, the positions' places in the flattened (B, S).
        slots: (N,) int64, their places in the flattened (B, A).
        filled: (B, A) int64, which of the N stands there; where none does, any.
        columns: (B, A) int64, the column of the one that stands there; S - 1 where none does.
    """

    index: Tensor
    slots: Tensor
    filled: Tensor
    columns: Tensor

    @classmethod
    def of(cls, index: Tensor, batch: int, length: int) -> Packing:
        """The packing of the positions `index` (N,), ascending places in the flattened (B, S); N > 0."""
        row = index // length
        counts = torch.bincount(row, minlength=batch)
        widest, numbers = int(counts.max()), torch.arange(len(index), device=index.device)
        slots = row * widest + numbers - (counts.cumsum(0) - counts)[row]
        filled = index.new_zeros(batch * widest).index_copy_(0, slots, numbers)
        columns = index.new_full((batch * widest,), length - 1).index_copy_(0, slots, index % length)
        return cls(index, slots, filled.view(batch, widest), columns.view(batch, widest))

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) to (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor, others: Tensor) -> Tensor:
        """(1, N, ...) back among all: (B, S, ...), the remaining positions as in `others` (B, S, ...)."""
        return others.flatten(0, 1).index_copy(0, self.index, packed[0]).view_as(others)

    def by_row(self, query: Tensor) -> Tensor:
        """Queries (1, H, N, D_h) to (B, H, A, D_h), row by row for attention; a gap holds a copy of some query."""
        laid_out = query[0].transpose(0, 1).index_select(0, self.filled.flatten())
        return laid_out.unflatten(0, self.filled.shape).transpose(1, 2)

    def from_rows(self, mixed: Tensor) -> Tensor:
        """What attention made of `by_row`, (B, A, H, D_h), to (1, N, H, D_h); the gaps fall away."""
        return mixed.flatten(0, 1).index_select(0, self.slots)[None]

    def rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, S, D_h) of the packed positions, (1, 1, N, D_h)."""
        batch, length = len(self.filled), rotary[0].shape[2]
        cos, sin = (x[:, 0].expand(batch, length, -1) for x in rotary)
        return self.pack(cos)[:, None], self.pack(sin)[:, None]

    def mask(self, mask: Tensor | None, past_length: int, length: int) -> Tensor:
        """The rows of a mask (B or 1, 1 or H, S, S_past + S) at the queries of `by_row`: (B, 1 or H, A, S_past + S).

        None stands for a causal mask; what is made of it is bool, True where a query may look.
        """
        if mask is None:
            keys = torch.arange(past_length + length, device=self.columns.device)
            return keys <= past_length + self.columns[:, None, :, None]
        return mask.take_along_dim(self.columns[:, None, :, None], 2)

"""What all loops of one forward pass share: mask, rotary positions, cache, the core's input.

Computed once and reused by every loop (Ouro section 3.1: the same positions in every loop, no loop embedding). In
decoding, `take` narrows it to the rows that are still looping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from looplm.model.cache import LoopCache
from looplm.model.packing import Packing

if TYPE_CHECKING:
    from looplm.model.few_rows import FewMemory, FewRows
    from looplm.model.layers import Adapt, Memory
    from looplm.model.stack import OuroModel


@dataclass
class PassContext:
    """One forward pass over (B, S) new positions behind `past_length` cached ones.

    `rows` is None while all rows take part, else the (R,) rows that still loop; tensors are already narrowed to them.
    In a freezing pass `kept` holds, a core layer, the keys and values that the loop before offered: those of positions
    past their exit stay. `packing` is None while all positions loop, else those that do; rotary and mask are already
    narrowed to them. `few` holds the weights of the layers from a number on where they can be taken without calling
    the layers, found once a pass.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    positions: Tensor
    valid: Tensor | None
    cache: LoopCache | None
    past_length: int
    length: int
    num_prelude_layers: int
    num_core_layers: int
    core_input: Tensor
    rows: Tensor | None = None
    packing: Packing | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    few: dict[int, Sequence[FewRows] | None] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        model: OuroModel,
        embedded: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: LoopCache | None,
        use_cache: bool,
        num_loops: int,
    ) -> PassContext:
        """Check the inputs and compute what the loops share.

        Raises:
            ValueError: an empty input, positions beyond the context, a cache that is not a `LoopCache` or not ours.
        """
        config = model.config
        batch, length = embedded.shape[:2]
        if length == 0 or batch == 0:
            raise ValueError(f"the input has shape ({batch}, {length}); it needs at least one row and one token")
        if use_cache and cache is None:
            cache = LoopCache(config)
        if cache is not None:
            if not isinstance(cache, LoopCache):
                raise ValueError(f"past_key_values is a {type(cache).__name__}; a looped model needs a LoopCache")
            cache.check(config, batch, length, num_loops)
            if cache.get_seq_length() == 0:
                cache.plan(num_loops)
        past = cache.get_seq_length() if cache is not None else 0
        if past + length > config.max_position_embeddings:
            raise ValueError(
                f"{past + length} positions, but max_position_embeddings is {config.max_position_embeddings}: "
                "shorten the prompt or ask for fewer new tokens"
            )
        valid = _valid(attention_mask, length)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, embedded.device)
        mask = cast("Tensor | None", create_causal_mask(config, embedded, attention_mask, cache, position_ids))
        return cls(
            rotary=model.rotary_emb(position_ids, embedded.dtype),
            mask=mask,
            positions=position_ids,
            valid=valid,
            cache=cache,
            past_length=past,
            length=length,
            num_prelude_layers=config.num_prelude_layers,
            num_core_layers=config.num_hidden_layers,
            core_input=embedded,
        )

    @property
    def batch(self) -> int:
        """B of the pass (of the rows taking part)."""
        return len(self.core_input)

    def memory(self, layer: int, loop: int) -> Memory | None:
        """Where layer `layer` (prelude, core, coda counted through) keeps its keys and values in loop `loop`."""
        store = None
        if self.cache is not None:
            store = partial(self.cache.slots[layer].update, slot=loop - 1, rows=self.rows)
        in_core = 0 <= layer - self.num_prelude_layers < self.num_core_layers
        return partial(self._freeze, layer=layer, store=store) if self.kept is not None and in_core else store

    def few_memory(self, layer: int, loop: int) -> FewMemory | None:
        """As `memory`, for `looplm.model.few_rows`."""
        return self.memory(layer, loop)

    def adapt(self, layer: int) -> Adapt | None:
        """What is added to the projections of `layer`, row by row: nothing, but see `looplm.engine.paged_pass`."""
        return None

    def _freeze(self, key: Tensor, value: Tensor, layer: int, store: Memory | None) -> tuple[Tensor, Tensor]:
        """Positions past their exit go on offering what they offered in the loop before."""
        assert self.kept is not None
        if self.packing is not None:
            new, old = (key, value), self.kept[layer]
            key, value = (
                self.packing.unpack(a.transpose(1, 2), b.transpose(1, 2)).transpose(1, 2)
                for a, b in zip(new, old, strict=True)
            )
        self.kept[layer] = (key, value)
        return (key, value) if store is None else store(key, value)

    def leave(self, loop: int, rows: Tensor | None, num_loops: int) -> None:
        """`rows` of the whole batch (None: all) go no further than `loop` in this pass of `num_loops`."""
        if self.cache is not None:
            self.cache.leave(loop, self.length, rows, num_loops)

    def take(self, stays: Tensor) -> PassContext:
        """The same pass for those of its rows that stay, (R,) bool."""
        cos, sin = self.rotary
        rows = torch.arange(len(stays), device=stays.device) if self.rows is None else self.rows
        return replace(
            self,
            rotary=(cos, sin) if len(cos) == 1 else (cos[stays], sin[stays]),
            mask=self.mask if self.mask is None or len(self.mask) == 1 else self.mask[stays],
            core_input=self.core_input[stays],
            rows=rows[stays],
        )

    def packed(self, index: Tensor) -> PassContext:
        """The same pass in which only the positions `index` (N,), ascending places in (B, S), still loop."""
        if len(index) == self.batch * self.length:
            return self
        packing = Packing.of(index, self.batch, self.length)
        mask = packing.mask(self.mask, self.past_length, self.length)
        return replace(self, rotary=packing.rotary(self.rotary), mask=mask, packing=packing)

    def advance(self, depths: Tensor) -> None:
        """The pass is over: its positions are in the cache, with their exit depths (B, S)."""
        if self.cache is not None:
            self.cache.advance(depths if self.valid is None else depths * self.valid.to(depths.dtype))

    def mean(self, per_position: Tensor) -> Tensor:
        """Mean of (B, S) values over the positions that are not padding."""
        if self.valid is None:
            return per_position.mean()
        return (per_position * self.valid).sum() / self.valid.sum().clamp(min=1)

    def causal_mean(self, states: Tensor) -> Tensor:
        """Mean of the states up to each position, over its own document and without padding; (B, S, D)."""
        batch, length, _ = states.shape
        weight = torch.ones(batch, length, 1, device=states.device) if self.valid is None else self.valid[..., None]
        sums = torch.nn.functional.pad((states * weight).cumsum(1), (0, 0, 1, 0))
        counts = torch.nn.functional.pad(weight.to(states.dtype).cumsum(1), (0, 0, 1, 0))
        start = _document_start(self.positions).expand(batch, length)[..., None]
        total = sums[:, 1:] - sums.gather(1, start.expand(-1, -1, states.shape[-1]))
        return total / (counts[:, 1:] - counts.gather(1, start)).clamp(min=1)


def _valid(attention_mask: Tensor | None, length: int) -> Tensor | None:
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].float()


def _positions(attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor:
    """Positions count tokens, not padding: a padded row gets the numbers that it would have alone."""
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(past, past + length, device=device)[None]


def _document_start(positions: Tensor) -> Tensor:
    """Index where each position's document starts: where positions do not go on by one. (B, S) int64."""
    index = torch.arange(positions.shape[1], device=positions.device)
    jumps = torch.ones_like(positions, dtype=torch.bool)
    jumps[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return torch.where(jumps, index, 0).cummax(dim=1).values

"""Keys and values of a looped model: one slot a layer and loop, or one a layer, preallocated, with row updates.

The KV policy of the depth-exact contract says what a position j that left after loop e_j offers to later ones; K is
short for keys and values, and a position always sees its own loop-t key:

    per_loop   a query in loop t sees K_min(t, e_j)[j]. At full depth this is the released model's cache, T x L slots.
    last       one slot a layer holds K_e_j[j]: the paper's "last-step only" (Table 14).
    average    one slot a layer holds the mean of K_1[j] .. K_e_j[j]    } the other rows of Table 14, for study
    first      one slot a layer holds K_1[j]                            }

Prompts always run with per-loop keys and are then collapsed into the single slot. Under `per_loop` the slots of loops
beyond e_j are filled with K_e_j when the position leaves, so a loop only ever reads its own slot. Under the single-slot
policies the position that is looping overwrites the slot in every loop, and leaves behind what its policy says.

Differences from transformers' own caches: buffers are preallocated and grow by doubling instead of concatenating, a
pass may write a subset of the rows (those still looping), the common length advances once, when the pass is over, and
the depth of every position is kept. Static, quantised and offloaded caches know no loops and are refused by `generate`.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from looplm.model.configuration import OuroConfig

KVPolicy = Literal["per_loop", "last", "average", "first"]
KV_POLICIES: tuple[KVPolicy, ...] = get_args(KVPolicy)

MOST_PLANNED = 4096
"""Positions that are reserved ahead at most; longer texts grow by doubling."""


class LoopSlots(CacheLayerMixin):
    """The slots of one layer: `keys` and `values` are (slots, B, H_kv, capacity, D_h), filled up to `length`."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.least_slots, self.least_positions = 1, 16
        self.policy: KVPolicy = "per_loop"
        self._held: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch, heads, width, dtype and device from the first keys; reserve nothing yet."""
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(0, batch, heads, 0, head_dim)
        self.values = value_states.new_empty(0, batch, heads, 0, head_dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for `slots` loops and `positions` positions; what was written is kept."""
        assert self.keys is not None and self.values is not None
        old_slots, batch, heads, capacity, head_dim = self.keys.shape
        if slots <= old_slots and positions <= capacity:
            return
        slots = max(slots, old_slots, self.least_slots)
        capacity = capacity if positions <= capacity else max(positions, 2 * capacity, self.least_positions)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(slots, batch, heads, capacity, head_dim)
            new[:old_slots, :, :, : old.shape[3]] = old  # all of it: earlier loops of this pass wrote beyond `length`
            setattr(self, name, new)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,
        slot: int = 0,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write new positions behind the filled ones and return all that the rows may see.

        Args:
            key_states, value_states: (R, H_kv, S, D_h) for the R rows of the pass.
            slot: 0-based slot (loop - 1 in the core).
            rows: (R,) indices into the batch; None for all, which costs no copy.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end, index = self.length + key_states.shape[2], slot if self.policy == "per_loop" else 0
        self.reserve(index + 1, end)
        assert self.keys is not None and self.values is not None
        if self.policy in ("average", "first"):
            self._hold(key_states, value_states, slot, rows)
        keys, values = self.keys[index], self.values[index]
        if rows is None:
            keys[:, :, self.length : end], values[:, :, self.length : end] = key_states, value_states
            return keys[:, :, :end], values[:, :, :end]
        keys[rows, :, self.length : end], values[rows, :, self.length : end] = key_states, value_states
        return keys[rows, :, :end], values[rows, :, :end]

    def _hold(self, key_states: Tensor, value_states: Tensor, slot: int, rows: Tensor | None) -> None:
        """Remember K_1 (`first`) or the fp32 sum of K_1..K_t (`average`) of the positions in flight."""
        assert self.keys is not None
        where = slice(None) if rows is None else rows
        if slot == 0:
            shape = (self.keys.shape[1], *key_states.shape[1:])
            wide = torch.promote_types(self.keys.dtype, torch.float32)
            self._held = (key_states.new_zeros(shape, dtype=wide), key_states.new_zeros(shape, dtype=wide))
        if slot == 0 or self.policy == "average":
            assert self._held is not None
            for held, new in zip(self._held, (key_states, value_states), strict=True):
                held[where] += new

    def leave(self, loop: int, num_loops: int, positions: int, rows: Tensor | None) -> None:
        """`rows` (None: all) go no further than `loop` in this pass: leave behind what later positions are to see.

        Args:
            num_loops: loops that the cache serves (`per_loop` fills the slots of all that follow).
            positions: of the pass.
        """
        assert self.keys is not None and self.values is not None
        new, who = slice(self.length, self.length + positions), slice(None) if rows is None else rows
        if self.policy == "per_loop" and loop < num_loops:
            self.reserve(num_loops, self.length + positions)
            for buffer in (self.keys, self.values):
                buffer[loop:, who, :, new] = buffer[loop - 1, who, :, new]
        elif self.policy in ("average", "first"):
            assert self._held is not None
            scale = 1 / loop if self.policy == "average" else 1.0
            for buffer, held in zip((self.keys, self.values), self._held, strict=True):
                buffer[0, who, :, new] = (held[who] * scale).to(buffer.dtype)

    def collapse(self, policy: KVPolicy, shares: Tensor) -> None:
        """Put what `policy` keeps of the per-loop slots into one; the others are freed.

        Args:
            shares: (slots, B, length) fp64, what each loop's keys of a position count for.
        """
        assert self.keys is not None and self.values is not None
        weights = shares.to(self.keys.device)[:, :, None, :, None]
        for name in ("keys", "values"):
            old = getattr(self, name)
            wide, filled = torch.promote_types(old.dtype, torch.float32), slice(self.length)
            kept = sum(loop[:, :, filled] * weight for loop, weight in zip(old, weights.to(wide), strict=True))
            new = old.new_zeros(1, *old.shape[1:])
            new[0, :, :, filled] = kept.to(old.dtype)
            setattr(self, name, new)
        self.policy, self.least_slots = policy, 1  # growing later must not bring the other slots back

    def get_seq_length(self) -> int:
        """Filled positions."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a query of `query_length` sees."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything and free the buffers: the next use may have other rows or loops."""
        self.length, self.is_initialized, self.policy = 0, False, "per_loop"
        self.keys = self.values = self._held = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a negative number, as in transformers' caches."""
        if tokens_to_remove > 0 or -tokens_to_remove > self.length:
            raise ValueError(
                f"crop got {tokens_to_remove}; it must lie in -{self.length}..0 (minus the positions to drop)"
            )
        self.length += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = (x.repeat_interleave(repeats, dim=1) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (and order) the given rows."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = (x.index_select(1, indices.to(x.device)) for x in (self.keys, self.values))


class LoopCache(Cache):
    """The cache of a looped model on transformers' `Cache` interface: prelude, core, then coda layers.

    Args:
        config: the model's configuration; a cache serves models of that layout only.
    """

    def __init__(self, config: OuroConfig) -> None:
        self.layout = _layout(config)
        self.depths: Tensor | None = None
        super().__init__(layers=[LoopSlots() for _ in range(sum(self.layout))])

    @property
    def slots(self) -> list[LoopSlots]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, LoopSlots)]

    @property
    def core(self) -> list[LoopSlots]:
        """The slots of the looped layers."""
        return self.slots[self.layout[0] : self.layout[0] + self.layout[1]]

    @property
    def num_loops(self) -> int:
        """Loops for which the filled positions have keys (0 while empty)."""
        keys = self.core[0].keys
        return 0 if keys is None or self.core[0].length == 0 else keys.shape[0]

    @property
    def policy(self) -> KVPolicy:
        """What the looped layers keep; `per_loop` until a prompt is collapsed."""
        return self.core[0].policy

    @property
    def num_bytes(self) -> int:
        """Bytes of the filled part of all slots."""
        buffers = [(b, s.length) for s in self.slots for b in (s.keys, s.values) if b is not None]
        return sum(b[:, :, :, :length].numel() * b.element_size() for b, length in buffers)

    def plan(self, num_loops: int, positions: int | None = None) -> None:
        """Start empty and say what is coming, so that each buffer is allocated once: loops, and positions if known."""
        self.reset()
        for layer in self.slots:
            layer.least_positions = min(positions, MOST_PLANNED) if positions else layer.least_positions
        for layer in self.core:
            layer.least_slots = num_loops

    def check(self, config: OuroConfig, batch: int, length: int, num_loops: int) -> None:
        """Refuse a pass over (batch, length) tokens that this cache cannot serve.

        Raises:
            ValueError: made for another configuration, another batch size, or for fewer loops; or several tokens at
                once behind a collapsed prompt.
        """
        layout = _layout(config)
        if layout != self.layout:
            raise ValueError(
                f"past_key_values holds layers {self.layout} (prelude, core, coda); this model has {layout}"
            )
        keys = self.core[0].keys
        if keys is None or self.get_seq_length() == 0:
            return
        _, rows, kv_heads, _, head_dim = keys.shape
        if (kv_heads, head_dim) != (config.num_key_value_heads, config.head_dim):
            raise ValueError(
                f"past_key_values has {kv_heads} heads of {head_dim}; "
                f"this model has {config.num_key_value_heads} of {config.head_dim}"
            )
        if rows != batch:
            raise ValueError(f"past_key_values has {rows} rows; the input has {batch}")
        if self.policy != "per_loop":
            if length > 1:
                raise ValueError(
                    f"past_key_values is collapsed (kv_policy {self.policy!r}), with no parallel form: it takes one "
                    f"new token at a time, not {length}; use kv_policy 'per_loop', or start from an empty cache"
                )
        elif num_loops > self.num_loops:
            raise ValueError(
                f"num_loop_steps is {num_loops}, but past_key_values was filled with {self.num_loops} loops; "
                "use at most as many, or start from an empty cache"
            )

    def check_policy(self, policy: KVPolicy) -> None:
        """Refuse to go on under another policy than the filled positions were collapsed by.

        Raises:
            ValueError: the cache was collapsed under another policy.
        """
        if self.get_seq_length() and self.policy not in ("per_loop", policy):
            raise ValueError(
                f"past_key_values is collapsed under {self.policy!r}; kv_policy {policy!r} needs an empty one"
            )

    def collapse(self, policy: KVPolicy) -> None:
        """The prompt is over: keep one slot a looped layer (`per_loop` keeps them all); see `check_policy`."""
        if policy == self.policy:
            return
        assert self.depths is not None and self.policy == "per_loop"
        shares = _shares(policy, self.depths, self.num_loops)
        for layer in self.core:
            layer.collapse(policy, shares)

    def leave(self, loop: int, positions: int, rows: Tensor | None, num_loops: int) -> None:
        """`rows` (None: all) go no further than `loop` in this pass of `num_loops`; see `LoopSlots.leave`."""
        for layer in self.core:
            layer.leave(loop, max(num_loops, self.num_loops), positions, rows)

    def advance(self, depths: Tensor) -> None:
        """A pass is over: count its positions as filled, with their exit depths (B, S), 0 on padding."""
        for layer in self.slots:
            layer.length += depths.shape[1]
        self.depths = depths if self.depths is None else torch.cat((self.depths, depths), dim=1)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.depths = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; a negative number."""
        super().crop(tokens_to_remove)
        if self.depths is not None:
            self.depths = self.depths[:, : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute the batch for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.depths = None if self.depths is None else self.depths.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep (and order) the given rows."""
        super().batch_select_indices(indices)
        self.depths = None if self.depths is None else self.depths[indices.to(self.depths.device)]


def _layout(config: OuroConfig) -> tuple[int, int, int]:
    """Layers of prelude, core and coda."""
    return config.num_prelude_layers, config.num_hidden_layers, config.num_coda_layers


def _shares(policy: KVPolicy, depths: Tensor, num_loops: int) -> Tensor:
    """What K_t counts for in the one slot of a position that left after `depths` (B, S), 0 as 1; (T, B, S) fp64."""
    exits = depths.clamp(min=1)
    loops = torch.arange(1, num_loops + 1, device=depths.device)[:, None, None]
    if policy == "average":
        return (loops <= exits).double() / exits
    return (loops == (exits if policy == "last" else torch.ones_like(exits))).double()

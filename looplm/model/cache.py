"""Keys and values of a looped model: one slot a layer and loop, preallocated, with row updates.

Policy `per_loop` of the depth-exact contract: a query in loop t sees K_min(t, e_j)[j] of an earlier position j that
left after loop e_j. The slots of loops beyond e_j are filled with the keys of loop e_j when the position leaves, so a
loop only ever reads its own slot. At full depth this is the released model's cache (T x L slots).

Differences from transformers' own caches: buffers are preallocated and grow by doubling instead of concatenating, a
pass may write a subset of the rows (those still looping), and the common length advances once, when the pass is over.
Static, quantised and offloaded caches have no notion of loops and are refused by `generate`.
"""

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from looplm.model.configuration import OuroConfig


class LoopSlots(CacheLayerMixin):
    """The slots of one layer: `keys` and `values` are (slots, B, H_kv, capacity, D_h), filled up to `length`."""

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.least_slots, self.least_positions = 1, 16

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
            new = old.new_empty(slots, batch, heads, capacity, head_dim)
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
        end = self.length + key_states.shape[2]
        self.reserve(slot + 1, end)
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[slot], self.values[slot]
        if rows is None:
            keys[:, :, self.length : end], values[:, :, self.length : end] = key_states, value_states
            return keys[:, :, :end], values[:, :, :end]
        keys[rows, :, self.length : end], values[rows, :, self.length : end] = key_states, value_states
        return keys[rows, :, :end], values[rows, :, :end]

    def fill(self, slot: int, slots: int, positions: int, rows: Tensor) -> None:
        """Offer what `rows` wrote into `slot` in this pass to all later slots (they left after loop `slot + 1`)."""
        self.reserve(slots, self.length + positions)
        new = slice(self.length, self.length + positions)
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[slot + 1 :, rows, :, new] = buffer[slot, rows, :, new]

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
        self.length, self.is_initialized = 0, False
        self.keys = self.values = None

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
        self.layout = (config.num_prelude_layers, config.num_hidden_layers, config.num_coda_layers)
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
    def num_bytes(self) -> int:
        """Bytes of the filled part of all slots."""
        buffers = [(b, s.length) for s in self.slots for b in (s.keys, s.values) if b is not None]
        return sum(b[:, :, :, :length].numel() * b.element_size() for b, length in buffers)

    def plan(self, num_loops: int, positions: int | None = None) -> None:
        """Start empty and say what is coming, so that each buffer is allocated once: loops, and positions if known."""
        self.reset()
        for layer in self.slots:
            layer.least_positions = positions or layer.least_positions
        for layer in self.core:
            layer.least_slots = num_loops

    def check(self, config: OuroConfig, batch: int, num_loops: int) -> None:
        """Refuse a pass that this cache cannot serve.

        Raises:
            ValueError: made for another configuration, another batch size, or for fewer loops.
        """
        layout = (config.num_prelude_layers, config.num_hidden_layers, config.num_coda_layers)
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
        if num_loops > self.num_loops:
            raise ValueError(
                f"num_loop_steps is {num_loops}, but past_key_values was filled with {self.num_loops} loops; "
                "use at most as many, or start from an empty cache"
            )

    def advance(self, positions: int) -> None:
        """Count the positions of a finished pass as filled, in every layer."""
        for layer in self.slots:
            layer.length += positions

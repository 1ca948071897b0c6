"""The cache against a slow reference that keeps every position's keys in Python dictionaries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import Tensor

from looplm.model.cache import LoopCache, LoopSlots

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
LAYOUT = {"num_prelude_layers": 1, "num_hidden_layers": 2, "num_coda_layers": 1}
LOOPS = 3
History = list[list[dict[int, Tensor]]]
"""[row][position] -> loop -> keys (H, D_h), for the loops that the position ran."""


def fresh(batch: int, length: int, counter: list[int]) -> Tensor:
    """Keys (B, 2, S, 4) that are different everywhere."""
    counter[0] += 1
    shape = (batch, 2, length, 4)
    return counter[0] * 1000.0 + torch.arange(float(torch.Size(shape).numel())).view(shape)


def visible(position: dict[int, Tensor], loop: int) -> Tensor:
    """K_min(t, e) of a position that left after loop e."""
    return position[min(loop, max(position))]


def run_pass(cache: LoopCache, history: History, length: int, depths: list[int], counter: list[int]) -> None:
    """One pass of `length` positions; row b runs `depths[b]` loops. Checks all that each loop may see."""
    batch = len(depths)
    for row in history:
        row.extend({} for _ in range(length))
    for loop in range(1, max(depths) + 1):
        rows = [b for b in range(batch) if depths[b] >= loop]
        for layer in cache.core:
            start = list(counter)
            keys = fresh(len(rows), length, start)
            everyone = None if len(rows) == batch else torch.tensor(rows)
            seen_keys, seen_values = layer.update(keys, -keys, slot=loop - 1, rows=everyone)
            assert torch.equal(seen_values, -seen_keys)
        counter[0] = start[0]
        for i, b in enumerate(rows):
            for s in range(length):
                history[b][s - length][loop] = keys[i, :, s]
            expected = torch.stack([visible(position, loop) for position in history[b]], dim=1)
            assert torch.equal(seen_keys[i], expected), (loop, b)
        leaving = torch.tensor([b for b in rows if depths[b] == loop])
        if len(leaving):
            cache.leave(loop, length, leaving, LOOPS)
    cache.advance(torch.tensor(depths)[:, None].expand(batch, length))


@QUICK
@given(st.data())
def test_a_loop_sees_what_per_loop_says(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3), label="batch")
    cache, counter = LoopCache(tiny_config(**LAYOUT)), [0]
    cache.plan(LOOPS, data.draw(st.integers(1, 8), label="planned positions"))
    history: History = [[] for _ in range(batch)]
    run_pass(cache, history, data.draw(st.integers(1, 4), label="prompt"), [LOOPS] * batch, counter)
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        action = data.draw(st.sampled_from(["token", "token", "chunk", "crop", "reorder", "repeat"]), label="action")
        if action in ("token", "chunk"):
            depths = data.draw(st.lists(st.integers(1, LOOPS), min_size=batch, max_size=batch), label="depths")
            length = 1 if action == "token" else 3
            run_pass(cache, history, length, depths, counter)
        elif action == "crop" and len(history[0]) > 1:
            cache.crop(-1)
            history = [row[:-1] for row in history]
        elif action == "reorder":
            order = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch), label="order")
            cache.reorder_cache(torch.tensor(order))
            history = [list(map(dict, history[b])) for b in order]
        elif action == "repeat" and batch <= 2:
            cache.batch_repeat_interleave(2)
            history = [list(map(dict, row)) for row in history for _ in range(2)]
            batch *= 2
        assert cache.get_seq_length() == len(history[0]) and cache.num_loops == LOOPS
        assert cache.depths is not None
        assert cache.depths.tolist() == [[max(position) for position in row] for row in history]


def test_without_a_plan_nothing_is_lost_when_the_buffers_grow() -> None:
    layer, counter = LoopSlots(), [0]
    one, two = fresh(2, 3, counter), fresh(2, 3, counter)
    layer.update(one, one, slot=0)
    layer.update(two, two, slot=1)  # a new slot in the middle of a pass
    layer.length = 3
    more = fresh(2, 40, counter)
    assert torch.equal(layer.update(more, more, slot=0)[0], torch.cat([one, more], 2))
    assert torch.equal(layer.update(more, more, slot=1)[0], torch.cat([two, more], 2))


def test_planned_buffers_are_allocated_once() -> None:
    layer = LoopSlots()
    cache = LoopCache(tiny_config(num_hidden_layers=1))
    cache.layers[0] = layer
    cache.plan(LOOPS, 50)
    keys = fresh(2, 5, [0])
    for loop in range(LOOPS):
        layer.update(keys, keys, slot=loop)
    cache.advance(torch.full((2, 5), LOOPS))
    assert layer.keys is not None and layer.keys.shape == (LOOPS, 2, 2, 50, 4)
    address = layer.keys.data_ptr()
    for _ in range(45):
        for loop in range(LOOPS):
            layer.update(keys[:, :, :1], keys[:, :, :1], slot=loop)
        cache.advance(torch.full((2, 1), LOOPS))
    assert layer.keys.data_ptr() == address and layer.get_mask_sizes(1) == (51, 0)
    layer.update(keys[:, :, :1], keys[:, :, :1], slot=0)
    assert layer.keys.shape[3] == 100  # doubled


def test_bytes_loops_and_reset() -> None:
    cache, counter = LoopCache(tiny_config(**LAYOUT)), [0]
    assert (cache.num_loops, cache.num_bytes, cache.get_seq_length()) == (0, 0, 0)
    cache.plan(LOOPS)
    run_pass(cache, [[], []], 5, [LOOPS, LOOPS], counter)
    # 2 core layers x (keys, values) x 3 loops x 2 rows x 2 heads x 5 positions x 4 x 4 bytes
    assert cache.num_bytes == 2 * 2 * 3 * 2 * 2 * 5 * 4 * 4
    cache.reset()
    assert (cache.num_loops, cache.num_bytes, cache.get_seq_length()) == (0, 0, 0)
    cache.plan(2)
    for layer in cache.core:
        for loop in range(2):
            layer.update(fresh(3, 1, counter), fresh(3, 1, counter), slot=loop)
    cache.advance(torch.full((3, 1), 2))
    assert cache.num_loops == 2  # fewer loops and more rows than before the reset


def test_crop_out_of_range() -> None:
    cache = LoopCache(tiny_config())
    for tokens in (1, -1):
        with pytest.raises(ValueError, match=rf"crop got {tokens}; "):
            cache.layers[0].crop(tokens)


def test_check_refuses_what_the_cache_cannot_serve() -> None:
    config = tiny_config(num_key_value_heads=2, head_dim=4)
    cache = LoopCache(config)
    cache.check(config, 5, 7, 9)
    with pytest.raises(ValueError, match=r"holds layers \(0, 2, 0\) .* this model has \(1, 2, 0\)"):
        cache.check(tiny_config(num_prelude_layers=1), 5, 1, 3)
    cache.plan(LOOPS)
    run_pass(cache, [[]], 2, [LOOPS], [0])
    cache.check(config, 1, 4, 2)
    with pytest.raises(ValueError, match="has 1 rows; the input has 2"):
        cache.check(config, 2, 1, 2)
    with pytest.raises(ValueError, match="num_loop_steps is 4, but past_key_values was filled with 3 loops"):
        cache.check(config, 1, 1, 4)
    with pytest.raises(ValueError, match="has 2 heads of 4; this model has 4 of 8"):
        cache.check(tiny_config(), 1, 1, 2)

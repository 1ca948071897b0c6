"""What a row sees in its pages: gathered for all rows at once, and row by row, against a slow look-up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.engine.kv_pool import BLOCK, KVPool
from looplm.engine.paged_pass import SHORT, Pages, Span


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.integers(0, 7 * BLOCK - 1), min_size=1, max_size=4),
    scattered=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_row_by_row_is_what_is_gathered(positions: list[int], scattered: list[bool], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    pages = len(positions) * 8 + 2
    pool = KVPool(
        tiny_config(),
        budget=1 << 24,
        num_loops=3,
        single_slot=False,
        rows=4,
        max_positions=128,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    store = torch.randn(pages, BLOCK, 2, 4, 8, generator=draw, dtype=torch.float64)
    before, count = store.clone(), max(positions) // BLOCK + 1
    table = torch.stack(
        [
            (torch.randperm(8, generator=draw) if scatter else torch.arange(8))[:count] + 2 + 8 * row
            for row, (_, scatter) in enumerate(zip(positions, scattered, strict=False))
        ]
    )
    key, value = torch.randn(2, len(positions), 4, 1, 8, generator=draw, dtype=torch.float64)
    where = torch.tensor(positions)[:, None]
    looked = Pages.at(pool, table, where, where >= 0)
    assert (looked.spans is not None) == (len(positions) == 1 or count * BLOCK * 512 > SHORT)
    looked = Pages(looked.table, looked.places, Span.of(table, where[:, 0]))
    apart = looked.apart(key, value, store)
    after = store.clone()
    gathered = looked.exchange(key, value, store, pool, max(positions) + 1)
    for row, position in enumerate(positions):
        before[table[row, position // BLOCK], position % BLOCK] = torch.stack((key[row, :, 0], value[row, :, 0]))
        slow = torch.stack([before[table[row, p // BLOCK], p % BLOCK] for p in range(position + 1)])
        for kind in (0, 1):
            assert torch.equal(apart[row][kind][0].transpose(0, 1), slow[:, kind])
            assert torch.equal(gathered[kind][row, :, : position + 1].transpose(0, 1), slow[:, kind])
    assert torch.equal(after, before)


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_pages_of_a_lone_request_are_one_run_and_are_not_copied(policy: str) -> None:
    engine = Engine(tiny_model(), kv_policy=policy, kv_bytes=4 << 20, prefix_cache=False)
    [sequence] = engine.prepare(tokens(20, seed=1).tolist(), SamplingParams(max_tokens=60, exit_threshold=0.6))
    engine.submit([sequence])
    while sequence.filled < 70:
        engine.step()
    for loop in range(3):
        table = engine.pool.tables[sequence.slot, loop : loop + 1]
        [span] = Span.of(table, torch.tensor([sequence.filled - 1]))
        assert span.start is not None and span.length == sequence.filled
        new = torch.zeros(2, 1, 4, 1, 8, dtype=torch.float64)
        [(keys, _)] = Pages(table, torch.tensor([16]), [span]).apart(new[0], new[1], engine.pool.core[0])
        assert keys.untyped_storage().data_ptr() == engine.pool.core.untyped_storage().data_ptr()

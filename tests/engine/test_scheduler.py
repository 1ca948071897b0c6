"""Pages and turns: the byte budget, tables, prefix blocks; order, fairness, and that passes are really shared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import blocks_are_free
from tiny import tiny_config, tiny_model, tokens

from looplm.engine import Engine, SamplingParams
from looplm.engine.kv_pool import BLOCK, ZERO, Block, KVPool
from looplm.engine.scheduler import PATIENCE
from looplm.engine.sequence import Sequence
from looplm.exits import FixedDepth

MODEL = tiny_model()
PAGE = 2 * BLOCK * 2 * 32 * 8


def pool(budget: int = 20 * PAGE, single_slot: bool = False, **config: int) -> KVPool:
    return KVPool(
        tiny_config(**config),
        budget=budget,
        num_loops=3,
        single_slot=single_slot,
        rows=4,
        max_positions=128,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


# --- the pool ---


@settings(max_examples=60, deadline=None)
@given(budget=st.integers(20, 400), edges=st.integers(0, 2), single_slot=st.booleans())
def test_the_budget_is_hard_and_used(budget: int, edges: int, single_slot: bool) -> None:
    made = pool(budget * PAGE // 2, single_slot, num_prelude_layers=edges)
    assert made.num_bytes <= budget * PAGE // 2
    most = 4 * 8 * 3  # rows x blocks of the context, per loop
    unit = (1 if single_slot else 3) * PAGE + edges * PAGE // 2
    assert made.capacity == most or made.num_bytes + unit > budget * PAGE // 2


def test_bytes_a_token_by_hand() -> None:
    """Two layers, four heads of eight, keys and values, fp64: 1024 bytes a token and loop."""
    assert pool().page_bytes == 1024 * BLOCK
    model = tiny_model()
    held = {}
    for policy in ("per_loop", "last"):
        engine = Engine(model, kv_policy=policy, kv_bytes=1 << 20)
        sequence = engine.prepare(tokens(30, seed=1).tolist(), SamplingParams(max_tokens=9))[0]
        engine.submit([sequence])
        while not sequence.new:
            engine.step()
        held[policy] = engine.pool.pages_in_use * engine.pool.page_bytes
    assert held == {"per_loop": 2 * 3 * PAGE, "last": 2 * PAGE}, "behind the prompt: 1 / T"


def test_pages_come_zeroed() -> None:
    made = pool(5 * PAGE)
    block = made.allocate(1, 3)[0]
    made.core[:, block.pages] = torch.nan
    made.release(block)
    again = made.allocate(1, 3)[0]
    assert sorted(again.pages) == sorted(block.pages) and (made.core[:, again.pages] == 0).all()
    made.core[:, again.pages] = torch.nan
    made.release(again)
    pages = made.core[:, made.allocate(1, 3, filled=5)[0].pages]
    assert (pages[:, :, 5:] == 0).all() and pages[:, :, :5].isnan().all(), "what the caller writes is left to him"


def test_slots_beyond_the_exit_by_hand() -> None:
    """Position 17 left after loop 1 of 3, position 18 after 2, position 0 of a row of two loops after 1."""
    made = pool()
    first, second, other = made.allocate(2, 3), made.allocate(1, 2), made.allocate(1, 3)
    made.bind(0, first)
    made.bind(2, second)
    for page in range(2, made.core.shape[1]):
        made.core[:, page] = page
    before = made.core.clone()
    arrange = [torch.tensor(x) for x in ([0, 0, 2], [17, 18, 0], [1, 2, 1], [3, 3, 2])]
    made.fill(*arrange)
    one, two, three = first[1].pages
    before[:, [two, three], 1] = float(one)
    before[:, three, 2] = float(two)
    before[:, second[0].pages[1], 0] = float(second[0].pages[0])
    assert torch.equal(made.core, before) and other


def test_tables_by_hand() -> None:
    made = pool(num_prelude_layers=1)
    blocks = [Block([5, 6, 7], 3), Block([9], 4)]
    made.bind(1, blocks[:1])
    made.bind(1, blocks, 1)
    assert made.tables[1, :, :3].tolist() == [[5, 9, 0], [6, 9, 0], [7, 9, 0]]
    assert made.edge_tables[1, :3].tolist() == [3, 4, 0] and (made.tables[0] == ZERO).all()
    made.unbind(1)
    assert (made.tables == ZERO).all() and (made.edge_tables == ZERO).all()


def test_prefixes_that_nobody_holds_make_room_oldest_first() -> None:
    made = pool(8 * PAGE)  # two blocks of three loops
    blocks = made.allocate(2, 3)
    for number, block in enumerate(blocks):
        made.publish(block, f"key {number}", (3,) * BLOCK)
        made.release(block)
    assert made.pages_in_use == 0 and made.available == 6
    kept = made.find("key 1")
    assert kept is blocks[1] and made.pages_in_use == 3
    assert made.allocate(2, 3) is None and made.find("key 0") is None
    assert made.allocate(1, 3) is not None
    assert made.find("key 1") is kept and kept.holders == 2


# --- turns ---


def finishing_order(engine: Engine, sequences: list[Sequence]) -> list[int]:
    order = []
    while engine.busy:
        order += [s.request for s in engine.step() if s.finish_reason is not None]
        assert engine.pool.pages_in_use <= engine.pool.capacity
    assert all(s.finish_reason == "length" for s in sequences)
    return order


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_sixty_four_requests_in_a_pool_for_eight(policy: str) -> None:
    """All finish, those that came first finish first (rows overtake by their depths only), nothing is left."""
    pages = 8 * 2 * (3 if policy == "per_loop" else 1) + 3
    engine = Engine(MODEL, kv_policy=policy, kv_bytes=(pages + 2) * PAGE, max_rows=16, prefix_cache=False)
    made = []
    for number in range(64):
        prompt = tokens(8 + number % 5, seed=number).tolist()
        made += engine.prepare(prompt, SamplingParams(max_tokens=14, exit_threshold=0.6))
        engine.submit(made[-1:])
    order = finishing_order(engine, made)
    assert sorted(order) == list(range(64))
    assert max(abs(place - request) for place, request in enumerate(order)) <= 16
    blocks_are_free(engine)


def test_equal_requests_finish_in_their_order() -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20, max_rows=1)
    made = [engine.prepare([3, 4, 5], SamplingParams(max_tokens=2))[0] for _ in range(4)]
    for sequence in made:
        engine.submit([sequence])
    assert finishing_order(engine, made) == [0, 1, 2, 3]


def test_priority_overtakes_but_not_for_ever() -> None:
    engine = Engine(MODEL, kv_bytes=1 << 20, max_rows=1)
    params = SamplingParams(max_tokens=1)
    made = [engine.prepare([3, 4], params)[0] for _ in range(3)]
    made += [engine.prepare([3, 4], params, priority=1)[0] for _ in range(PATIENCE + 3)]
    for sequence in made:
        engine.submit([sequence])
    order = finishing_order(engine, made)
    high = list(range(3, PATIENCE + 6))
    assert order[:5] == high[:5], "the urgent ones first"
    assert order.index(0) == PATIENCE - 3, "as many as PATIENCE arrivals overtake the first request, no more"


def test_the_last_in_line_gives_way() -> None:
    """The first request never waits for room; it is those behind that are sent back, and they come back in order."""
    engine = Engine(MODEL, kv_bytes=(3 * 4 + 2) * PAGE, max_rows=3, prefix_cache=False)
    made = [engine.prepare(tokens(15, seed=i).tolist(), SamplingParams(max_tokens=40))[0] for i in range(3)]
    for sequence in made:
        engine.submit([sequence])
    lost, order = set(), []
    while engine.busy:
        slots = [s.slot for s in made]
        order += [s.request for s in engine.step() if s.finish_reason is not None]
        lost |= {i for i in range(3) if slots[i] is not None and made[i].slot is None and not made[i].finish_reason}
    assert engine.scheduler.preemptions > 0 and 0 not in lost and order == [0, 1, 2]
    blocks_are_free(engine)


# --- the passes ---


def core_calls(engine: Engine) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    layer = engine.model.model.layers[0]
    layer.register_forward_hook(lambda _, inputs, __: calls.append((inputs[0].shape[0], inputs[0].shape[1])))
    return calls


def test_a_tick_is_one_pass_over_rows_at_different_loops() -> None:
    """Depths 1, 2 and 3: each row comes back in the tick after its exit, and no pass is run for one loop alone."""
    engine = Engine(tiny_model(), kv_bytes=1 << 20)
    params = [SamplingParams(max_tokens=7, exit_rule=FixedDepth(depth)) for depth in (1, 2, 3)]
    calls = core_calls(engine)
    found = engine.generate([[3, 4, 5]] * 3, params)
    assert [c.exit_depths for c in found] == [[3] + [depth] * 6 for depth in (1, 2, 3)]
    decoding = [rows for rows, length in calls if length == 1]
    assert len(calls) - len(decoding) == 3, "one prompt pass a loop, shared"
    # six tokens of depths 1, 2, 3 take 6, 12 and 18 passes, all within the same 18
    assert decoding == [3] * 6 + [2] * 6 + [1] * 6
    assert engine.ticks == 3 + 18 and engine.runner.row_passes == 36


def test_chunks_run_beside_decoding() -> None:
    """While a long prompt comes in chunk by chunk, the row that decodes has a pass in every tick."""
    engine = Engine(tiny_model(), kv_bytes=1 << 20, chunk_tokens=8)
    calls = core_calls(engine)
    first = engine.prepare([3, 4], SamplingParams(max_tokens=12))[0]
    engine.submit([first])
    while not first.new:
        engine.step()
    calls.clear()
    long = engine.prepare(tokens(40, seed=1).tolist(), SamplingParams(max_tokens=2))[0]
    engine.submit([long])
    while not long.new:
        engine.step()
    assert sum(length > 1 for _, length in calls) == 5 * 3, "five chunks, three loops each"
    assert sum(length == 1 for _, length in calls) == 5 * 3
    assert len(first.new) == 1 + 5


def test_short_prompts_share_their_passes() -> None:
    engine = Engine(tiny_model(), kv_bytes=1 << 20, chunk_tokens=32)
    calls = core_calls(engine)
    engine.generate([tokens(n, seed=n).tolist() for n in (7, 8, 5, 3)], SamplingParams(max_tokens=1))
    assert calls == [(4, 8)] * 3
    calls.clear()
    engine.generate([tokens(n, seed=30 + n).tolist() for n in (7, 20)], SamplingParams(max_tokens=1))
    assert calls == [(1, 7)] * 3 + [(1, 20)] * 3, "padding counts: two rows of 20 are more than 32"


@pytest.mark.parametrize(("late", "most"), [({}, 1), ({"max_loops": 2}, 2), ({"exit_threshold": 0.9}, 2)])
def test_rows_of_one_depth_fall_into_step(late: dict[str, float], most: int) -> None:
    """At one full depth a newcomer starts with the others; where depths differ or are open it does not wait."""
    engine = Engine(tiny_model(), kv_bytes=1 << 20)
    first = engine.prepare(tokens(5, seed=1).tolist(), SamplingParams(max_tokens=20))[0]
    engine.submit([first])
    while not first.new:
        engine.step()
    engine.step()  # its token is between loops 1 and 2 when the other's prompt begins
    second = engine.prepare(tokens(5, seed=2).tolist(), SamplingParams(max_tokens=8, **late))[0]
    engine.submit([second])
    flying = []
    while engine.busy:
        engine.step()
        flying.append(len(engine.runner.flight.loops.unique()))
    assert max(flying) == most and len(second.new) == 8
    blocks_are_free(engine)

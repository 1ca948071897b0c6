"""One merged rule judges every row as its own rule would, alone."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.engine.rules import Replayed, merge
from looplm.exit_tracker import ExitTracker
from looplm.exits import Confidence, ExitRule, FixedDepth, LoopView, QExit, SampledExit, StateDifference

CPU, ONE = torch.device("cpu"), torch.tensor([1])


class Third:
    """A rule of one's own, which expects one loop at a time: rows whose position is a multiple of three stop."""

    def __call__(self, view: LoopView) -> torch.Tensor:
        assert isinstance(view.loop, int) and (view.previous_state is None) == (view.loop == 1)
        return view.positions % 3 == 0


RULES: st.SearchStrategy[Any] = st.one_of(
    st.floats(0.05, 1.0).map(QExit),
    st.integers(1, 4).map(FixedDepth),
    st.floats(0.5, 4.0).map(StateDifference),
    st.integers(0, 2**62 - 1).map(SampledExit),
    st.builds(Confidence, st.sampled_from(["max_probability", "entropy", "kl"]), st.floats(0.1, 1.0)),
    st.just(Third()),
)


def depths(rule: ExitRule, gates: torch.Tensor, states: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """Where the rule stops the given rows of four loops; `rows` are numbered from 0 for the rule."""
    tracker = ExitTracker(rule, torch.arange(len(rows)), 10 * rows, 1, 4)
    for loop in range(1, 5):
        active = rows[tracker.active]
        if len(active):
            tracker.step(loop, gates[active, loop - 1], states[active, loop - 1], lambda x: x.log_softmax(-1))
    return tracker.depths.tolist()


@settings(max_examples=100, deadline=None)
@given(rules=st.lists(RULES, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_each_row_is_judged_by_its_own_rule(rules: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(len(rules), 4, generator=generator)
    states = torch.randn(len(rules), 4, 6, generator=generator, dtype=torch.float64)
    found = depths(merge(rules, CPU), gates, states, torch.arange(len(rules)))
    alone = [depths(rule, gates, states, torch.tensor([row]))[0] for row, rule in enumerate(rules)]
    assert found == alone


@settings(max_examples=100, deadline=None)
@given(rules=st.lists(RULES, min_size=1, max_size=6), starts=st.data(), seed=st.integers(0, 99))
def test_rows_in_loops_of_their_own_are_judged_as_alone(rules: list[Any], starts: st.DataObject, seed: int) -> None:
    """Each place starts when it likes, twice; what was there before it says nothing to it."""
    n, generator = len(rules), torch.Generator().manual_seed(seed)
    gates = torch.randn(2 * n, 4, generator=generator)
    states = torch.randn(2 * n, 4, 6, generator=generator, dtype=torch.float64)
    places = torch.arange(n)
    tracker = ExitTracker(merge(rules, CPU), places, 0 * places, 0 * places + 1, 0 * places + 4)
    tracker.active = places[:0]
    loops, lives, waits = [0] * n, [-1] * n, starts.draw(st.lists(st.integers(0, 3), min_size=2 * n, max_size=2 * n))
    found: dict[int, tuple[int, list[float], float]] = {}
    while len(found) < 2 * n:
        for place in range(n):
            life = lives[place] + 1
            if place not in tracker.active.tolist() and life < 2:
                waits[place + life * n] -= 1
                if waits[place + life * n] < 0:
                    row = place + life * n
                    tracker.enter(torch.tensor([place]), torch.tensor([10 * row]), ONE, 4 * ONE)
                    loops[place], lives[place] = 0, life
        active = tracker.active.tolist()
        if not active:
            continue
        for place in active:
            loops[place] += 1
        rows, now = torch.tensor([p + lives[p] * n for p in active]), torch.tensor([loops[p] for p in active])
        stops = tracker.step(now, gates[rows, now - 1], states[rows, now - 1], lambda x: x.log_softmax(-1))
        for place, row, stop in zip(active, rows.tolist(), stops.tolist(), strict=True):
            if stop:
                depth = int(tracker.depths[place])
                found[row] = (
                    depth,
                    tracker.log_probabilities[place, :depth].tolist(),
                    float(tracker.log_survival[place]),
                )
    for row, (depth, log_p, survival) in found.items():
        alone = ExitTracker(rules[row % n], 0 * ONE, 10 * row * ONE, 1, 4)
        for loop in range(1, 5):
            if len(alone.active):
                state = states[row : row + 1, loop - 1]
                alone.step(loop, gates[row : row + 1, loop - 1], state, lambda x: x.log_softmax(-1))
        assert depth == int(alone.depths[0])
        assert log_p == alone.log_probabilities[0, :depth].tolist() and survival == float(alone.log_survival[0])


def test_rules_of_a_kind_become_one() -> None:
    merged = merge([QExit(0.5), QExit(0.25)], CPU)
    assert isinstance(merged, QExit) and torch.as_tensor(merged.threshold).tolist() == [0.5, 0.25]
    assert merge([QExit(0.5)] * 3, CPU) == QExit(0.5)
    seeds = merge([SampledExit(2**62 - 1), SampledExit(1)], CPU)
    assert isinstance(seeds, SampledExit) and torch.as_tensor(seeds.seed).tolist() == [2**62 - 1, 1]


def test_known_depths_come_first() -> None:
    """Positions 0 and 2 are recorded; 1 and 3 are judged."""
    rule = Replayed(torch.tensor([2, 0, 1, 0]), FixedDepth(3))
    assert depths(rule, torch.zeros(4, 4), torch.zeros(4, 4, 1), torch.arange(4)) == [2, 3, 1, 3]

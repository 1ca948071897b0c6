"""The tracker with limits one a position, against the definitions in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.exit_tracker import ExitTracker
from looplm.exits import Confidence, FixedDepth, QExit, RecordedDepth, StateDifference

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


def run(tracker: ExitTracker, gates: torch.Tensor, states: torch.Tensor | None = None) -> list[int]:
    """Feed (N, T) gate logits until nobody is left; how many positions each loop ran."""
    ran = []
    for loop in range(1, gates.shape[1] + 1):
        active = tracker.active
        if not len(active):
            break
        ran.append(len(active))
        state = torch.zeros(len(active), 1) if states is None else states[active, loop - 1]
        tracker.step(loop, gates[active, loop - 1], state, lambda s: s)
    return ran


def slow_exit(gates: list[float], q: float, least: int, most: int) -> tuple[int, list[float], float]:
    """Depth, p_1..p_e and the survival at e by equation 3, with hazards 0 before `least` and 1 at `most`."""
    survival, p = 1.0, []
    for loop in range(1, most + 1):
        hazard = 1 / (1 + math.exp(-gates[loop - 1]))
        hazard = 1.0 if loop == most else 0.0 if loop < least else hazard
        p.append(survival * hazard)
        survival *= 1 - hazard
        if loop == most or (loop >= least and 1 - survival >= q):
            break
    return len(p), p, survival


@QUICK
@given(st.data())
def test_limits_one_a_position(data: st.DataObject) -> None:
    n, loops = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    most = [data.draw(st.integers(1, loops)) for _ in range(n)]
    least = [data.draw(st.integers(1, m)) for m in most]
    q = data.draw(st.sampled_from([0.15, 0.5, 0.85, 1.0]))
    gates = [[data.draw(st.sampled_from([-3.0, -0.7, 0.3, 2.0])) for _ in range(loops)] for _ in range(n)]
    tracker = ExitTracker(
        QExit(q), torch.zeros(n, dtype=torch.long), torch.arange(n), torch.tensor(least), torch.tensor(most), loops
    )
    ran = run(tracker, torch.tensor(gates))
    expected = [slow_exit(g, q, low, high) for g, low, high in zip(gates, least, most, strict=True)]
    assert tracker.depths.tolist() == [depth for depth, _, _ in expected]
    assert ran == [sum(depth >= loop for depth, _, _ in expected) for loop in range(1, len(ran) + 1)]
    for i, (depth, p, survival) in enumerate(expected):
        row = tracker.log_probabilities[i].exp()
        torch.testing.assert_close(row[:depth], torch.tensor(p), atol=1e-6, rtol=1e-5)
        assert row[depth:].isnan().all() and len(row) == loops
        assert math.isclose(float(tracker.log_survival[i].exp()), survival, abs_tol=1e-6)


def test_a_table_by_hand() -> None:
    """Hazards 1/2 throughout: p = 1/2, 1/4, ...; with min_loops 2 the first is 0, and at max_loops all is left."""
    tracker = ExitTracker(
        QExit(0.7), torch.zeros(3, dtype=torch.long), torch.arange(3), torch.tensor([1, 2, 1]), torch.tensor([4, 4, 1])
    )
    assert run(tracker, torch.zeros(3, 4)) == [3, 2, 1]
    assert tracker.depths.tolist() == [2, 3, 1]
    nan = math.nan
    expected = torch.tensor([[0.5, 0.25, nan, nan], [0.0, 0.5, 0.25, nan], [1.0, nan, nan, nan]])
    torch.testing.assert_close(tracker.log_probabilities.exp(), expected, equal_nan=True)
    torch.testing.assert_close(tracker.log_survival.exp(), torch.tensor([0.25, 0.25, 0.0]))


def test_rules_that_compare_loops_have_a_predecessor_at_min_loops() -> None:
    """Also where a position with smaller limits has left in between."""
    states = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 9.0, 9.0, 9.0], [0.0, 7.0, 7.1, 9.0]])[..., None]
    tracker = ExitTracker(
        StateDifference(0.5), torch.zeros(3, dtype=torch.long), torch.arange(3), torch.tensor([1, 3, 3]), 4
    )
    run(tracker, torch.zeros(3, 4), states)
    assert tracker.depths.tolist() == [2, 3, 3]


def test_dropping_positions_leaves_the_others_as_they_are() -> None:
    """Between loops some are forgotten: the rest compare with their own loop before, states and read-outs alike."""
    generator = torch.Generator().manual_seed(0)
    gates, states = torch.randn(6, 4, generator=generator), torch.randn(6, 4, 5, generator=generator)
    gone = {1: [True, False, False, True, False, False], 2: [False, True, False, False]}
    for rule in (StateDifference(2.5), Confidence("kl", 0.9), QExit(0.7)):
        trackers = [ExitTracker(rule, torch.arange(6), torch.arange(6), 3, 4) for _ in range(2)]
        for loop in range(1, 5):
            for tracker, drops in zip(trackers, (gone, {}), strict=True):
                active = tracker.active
                tracker.step(loop, gates[active, loop - 1], states[active, loop - 1], lambda x: x.log_softmax(-1))
                if loop in drops:
                    tracker.drop(torch.tensor(drops[loop]))
        kept = [1, 4, 5]
        assert trackers[0].depths[kept].tolist() == trackers[1].depths[kept].tolist()
        assert trackers[0].depths[[0, 2, 3]].tolist() == [0, 0, 0]
        for name in ("log_probabilities", "log_survival"):
            found, whole = (getattr(tracker, name)[kept] for tracker in trackers)
            torch.testing.assert_close(found, whole, equal_nan=True)


def test_places_start_anew_by_hand() -> None:
    """Hazards 1/2: place 0 is in loop 2 when place 2 starts; p of the first is 1/4 there, of the other 1/2."""
    places = torch.arange(3)
    tracker = ExitTracker(FixedDepth(2), places, places.clone(), places * 0 + 1, places * 0 + 4)
    tracker.drop(torch.tensor([False, True, True]))
    tracker.step(1, torch.zeros(1), torch.zeros(1, 1), lambda s: s)
    tracker.enter(torch.tensor([2]), torch.tensor([7]), torch.tensor([1]), torch.tensor([4]))
    assert tracker.active.tolist() == [0, 2] and tracker.positions.tolist() == [0, 1, 7]
    stops = tracker.step(torch.tensor([2, 1]), torch.zeros(2), torch.zeros(2, 1), lambda s: s)
    assert stops.tolist() == [True, False] and tracker.depths.tolist() == [2, 0, 0]
    torch.testing.assert_close(tracker.log_probabilities[0, :2].exp(), torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(tracker.log_probabilities[2, :1].exp(), torch.tensor([0.5]))
    tracker.enter(torch.tensor([0]), torch.tensor([8]), torch.tensor([1]), torch.tensor([4]))
    assert tracker.log_probabilities[0].isnan().all() and float(tracker.log_survival[0]) == 0


def test_recorded_depths_and_their_padding() -> None:
    depths = torch.tensor([[0, 2, 1], [3, 1, 0]])
    tracker = ExitTracker(RecordedDepth(depths), torch.tensor([0, 0, 0, 1, 1, 1]), torch.arange(6), 1, 3)
    assert run(tracker, torch.zeros(6, 3)) == [6, 2, 1]
    assert tracker.depths.tolist() == [1, 2, 1, 3, 1, 1]


@pytest.mark.parametrize(("least", "most"), [(0, 3), (4, 3), (torch.tensor([1, 3]), torch.tensor([3, 2]))])
def test_limits_that_cannot_be(least: int | torch.Tensor, most: int | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^min_loops is .*; it must lie in 1\.\.max_loops = "):
        ExitTracker(FixedDepth(1), torch.zeros(2, dtype=torch.long), torch.arange(2), least, most)

"""Schedules against tables worked out by hand, and their properties."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.training.recipe import Stage
from looplm.training.schedule import Budget, exit_beta, learning_rate, learning_rate_factor

fractions = st.floats(0, 1)
decays = st.sampled_from(["linear", "cosine"])


@pytest.mark.parametrize(
    ("step", "progress", "expected"),
    [
        (0, 0.0, 0.25),  # warmup: (0 + 1) / 4
        (1, 0.0, 0.5),
        (3, 0.1, 1.0),
        (50, 0.5, 1.0),  # stable
        (60, 0.6, 1.0),  # decay begins at 1 - 0.4
        (80, 0.8, 0.6),  # halfway: 1 - 0.8 * 0.5
        (90, 0.9, 0.4),
        (99, 1.0, 0.2),
        (1, 0.8, 0.3),  # a run so short that it decays while it warms up: 0.5 * 0.6
    ],
)
def test_learning_rate_by_hand(step, progress, expected):
    factor = learning_rate_factor(step, progress, warmup_steps=4, decay_fraction=0.4, final=0.2)
    assert factor == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warmup_or_decay_is_constant():
    assert [learning_rate_factor(0, p / 4, 0, 0.0, 0.1) for p in range(5)] == [1.0] * 5
    assert learning_rate_factor(0, 0.25, 0, 1.0, 0.0) == 0.75  # decay over all of the run


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.5, 1.0), (0.625, 0.868198), (0.75, 0.55), (0.875, 0.231802), (1.0, 0.1)],
)
def test_cosine_decay_by_hand(progress, expected):
    # over the last half: 1 - 0.9 (1 - cos(pi x)) / 2 at x = 0, 1/4 (0.146447), 1/2, 3/4, 1
    assert learning_rate_factor(9, progress, 0, 0.5, 0.1, "cosine") == pytest.approx(expected, abs=1e-6)


def test_a_stage_gives_its_rates():
    stage = Stage(name="x", steps=10, learning_rate=3e-4, final_learning_rate=3e-5, decay="cosine", warmup_steps=2)
    rates = [learning_rate(stage, step, step / 10) for step in (0, 5, 10)]
    # half of the peak in warmup; the middle of the cosine; the final rate itself
    assert rates == pytest.approx([1.5e-4, (3e-4 + 3e-5) / 2, 3e-5])
    constant = stage.model_copy(update={"final_learning_rate": None})
    assert [learning_rate(constant, step, step / 10) for step in (1, 5, 10)] == [3e-4] * 3


@given(st.integers(0, 10**6), fractions, st.integers(0, 1000), fractions, st.floats(0.001, 1), decays)
def test_learning_rate_stays_in_the_unit_interval(step, progress, warmup, fraction, final, decay):
    assert 0 < learning_rate_factor(step, progress, warmup, fraction, final, decay) <= 1


@given(st.integers(0, 2000), fractions, fractions, st.integers(0, 1000), st.floats(0.01, 1), fractions)
def test_learning_rate_is_continuous_and_falls_with_progress(step, first, second, warmup, decay, final):
    low, high = sorted((first, second))
    early, late = (learning_rate_factor(step, p, warmup, decay, final) for p in (low, high))
    assert late <= early + 1e-12
    assert early - late <= (high - low) * (1 - final) / decay + 1e-12  # its slope, so no jump anywhere


@given(st.integers(1, 1000), st.floats(0.01, 1), fractions, decays)
def test_learning_rate_ends_at_final(warmup, fraction, final, decay):
    assert learning_rate_factor(warmup, 1.0, warmup, fraction, final, decay) == pytest.approx(final, abs=1e-12)


@given(st.integers(1, 1000))
def test_warmup_is_linear_and_reaches_the_peak(warmup):
    rates = [learning_rate_factor(step, 0.0, warmup, 0.3, 0.1) for step in range(warmup + 1)]
    assert rates[:-1] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert rates[warmup - 1] == rates[warmup] == 1.0


@pytest.mark.parametrize(
    ("progress", "start", "expected"),
    [(0.0, 1.0, 1.0), (0.59, 1.0, 1.0), (0.6, 1.0, 0.1), (1.0, 1.0, 0.1), (0.0, None, 0.1), (0.9, None, 0.1)],
)
def test_exit_beta_by_hand(progress, start, expected):
    assert exit_beta(progress, start, hold=0.6, end=0.1) == expected


def test_exit_beta_may_start_at_zero():
    assert exit_beta(0.0, 0.0, 0.5, 0.1) == 0.0  # 0 is a value, not "no start"


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_budget_of_steps_ignores_the_clock(clock):
    budget = Budget(8, None)
    clock[0] += 600
    assert [budget.progress(step) for step in (0, 2, 8, 9)] == [0, 0.25, 1, 1]
    assert budget.elapsed_minutes == 10


def test_a_budget_of_minutes_follows_the_clock_from_when_it_was_made(clock):
    budget = Budget(None, 2.0)
    assert budget.progress(10**6) == 0
    clock[0] += 30
    assert (budget.progress(0), budget.elapsed_minutes) == (0.25, 0.5)
    clock[0] += 1000
    assert budget.progress(0) == 1


def test_a_budget_goes_on_from_what_an_earlier_process_spent(clock):
    budget = Budget(None, 2.0, before=1.5)
    clock[0] += 15
    assert (budget.progress(0), budget.elapsed_minutes) == (0.875, 1.75)

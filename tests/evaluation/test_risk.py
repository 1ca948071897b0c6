"""The bound by hand, its coverage by simulation, and that fixed-sequence testing keeps its promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.evaluation.risk import passed, upper_bound, upper_increase


@pytest.mark.parametrize(
    ("values", "delta", "expected"),
    [
        # delta 1/2, one value: v = min(1, sqrt(2 ln 2 / .25)) = 1; K = 1 - z + R > 2 needs R > 1 + z: the bound is 1.
        ([0.0], 0.5, 1.0),
        # two zeros: v_1 = v_2 = 1, K_2 = (1 + R)^2 > 2 at R > sqrt(2) - 1.
        ([0.0, 0.0], 0.5, math.sqrt(2) - 1),
        # delta .9: v_1 = sqrt(.210721 / .5) = .649186; mu_1 = .25, s_1^2 = (.25 + .0625) / 2 = .15625, so
        # v_2 = sqrt(.210721 / .3125) = .821162; (1 + v_1 R)(1 + v_2 R) = 1 / .9 at R = .073604.
        ([0.0, 0.0], 0.9, 0.073604),
        # a one and a zero: mu_1 = .75, the same s_1 and v_2; (1 - v_1 (1 - R))(1 + v_2 R) = 1 / .9 at R = .603818.
        ([1.0, 0.0], 0.9, 0.603818),
    ],
)
def test_the_bound_by_hand(values: list[float], delta: float, expected: float) -> None:
    assert upper_bound(np.array(values), delta) == pytest.approx(expected, abs=2e-6)


def test_increases_are_scaled_cut_and_scaled_back() -> None:
    # z = (x + 1/4) / (1/2): two increases at or below -1/4 are two zeros, U = .41421, back at .41421 / 2 - 1/4.
    assert upper_increase(np.array([-0.25, -9.0]), 0.5) == pytest.approx((math.sqrt(2) - 1) / 2 - 0.25)


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1], [math.nan]])
def test_what_is_no_sample_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a bound needs at least one, and all of them in \[0, 1\]"):
        upper_bound(np.array(values), 0.1)
    with pytest.raises(ValueError, match="delta is 0"):
        upper_bound(np.array([0.5]), 0.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.01, 0.9))
@settings(max_examples=60, deadline=None)
def test_the_bound_solves_its_equation(values: list[float], delta: float) -> None:
    """Just above U the game's best wealth exceeds 1/delta, just below it does not, computed one value at a time."""

    def best(mean: float) -> float:
        wealth, most, total, squares, variance = 1.0, 0.0, 0.0, 0.0, 0.25
        for i, z in enumerate(values, start=1):
            bet = min(1.0, math.sqrt(2 * math.log(1 / delta) / (len(values) * variance)))
            wealth *= 1 - bet * (z - mean)
            most, total = max(most, wealth), total + z
            squares += (z - (0.5 + total) / (1 + i)) ** 2
            variance = (0.25 + squares) / (1 + i)
        return most

    found = upper_bound(np.array(values), delta)
    assert found == 1.0 or best(found + 1e-6) > 1 / delta - 1e-9
    assert best(max(found - 1e-6, 0.0)) <= 1 / delta + 1e-9 or found < 1e-6


@pytest.mark.parametrize("kind", ["coin", "skewed", "normal"])
def test_the_bound_fails_no_more_often_than_it_says(kind: str) -> None:
    draw, failures, runs, delta = np.random.default_rng(0), 0, 300, 0.2
    for _ in range(runs):
        if kind == "coin":
            values, mean = (draw.random(40) < 0.3).astype(float), 0.3
        elif kind == "skewed":
            values, mean = draw.beta(0.5, 5, 40), 0.5 / 5.5
        else:
            values, mean = np.clip(draw.normal(0.5, 0.05, 40), 0, 1), 0.5
        failures += upper_bound(values, delta) < mean
    assert failures / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


def test_the_bound_tightens_with_more_values_and_less_spread() -> None:
    few, many, calm = (
        0.5 + spread * np.tile([1.0, -1.0], half) for spread, half in ((0.2, 15), (0.2, 300), (0.01, 300))
    )
    bounds = [upper_bound(values, 0.1) for values in (few, many, calm)]
    assert bounds[0] > bounds[1] > bounds[2] > 0.5


def test_settings_pass_up_to_the_first_that_does_not() -> None:
    good, bad = np.full(200, -0.1), np.full(200, 0.1)
    assert [passed(order, 0.1) for order in ([], [good], [bad, good], [good, good, bad, good])] == [0, 1, 0, 2]


def test_a_choice_breaks_the_target_no_more_often_than_it_says() -> None:
    """Risks rise through 0 and fall below it again (no monotony): passing any with a risk above 0 is the failure."""
    risks, delta, runs, failures, used = [-0.03, -0.02, 0.0005, -0.01, 0.02], 0.2, 200, 0, 0
    draw = np.random.default_rng(3)
    for _ in range(runs):
        noise = draw.normal(0, 0.03, 150)
        count = passed([risk + noise + draw.normal(0, 0.01, 150) for risk in risks], delta)
        failures, used = failures + (count > 2), used + (count == 2)
    assert failures / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert used / runs > 0.5  # and it is of use: the safe settings are passed

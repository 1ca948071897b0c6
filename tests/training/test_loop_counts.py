"""Drawn loop counts: laws and moments by hand, limits, and the purity of the draw."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.training.loop_counts import LoopCountSettings, sampled_loop_count


def uniform(least: int, most: int) -> LoopCountSettings:
    return LoopCountSettings(distribution="uniform", least=least, most=most)


def lognormal(mean: float, most: int = 10_000, least: int = 1, sigma: float = 0.5) -> LoopCountSettings:
    return LoopCountSettings(distribution="poisson_lognormal", mean=mean, most=most, least=least, sigma=sigma)


def draws(chosen: LoopCountSettings, number: int, seed: int = 5) -> list[int]:
    return [sampled_loop_count(chosen, seed, step) for step in range(number)]


def moments(values: list[int]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / len(values)


def test_uniform_shares() -> None:
    counts = Counter(draws(uniform(2, 6), 5000))
    assert sorted(counts) == [2, 3, 4, 5, 6]
    # 1000 expected of each, with a standard deviation of sqrt(5000 * 0.2 * 0.8) = 28.3
    assert all(abs(count - 1000) < 4 * 28.3 for count in counts.values())


@pytest.mark.parametrize(("mean", "sigma"), [(4.0, 0.5), (8.0, 0.5), (3.0, 0.0), (5.0, 1.0)])
def test_moments_of_the_poisson_lognormal(mean: float, sigma: float) -> None:
    # n - 1 is Poisson of a rate R with E R = mean - 1 = m and Var R = m^2 (e^(sigma^2) - 1):
    # E n = 1 + m, Var n = E R + Var R.
    m, number = mean - 1, 6000
    expected = m + m**2 * (math.exp(sigma**2) - 1)
    found, variance = moments(draws(lognormal(mean, sigma=sigma), number))
    assert found == pytest.approx(mean, abs=4 * math.sqrt(expected / number))
    assert variance == pytest.approx(expected, rel=0.15 if sigma < 1 else 0.5)


def test_without_spread_it_is_one_more_than_poisson() -> None:
    # m = 2: P(n = 1) = e^-2, P(n = 2) = 2 e^-2, P(n = 3) = 2 e^-2.
    counts, number = Counter(draws(lognormal(3.0, sigma=0.0), 6000)), 6000
    for n, share in ((1, math.exp(-2)), (2, 2 * math.exp(-2)), (3, 2 * math.exp(-2))):
        assert counts[n] / number == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / number))


def test_what_falls_outside_becomes_the_nearer_end() -> None:
    free, held = draws(lognormal(4.0), 500), draws(lognormal(4.0, most=6, least=2), 500)
    assert held == [min(max(n, 2), 6) for n in free]
    assert min(free) == 1 and max(free) > 6


@given(
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 10**7),
    least=st.integers(1, 5),
    more=st.integers(0, 20),
    mean=st.floats(1.001, 64),
    sigma=st.floats(0, 60),
    drawn=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_pure_function_within_its_limits(
    seed: int, step: int, least: int, more: int, mean: float, sigma: float, drawn: bool
) -> None:
    chosen = lognormal(mean, least + more, least, sigma) if drawn else uniform(least, least + more)
    count = sampled_loop_count(chosen, seed, step)
    assert least <= count <= least + more
    sampled_loop_count(chosen, seed, step + 1)  # no state is kept in between
    assert sampled_loop_count(chosen, seed, step) == count


def test_seeds_and_steps_draw_differently() -> None:
    chosen = uniform(1, 1000)
    assert len({sampled_loop_count(chosen, seed, step) for seed in range(20) for step in range(20)}) > 300
    same = sum(a == b for a, b in zip(draws(chosen, 200, 0), draws(chosen, 200, 1), strict=True))
    assert same < 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distribution": "uniform", "least": 5, "most": 4}, "least is 5; it must be at most most = 4"),
        ({"distribution": "uniform", "most": 4, "mean": 3.0}, "mean goes with distribution poisson_lognormal"),
        ({"distribution": "poisson_lognormal", "most": 4}, "mean goes with distribution poisson_lognormal"),
        ({"distribution": "poisson_lognormal", "most": 4, "mean": 1.0}, "mean is 1.0: Input should be greater than 1"),
        ({"distribution": "geometric", "most": 4}, "distribution is 'geometric'"),
        ({"distribution": "uniform"}, "most is missing"),
        ({"distribution": "uniform", "most": 0}, "most is 0"),
    ],
)
def test_refusals(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopCountSettings.validated(values, "recipe")

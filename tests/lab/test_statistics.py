"""The exact bootstrap against brute force, and numbers worked out by hand or read off printed tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.lab.statistics import bootstrap_means, holm, interval, p_equal, p_greater, t_cdf

numbers = st.integers(-1000, 1000).map(lambda n: n / 100)


def test_two_values_resample_in_three_ways():
    means, weights = bootstrap_means([1.0, 3.0])
    assert means.tolist() == [1, 2, 3]
    assert weights.tolist() == [0.25, 0.5, 0.25]


@given(st.lists(numbers, min_size=2, max_size=4))
def test_the_bootstrap_is_that_of_all_ordered_resamples(values):
    means, weights = bootstrap_means(values)
    every = sorted(sum(drawn) / len(values) for drawn in itertools.product(values, repeat=len(values)))
    repeated = np.repeat(means, np.rint(weights * len(values) ** len(values)).astype(int))
    np.testing.assert_allclose(np.sort(repeated), every, atol=1e-12)


@pytest.mark.parametrize(("n", "count"), [(2, 3), (5, 126), (8, 6435)])
def test_there_are_so_many_resamples(n, count):
    means, weights = bootstrap_means([float(i) for i in range(n)])
    assert len(means) == count and math.isclose(weights.sum(), 1)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (9, 2.26216)]
)
def test_student_t_has_its_printed_quantiles(degrees, quantile):
    assert t_cdf(quantile, degrees) == pytest.approx(0.975, abs=1e-6)
    assert t_cdf(-quantile, degrees) == pytest.approx(0.025, abs=1e-6)


def test_p_of_two_values_by_hand():
    # A quarter of the resamples are at most the margin: z = -0.67449, t = z sqrt(1/2) = -0.47694 with 1 degree of
    # freedom: 1/2 + atan(t) / pi = 0.35829.
    assert p_greater([1.0, 3.0], 1.0) == pytest.approx(0.5 - math.atan(0.67449 / math.sqrt(2)) / math.pi, abs=1e-5)


def test_seeds_that_all_agree_carry_so_much_and_no_more():
    # n = 5: the rarest resample has 5^-5 = .00032, z = -3.4136, t = -3.0532 with 4 degrees of freedom.
    assert p_greater([1.0, 1.0, 1.0, 1.0, 1.1]) == pytest.approx(0.0189, abs=2e-4)
    assert p_greater([0.1 + i for i in range(8)]) == pytest.approx(0.00083, abs=1e-5)
    assert p_greater([-value for value in (1.0, 1.0, 1.0, 1.0, 1.1)]) == pytest.approx(1 - 0.0189, abs=2e-4)


def test_a_difference_that_only_reaches_the_margin_is_none():
    assert p_greater([0.1] * 8, 0.1) > 0.99
    assert p_greater([0.0] * 8) > 0.99


def test_equivalence_needs_both_sides():
    near, shifted, wide = [0.01, -0.01] * 4, [0.06] * 8, [0.3, -0.3] * 4
    assert p_equal(near, 0.05) < 0.01
    assert p_equal(shifted, 0.05) > 0.99
    assert p_equal(wide, 0.05) > 0.3
    assert p_equal(near, 0.05) == max(p_greater(near, -0.05), p_greater([-value for value in near], -0.05))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_between_nothing_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= 1
        assert corrected <= min(1, len(p_values) * max(p_values))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [corrected for _, corrected in pairs] == sorted(adjusted)


@given(st.lists(numbers, min_size=5, max_size=6), numbers)
def test_interval_and_p_value_agree_from_five_seeds_on(values, margin):
    low, high = interval(values)
    mean = sum(values) / len(values)
    assert min(values) - 1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= max(values) + 1e-9
    if low > margin + 1e-6:
        assert p_greater(values, margin) <= 0.025 + 1e-9
    if low < margin - 1e-6:
        assert p_greater(values, margin) >= 0.025 - 1e-9


@given(st.lists(numbers, min_size=2, max_size=6))
def test_the_interval_turns_round_with_the_values(values):
    low, high = interval(values)
    mirrored = interval([-value for value in values])
    assert mirrored == pytest.approx((-high, -low), abs=1e-9)


def test_intervals_of_noise_cover_about_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(size=(400, 5))
    covered = [low <= 0 <= high for low, high in map(interval, draws.tolist())]
    assert 0.88 <= np.mean(covered) <= 0.97  # a plain percentile interval covers 0.84


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: interval([1.0]), "1 seeds; intervals need from 2 to 10"),
        (lambda: interval([1.0] * 11), "11 seeds"),
        (lambda: p_greater([1.0, math.nan]), "not finite"),
        (lambda: p_equal([1.0, 2.0], 0.0), "margin is 0.0"),
    ],
)
def test_what_cannot_be_told_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()

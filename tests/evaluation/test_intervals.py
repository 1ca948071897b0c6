"""Wilson's interval: numbers by hand, and the equation that defines it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.evaluation.intervals import FEWEST, share, wilson

Z = 1.959963984540054

COUNTS = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (0, 40, 0.0, Z**2 / (40 + Z**2)),  # 3.8415 / 43.8415 = .0876
        (40, 40, 40 / (40 + Z**2), 1.0),
        (50, 100, 0.5 - Z / 2 / math.sqrt(100 + Z**2), 0.5 + Z / 2 / math.sqrt(100 + Z**2)),  # .4038, .5962
        (1, 10, 0.01787621, 0.40415003),  # (1 + 1.92073 -+ 1.95996 sqrt(.9 + .96036)) / 13.84146
    ],
)
def test_by_hand(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-6)


@given(COUNTS, st.floats(0.5, 0.999))
def test_its_ends_solve_the_equation_that_defines_it(counts, level):
    from statistics import NormalDist

    (hits, total), z = counts, NormalDist().inv_cdf((1 + level) / 2)
    low, high = wilson(hits, total, level)
    assert 0 <= low <= hits / total <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(hits / total - end) == pytest.approx(z * math.sqrt(end * (1 - end) / total), rel=1e-6)
    mirrored = wilson(total - hits, total, level)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_too_few_examples_get_no_interval_and_say_so():
    few = share(3, FEWEST - 1)
    assert (few.low, few.high) == (None, None) and str(few) == "0.158 (too few: 19)"
    assert str(share(5, FEWEST)) == "0.250 [0.112, 0.469]"
    assert str(share(0, 0)) == "– (no examples)" and share(0, 0).value is None


@pytest.mark.parametrize(("hits", "total", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (0, 0, 0.95), (1, 2, 1.0)])
def test_counts_that_cannot_be(hits, total, level):
    with pytest.raises(ValueError, match="must lie in"):
        wilson(hits, total, level)

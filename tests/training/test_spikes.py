"""The limit above which a loss is a spike."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm.training.spikes import RollbackSettings, spike_limit


def limit(recent, window=4, sigmas=10.0) -> float:
    return spike_limit(recent, RollbackSettings(window=window, sigmas=sigmas))


@pytest.mark.parametrize(
    ("recent", "window", "sigmas", "expected"),
    [
        ([], 4, 10, math.inf),
        ([3.0, 3.0, 3.0], 4, 10, math.inf),  # too few
        # median 3.05, deviations 0.05 0.05 0.15 0.15: median 0.1
        ([2.9, 3.0, 3.1, 3.2], 4, 10, 3.05 + 10 * 0.14826),
        ([2.9, 3.0, 3.1, 3.2], 4, 2, 3.05 + 2 * 0.14826),
        ([9.0, 2.9, 3.0, 3.1, 3.2], 4, 10, 3.05 + 10 * 0.14826),  # the last four only
        ([2.0, 3.0, 3.0, 3.0, 90.0], 5, 10, 3.0 + 10 * 0.03),  # deviations 1 0 0 0 87: the floor, 1 % of 3
        ([-2.0] * 4, 4, 5, -2.0 + 5 * 0.02),  # an objective less its entropy can be below 0
    ],
)
def test_by_hand(recent, window, sigmas, expected):
    assert limit(recent, window, sigmas) == pytest.approx(expected)


losses = st.lists(st.floats(0.1, 10), min_size=8, max_size=8)


@given(recent=losses, shift=st.integers(0, 7), scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_order_and_units_do_not_matter(recent, shift, scale):
    expected = limit(recent, 8)
    assert limit(recent[shift:] + recent[:shift], 8) == pytest.approx(expected)
    assert limit([scale * loss for loss in recent], 8) == pytest.approx(scale * expected)
    assert expected > sorted(recent)[3]


@given(recent=losses, wild=st.floats(10, 1e6))
def test_one_wild_loss_moves_the_limit_little(recent, wild):
    """Replacing the largest of eight by anything larger leaves the median, and the limit bounded by the spread."""
    tame = sorted(recent)
    moved = limit([*tame[:-1], wild], 8)
    assert moved <= tame[4] + 10 * max(1.4826 * (tame[6] - tame[0]), 0.01 * tame[4])

"""The bootstrap over windows of text: how often each window counts, and the interval of what is made of them."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
"""Of the bootstrap."""

Interval = tuple[float, float]


def resampled(windows: int, seed: int) -> NDArray[np.float64]:
    """How often each window counts, (1 + R, W): once each in row 0, in the others as a bootstrap draws them.

    Raises:
        ValueError: fewer than two windows.
    """
    if windows < 2:
        raise ValueError(f"{windows} windows have a target; an interval needs 2 or more")
    draws = np.random.default_rng(seed).multinomial(windows, np.full(windows, 1 / windows), RESAMPLES)
    return np.concatenate((np.ones((1, windows)), draws.astype(np.float64)))


def interval(draws: NDArray[np.float64]) -> Interval:
    """The middle 95 % of a bootstrap's draws (R,)."""
    low, high = np.percentile(draws, (2.5, 97.5)).tolist()
    return low, high

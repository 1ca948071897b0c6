"""Is a difference between paired runs real? The bootstrap over seeds, its p-values, and Holm's correction.

Runs come in few seeds. With n of them the bootstrap has C(2n - 1, n) different resamples (6,435 for 8), so they are all
listed, each with its multinomial weight: no random numbers, the same answer every time.

Percentile intervals of so few values are too narrow (they cover 84 % instead of 95 % at n = 5). They are widened to
those of a t statistic: the percentile at tail a is read at Phi(sqrt(n / (n - 1)) t_{n-1}^{-1}(a)) instead (Hesterberg,
What Teachers Should Know About the Bootstrap, 2015, section 2). p-values invert the same interval. A tail that no
resample reaches counts as that of the rarest one, n^-n, so that no p-value is smaller than the seeds can carry: .019
for 5, .0008 for 8. (Fewer than 5 carry no 95 %: their interval ends with the data, and only p tells.)
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MOST = 10
"""Seeds at most; the resamples of more are too many to list."""
Numbers = NDArray[np.float64]


@lru_cache(maxsize=16)
def resamples(n: int) -> tuple[Numbers, Numbers]:
    """Every multiset of n out of n values.

    Returns: how often it takes each value (R, n), and its probability (R,).
    """
    counts = np.array(
        [np.bincount(chosen, minlength=n) for chosen in itertools.combinations_with_replacement(range(n), n)]
    )
    ways = [math.factorial(n) / math.prod(map(math.factorial, row)) for row in counts.tolist()]
    return counts.astype(np.float64), np.array(ways) / float(n) ** n


def bootstrap_means(values: Sequence[float]) -> tuple[Numbers, Numbers]:
    """The distribution of the mean over resamples: ascending means and the probability of each.

    Raises:
        ValueError: fewer than 2 or more than 10 values, or one that is not finite.
    """
    n = len(values)
    if not 2 <= n <= MOST:
        raise ValueError(f"{n} seeds; intervals need from 2 to {MOST}")
    if not all(map(math.isfinite, values)):
        raise ValueError("a value is not finite; nothing can be said about the mean")
    counts, weights = resamples(n)
    means = counts @ np.asarray(values, dtype=np.float64) / n
    order = np.argsort(means, kind="stable")
    return means[order], weights[order]


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The widened percentile interval of the mean. Raises ValueError as `bootstrap_means`."""
    means, weights = bootstrap_means(values)
    tail = _widened((1 - level) / 2, len(values))
    reached = np.cumsum(weights)
    low = means[min(int(np.searchsorted(reached, tail)), len(means) - 1)]
    high = means[min(int(np.searchsorted(reached, 1 - tail)), len(means) - 1)]
    return float(low), float(high)


def p_greater(values: Sequence[float], margin: float = 0.0) -> float:
    """One-sided p-value against "the mean is at most `margin`". Raises ValueError as `bootstrap_means`."""
    n = len(values)
    means, weights = bootstrap_means(values)
    slack = 1e-9 * max(1.0, abs(margin))  # sums in another order may differ in the last digit
    tail = float(weights[means <= margin + slack].sum())
    floor = float(n) ** -n
    z = NormalDist().inv_cdf(min(max(tail, floor), 1 - floor))
    return t_cdf(z * math.sqrt((n - 1) / n), n - 1)


def p_equal(values: Sequence[float], margin: float) -> float:
    """p-value against "the mean is `margin` or more away from 0": the larger of two one-sided ones (TOST).

    Raises:
        ValueError: a margin that is not positive, or as `bootstrap_means`.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; equivalence needs one above 0")
    return max(p_greater(values, -margin), p_greater([-value for value in values], -margin))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the k-th smallest of m times m - k + 1, never below a smaller one's, at most 1."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def t_cdf(t: float, degrees: int) -> float:
    """Student's distribution function for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    theta = math.atan2(abs(t), math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    if degrees == 1:
        inside = 2 * theta / math.pi
    else:
        first = cosine if degrees % 2 else 1.0
        terms, term = 0.0, first
        for k in range(2 + degrees % 2, degrees + 1, 2):
            terms += term
            term *= cosine * cosine * (k - 1) / k
        inside = 2 / math.pi * (theta + sine * terms) if degrees % 2 else sine * terms
    return (1 + math.copysign(inside, t)) / 2


def _widened(tail: float, n: int) -> float:
    """Where the percentile is read for a tail below one half."""
    low, high = -1e3, 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, n - 1) < tail else (low, middle)
    return NormalDist().cdf(math.sqrt(n / (n - 1)) * high)

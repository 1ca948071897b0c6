"""Choosing the most economical setting whose risk is controlled, by an upper confidence bound.

The risk of a setting is the mean over windows of some increase x (in nats) that must not be above 0 in expectation.
Settings are ordered from safe (full depth) to economical.

*Theorem* (fixed-sequence testing: Angelopoulos, Bates, Candes, Jordan and Lei, Learn then Test, arXiv 2110.01052,
section 3; under a risk that grows along the sequence it is the upper-bound calibration of Bates et al., arXiv
2101.02703). Let U_k be a 1 - delta upper confidence bound of the risk of setting k, for each k by itself. Go through
the settings in their order and stop before the first with U_k > 0. Then with probability at least 1 - delta every
setting passed has a risk of at most 0. *Proof*: let j be the first setting in the order whose risk is above 0. To
pass any such setting one has to pass j, and U_j <= 0 < risk_j happens with probability at most delta. Nothing is asked
of the shape of the risk, and nothing is paid for the number of settings. (Conformal risk control, arXiv 2208.02814,
bounds the *expected* risk of the choice instead, for risks that grow along the sequence; this bounds the probability
that the risk is above the target.)

*Bound* (Waudby-Smith and Ramdas, arXiv 2010.09686, in the form of arXiv 2101.02703, proposition 5). For independent
z_1..z_n in [0, 1] of mean R:

    mu_i  = (1/2 + z_1 + .. + z_i) / (1 + i)
    s_i^2 = (1/4 + sum_{j<=i} (z_j - mu_j)^2) / (1 + i),  s_0^2 = 1/4
    v_i   = min(1, sqrt(2 log(1/delta) / (n s_{i-1}^2)))
    K_i(R) = prod_{j<=i} (1 - v_j (z_j - R))
    U     = inf {R : max_i K_i(R) > 1/delta},  at most 1

K is a betting game that is fair at the true mean, so it passes 1/delta with probability at most delta (Ville).
Increases have no bound of their own: they are cut at +-`cut` nats a token, and the statement is about the cut ones.
Windows are taken to be independent and alike with what comes later.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CUT = 0.25
"""Where a window's increase is cut, in nats a token; a window beyond it is counted and told."""

Numbers = NDArray[np.float64]


def upper_bound(values: Numbers, delta: float) -> float:
    """U of the module: above the mean with probability at least 1 - delta.

    Args:
        values: (n,) in [0, 1], in an order that does not depend on them.

    Raises:
        ValueError: no values, one outside [0, 1], or delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must lie in (0, 1)")
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{len(values)} values; a bound needs at least one, and all of them in [0, 1]")
    bets = _bets(values, delta)
    low, high, target = 0.0, 1.0, -math.log(delta)
    if _wealth(values, bets, high) <= target:
        return 1.0
    for _ in range(60):  # the wealth grows with R
        middle = (low + high) / 2
        low, high = (low, middle) if _wealth(values, bets, middle) > target else (middle, high)
    return high


def _bets(values: Numbers, delta: float) -> Numbers:
    """v_1..v_n of the module."""
    n = len(values)
    counts = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(values)) / (1 + counts)
    variances = (0.25 + np.cumsum((values - means) ** 2)) / (1 + counts)
    before = np.concatenate(([0.25], variances[:-1]))
    return np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (n * before)))


def _wealth(values: Numbers, bets: Numbers, mean: float) -> float:
    """max_i log K_i(mean)."""
    with np.errstate(divide="ignore"):  # a bet that loses all leaves log 0
        return float(np.cumsum(np.log(np.maximum(1 - bets * (values - mean), 0.0))).max())


def upper_increase(increases: Numbers, delta: float, cut: float = CUT) -> float:
    """The bound of the mean of increases (n,) cut at +-`cut`, in their own unit."""
    scaled = (np.clip(increases, -cut, cut) + cut) / (2 * cut)
    return (2 * upper_bound(scaled, delta) - 1) * cut


def passed(increases: Sequence[Numbers], delta: float, cut: float = CUT) -> int:
    """How many settings, from the safe end, pass one after the other.

    Args:
        increases: of each setting (n,), from safe to economical.
    """
    for count, values in enumerate(increases):
        if upper_increase(values, delta, cut) > 0:
            return count
    return len(increases)

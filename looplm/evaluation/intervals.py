"""Intervals for shares of items: Wilson's, which stays inside 0..1 and holds for small counts and shares near 0.

A harmful-completion rate of 0 in 40 is no proof of 0: Wilson's upper end is .088 there, where the textbook interval
p +- z sqrt(p (1 - p) / n) has no width at all (Wilson, 1927; Brown, Cai and DasGupta, 2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

FEWEST = 20
"""Examples below which no interval is given: it would span most of 0..1 and be read as a result."""


@dataclass(frozen=True)
class Share:
    """How many of how many, with Wilson's interval.

    Attributes:
        hits, total: counts.
        low, high: ends of the interval; None where `total` is below `FEWEST`.
    """

    hits: int
    total: int
    low: float | None
    high: float | None

    @property
    def value(self) -> float | None:
        """The share; None of nothing."""
        return self.hits / self.total if self.total else None

    def __str__(self) -> str:
        if not self.total:
            return "– (no examples)"
        if self.low is None:
            return f"{self.hits / self.total:.3f} (too few: {self.total})"
        return f"{self.hits / self.total:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(hits: int, total: int, level: float = 0.95) -> Share:
    """`hits` of `total` with their interval, or without one where `total` is below `FEWEST`.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 1).
    """
    if total < FEWEST and 0 <= hits <= total:
        return Share(hits, total, None, None)
    return Share(hits, total, *wilson(hits, total, level))


def wilson(hits: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval: the shares p with |hits / n - p| <= z sqrt(p (1 - p) / n).

    Raises:
        ValueError: no examples, more hits than examples, or a level outside (0, 1).
    """
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"{hits} of {total}: hits must lie in 0..total, and total must be at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie in (0, 1)")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (hits + z2 / 2) / (total + z2)
    half = math.sqrt(z2 * (hits * (total - hits) / total + z2 / 4)) / (total + z2)
    return max(centre - half, 0.0) if hits else 0.0, min(centre + half, 1.0) if hits < total else 1.0

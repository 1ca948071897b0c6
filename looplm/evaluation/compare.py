"""Two results: what their recipes differ in, and whether the difference of their scores is more than chance.

The pairs are items: both results score the same documents, so the difference of each item's scores is resampled
(percentile bootstrap), and where scores are right or wrong McNemar's exact test gives a second opinion: of the b + c
items that one gets right and the other wrong, the smaller number under a fair coin. What the field asks ("62 or 79 on
GSM8K?") is mostly answered by the recipes: another number of examples, a chat template, another extraction.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from looplm.evaluation.intervals import FEWEST
from looplm.evaluation.recipe import Difference, differences
from looplm.evaluation.results import Result

RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedTest:
    """The difference second - first over n paired items.

    Attributes:
        first, second, difference: means.
        low, high: 95 % bootstrap interval of the difference; None with fewer than `FEWEST` items.
        gained, lost: items that only the second, only the first gets right; None where scores are not 0 or 1.
        p_value: McNemar's exact test, two-sided; None likewise.
    """

    items: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class ComparedResults:
    """What `compare_results` finds: the two names, the fields that differ, and the test over shared items."""

    first: str
    second: str
    differences: tuple[Difference, ...]
    test: PairedTest

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Lines for people: the scores, the test, and the recipe's differences by kind."""
        test = self.test
        lines = [f"first   {self.first}: {test.first:.4f}", f"second  {self.second}: {test.second:.4f}"]
        lines.append(f"second - first over {test.items} shared items: {test.difference:+.4f} {_interval(test)}")
        if test.p_value is not None:
            counts = f"{test.gained} only the second gets right, {test.lost} only the first"
            lines.append(f"McNemar's exact test: p = {test.p_value:.3g} ({counts})")
        return "\n".join([*lines, "", *_explained(self.differences)])


_HEADINGS = {
    "measure": "measured differently (these alone can make the difference):",
    "subject": "another model or depth:",
    "circumstances": "circumstances (should not matter):",
}


def _explained(found: Sequence[Difference]) -> list[str]:
    if not found:
        return ["the recipes are the same"]
    lines = []
    for kind, heading in _HEADINGS.items():
        fields = [f"  {difference}" for difference in found if difference.kind == kind]
        lines += [heading, *fields] if fields else []
    return lines


def _interval(test: PairedTest) -> str:
    if test.low is None or test.high is None:
        return f"(too few examples for an interval: {test.items}, at least {FEWEST})"
    return f"[{test.low:+.4f}, {test.high:+.4f}]"


def compare_results(
    first: Result,
    second: Result,
    metric: str | None = None,
    second_metric: str | None = None,
    *,
    anyway: bool = False,
    seed: int = 0,
) -> ComparedResults:
    """Compare two results on a metric (by default the task's main one), item by item.

    Args:
        second_metric: of the second result, where it is scored by another one.
        anyway: compare results that were measured in different ways too.

    Raises:
        ValueError: a metric that a result does not have, recipes that differ in how they measured, no shared items.
    """
    left = metric or first.main_metric
    right = second_metric or metric or second.main_metric
    scores = first.scores(left), second.scores(right)
    recipes = (replace(result.recipe, metric=name) for result, name in ((first, left), (second, right)))
    found = differences(*recipes)
    measured = [difference for difference in found if difference.kind == "measure"]
    if measured and not anyway:
        raise ValueError(
            f"{first.name} and {second.name} were measured differently ({'; '.join(map(str, measured))}): the scores "
            "do not answer the same question; pass --anyway to compare them"
        )
    shared = [doc for doc in scores[0] if doc in scores[1]]
    if not shared:
        raise ValueError(f"{first.name} and {second.name} share no items; they are of other data")
    test = paired_test([scores[0][doc] for doc in shared], [scores[1][doc] for doc in shared], seed)
    return ComparedResults(f"{first.name} {left}", f"{second.name} {right}", tuple(found), test)


def paired_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedTest:
    """The difference of paired scores with its interval and, of right-or-wrong scores, McNemar's test.

    Raises:
        ValueError: no pairs, or lists of different length.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores; pairs need as many of both, at least one")
    gains = [b - a for a, b in zip(first, second, strict=True)]
    low, high = bootstrap_interval(gains, seed) if len(gains) >= FEWEST else (None, None)
    means = sum(first) / len(first), sum(second) / len(second)
    test = PairedTest(len(gains), *means, sum(gains) / len(gains), low, high)
    if not {*first, *second} <= {0.0, 1.0}:
        return test
    gained, lost = gains.count(1.0), gains.count(-1.0)
    return replace(test, gained=gained, lost=lost, p_value=mcnemar(gained, lost))


def bootstrap_interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean over resamples of the values.

    Equal values are drawn together: how often each distinct value comes up in a resample is multinomial.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to resample")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value: 2 P(X <= min(b, c)) for X ~ Binomial(b + c, 1/2), at most 1; 1 where b + c is 0."""
    total, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)

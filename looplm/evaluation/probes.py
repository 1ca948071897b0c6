"""Linear probes and how well they rank: the area under the ROC curve, its interval, cross-fitting and two controls.

Ouro section 7.2 asks whether the answer of loop i can be read from earlier states. A plain AUC over all items says
little: where loops mostly agree, a probe that reads the answer of loop i - 1 scores nearly as well. So `auc` takes
groups and compares an item only with items of its own group:

    all             any two items; to be held against the AUC of "the answer of loop i - 1" itself
    flipped         items whose answer differs between loops i - 1 and i, where the last answer is always wrong (AUC 0)
    given previous  items with the same answer at loop i - 1, where that answer ranks nothing (AUC 1/2)

A probe is trained on all items but those of its own fold, which it then ranks (cross-fitting); items are compared
within folds only, since scores of two fits have no common zero. Intervals come from resampling the ranked items: they
leave out how much the fits themselves would vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.floating[Any]]
Labels = NDArray[np.bool_]
Groups = NDArray[np.int64]

FOLDS = 5
FEWEST_OF_A_KIND = 10
"""Items of either answer below which nothing is fitted, and no AUC given."""
STRENGTH = 0.01
"""C of the logistic regression over standardised features: strong, since states have more dimensions than items."""
DRAWS = 400


@dataclass(frozen=True)
class Auc:
    """The share of pairs (an item with the answer, one without it) that scores rank rightly; ties count one half.

    Attributes:
        value, low, high: with a 95 % percentile interval over items; None where there are too few of either kind.
        positives, negatives: items that are in a pair; where there is no pair, all of them.
    """

    value: float | None
    low: float | None
    high: float | None
    positives: int
    negatives: int

    def __str__(self) -> str:
        if self.value is None:
            return f"– ({self.positives}/{self.negatives})"
        return f"{self.value:.2f}"


def auc(scores: Numbers, labels: Labels, groups: Sequence[Groups] = (), *, draws: int = DRAWS, seed: int = 0) -> Auc:
    """The area under the ROC curve, over pairs of the same group where groups are given.

    Args:
        scores: (N,), higher for items with the label.
        labels: (N,) bool.
        groups: any number of (N,) int64; a pair counts where its items agree in all of them.
        draws: resamples of the interval; 0 for none.
    """
    agree, right = _pairs(scores, labels, groups)
    paired = (int(agree.any(1).sum()), int(agree.any(0).sum()))
    if min(paired) < FEWEST_OF_A_KIND:
        kinds = paired if agree.any() else (int(labels.sum()), int((~labels).sum()))
        return Auc(None, None, None, *kinds)
    value = float(right.sum(dtype=np.float64) / agree.sum())
    if not draws:
        return Auc(value, None, None, *paired)
    drawn = _resampled(agree, right, labels, draws, seed)
    low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
    return Auc(value, min(low, value), max(high, value), *paired)


def _pairs(scores: Numbers, labels: Labels, groups: Sequence[Groups]) -> tuple[NDArray[np.bool_], Numbers]:
    """Which pairs (P, N) count, and what each adds: 1 ranked rightly, 1/2 tied."""
    scores = np.asarray(scores, dtype=np.float64)
    high, low = scores[labels][:, None], scores[~labels][None, :]
    agree = np.ones((high.shape[0], low.shape[1]), dtype=bool)
    for group in groups:
        agree &= group[labels][:, None] == group[~labels][None, :]
    right = (high > low).astype(np.float32) + 0.5 * (high == low).astype(np.float32)
    return agree, right * agree


def _resampled(agree: NDArray[np.bool_], right: Numbers, labels: Labels, draws: int, seed: int) -> Numbers:
    """The AUC of items drawn with replacement, (draws,); a draw without a pair is dropped."""
    count = len(labels)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float32)
    high, low = times[:, labels], times[:, ~labels]
    pairs = ((high @ agree.astype(np.float32)) * low).sum(1)
    ranked = ((high @ right) * low).sum(1)
    return (ranked / np.where(pairs > 0, pairs, 1))[pairs > 0]


def folds_of(count: int, number: int = FOLDS, seed: int = 0) -> Groups:
    """The fold of each of `count` items, at random and as equal in size as can be.

    Raises:
        ValueError: fewer than two folds, or more folds than items.
    """
    if not 2 <= number <= count:
        raise ValueError(f"folds is {number} for {count} items; it must lie in 2..{count}")
    return np.random.default_rng(seed).permutation(np.arange(count, dtype=np.int64) % number)


def cross_fitted(features: Numbers, labels: Labels, folds: Groups) -> Numbers | None:
    """Scores (N,) of every item by the probe that has not seen its fold.

    The probe is a logistic regression on features that are standardised over the items it is trained on.

    Args:
        features: (N, D). labels: (N,) bool. folds: (N,), see `folds_of`.

    Returns:
        None where one of the answers has fewer than `FEWEST_OF_A_KIND` items or none outside of a fold.
    """
    if min(labels.sum(), (~labels).sum()) < FEWEST_OF_A_KIND:
        return None
    scores = np.zeros(len(labels))
    for fold in np.unique(folds):
        held = folds == fold
        if len(np.unique(labels[~held])) < 2:
            return None
        scores[held] = fit(features[~held], labels[~held])(features[held])
    return scores


def fit(features: Numbers, labels: Labels) -> Any:
    """A probe: a function from features (M, D) to scores (M,).

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ValueError("probes need scikit-learn: pip install 'looplm[eval]'") from None
    features = np.asarray(features, dtype=np.float64)
    centre, spread = features.mean(0), features.std(0)
    spread[spread < 1e-8 * np.abs(centre) + 1e-12] = 1.0  # a feature that does not vary says nothing
    model = LogisticRegression(C=STRENGTH, max_iter=1000).fit((features - centre) / spread, labels)
    return lambda other: model.decision_function((np.asarray(other, dtype=np.float64) - centre) / spread)


def planted(features: Numbers, seed: int) -> tuple[Numbers, Labels]:
    """The positive control: features with a random bit written into them, and the bit.

    Items with the bit are moved along one random direction by the root of the summed variances, about sqrt(D) standard
    deviations of that direction: a probe that does not find it here finds nothing.
    """
    draw = np.random.default_rng(seed)
    bit = draw.permutation(np.arange(len(features)) % 2 == 0)
    direction = draw.normal(size=features.shape[1])
    size = np.sqrt(np.asarray(features, dtype=np.float64).var(0).sum()) / np.linalg.norm(direction)
    return features + np.outer(bit, size * direction), bit


def shuffled(labels: Labels, seed: int) -> Labels:
    """The negative control: the same answers, given to the items at random."""
    return np.random.default_rng(seed).permutation(labels)

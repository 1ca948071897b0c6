"""Areas under the ROC curve by hand and by brute force, cross-fitting that never sees its fold, and both controls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.evaluation.probes import FEWEST_OF_A_KIND, auc, cross_fitted, folds_of, planted, shuffled

TIMES = FEWEST_OF_A_KIND


def repeated(scores, labels, *groups):
    """Each item ten times, so that there are enough of them; an area stays what it is."""
    columns = [np.repeat(np.array(column), TIMES) for column in (scores, labels, *groups)]
    return columns[0], columns[1].astype(bool), [group.astype(np.int64) for group in columns[2:]]


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "area"),
    [
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], [], 3 / 4),  # .35 > .1, .8 > both; .35 < .4
        ([1, 2, 3, 4], [1, 1, 0, 0], [], 0.0),
        ([1, 1, 1], [1, 0, 0], [], 1 / 2),  # ties
        ([1, 2, 2, 3], [0, 0, 1, 1], [], (1 + 1 / 2 + 1 + 1) / 4),
        # two folds: (2 over 1) right, (5 under 9) wrong; 5 over 1 and 2 under 9 are not looked at
        ([1, 2, 9, 5], [0, 1, 0, 1], [[0, 0, 1, 1]], 1 / 2),
        # the second group leaves only the first pair of three in the first fold
        ([1, 2, 3, 4], [0, 1, 0, 1], [[0, 0, 0, 0], [0, 0, 1, 0]], 1.0),
        # "given previous": scores that are the previous answer rank nothing among items that share it
        ([0, 0, 1, 1], [0, 1, 0, 1], [[0, 0, 1, 1]], 1 / 2),
    ],
)
def test_areas_by_hand(scores, labels, groups, area):
    scores, labels, groups = repeated(scores, labels, *groups)
    found = auc(scores, labels, groups, draws=50)
    assert found.value == pytest.approx(area)
    assert found.low <= found.value <= found.high


@st.composite
def ranked(draw):
    """Scores with ties, labels with both kinds, and a group."""
    count = draw(st.integers(2 * TIMES, 60))
    scores = draw(st.lists(st.integers(-4, 4), min_size=count, max_size=count))
    labels = [True] * TIMES + [False] * TIMES + draw(st.lists(st.booleans(), min_size=count - 20, max_size=count - 20))
    group = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return np.array(scores, dtype=float), np.array(labels), np.array(group, dtype=np.int64)


def brute(scores, labels, group):
    right = pairs = 0.0
    for a, high in enumerate(labels):
        for b, low in enumerate(labels):
            if high and not low and group[a] == group[b]:
                pairs += 1
                right += (scores[a] > scores[b]) + (scores[a] == scores[b]) / 2
    return right / pairs if pairs else None


@given(ranked())
@settings(deadline=None, max_examples=60)
def test_areas_equal_brute_force_and_know_their_symmetries(items):
    scores, labels, group = items
    found = auc(scores, labels, [group], draws=0)
    if found.value is None:
        kinds = [labels & np.isin(group, group[~labels]), ~labels & np.isin(group, group[labels])]
        assert min(kind.sum() for kind in kinds) < TIMES
        return
    assert found.value == pytest.approx(brute(scores, labels, group))
    assert auc(np.exp(scores) - 3, labels, [group], draws=0) == found  # only the order counts
    assert auc(-scores, labels, [group], draws=0).value == pytest.approx(1 - found.value)
    assert auc(scores, ~labels, [group], draws=0).value == pytest.approx(1 - found.value)
    order = np.random.default_rng(0).permutation(len(scores))
    assert auc(scores[order], labels[order], [group[order]], draws=0).value == pytest.approx(found.value)


def test_an_interval_covers_what_it_should():
    """Scores of both kinds one standard deviation apart have an area of Phi(1 / sqrt 2) = .7602."""
    draw, inside = np.random.default_rng(1), 0
    labels = np.arange(120) % 2 == 0
    for trial in range(100):
        found = auc(draw.normal(size=120) + labels, labels, seed=trial, draws=200)
        inside += found.low <= 0.7602 <= found.high
    assert 88 <= inside <= 100


def test_too_few_of_a_kind_have_no_area():
    labels = np.arange(30) < FEWEST_OF_A_KIND - 1
    found = auc(np.arange(30.0), labels)
    assert (found.value, found.low, found.positives, found.negatives) == (None, None, 9, 21)
    assert str(found) == "– (9/21)"
    one_way = auc(np.arange(30.0), np.ones(30, dtype=bool))
    assert (one_way.value, one_way.positives, one_way.negatives) == (None, 30, 0)
    assert cross_fitted(np.ones((30, 2)), labels, folds_of(30)) is None


@given(st.integers(2, 200), st.integers(2, 7), st.integers(0, 9))
def test_folds_are_of_equal_size(count, number, seed):
    if number > count:
        with pytest.raises(ValueError, match="must lie in"):
            folds_of(count, number, seed)
        return
    sizes = np.bincount(folds_of(count, number, seed))
    assert len(sizes) == number and sizes.max() - sizes.min() <= 1


def test_a_probe_never_sees_the_fold_it_ranks():
    """Answers of one fold can be changed at will without any of its scores changing."""
    draw = np.random.default_rng(0)
    features, labels, folds = draw.normal(size=(80, 4)), draw.random(80) < 0.5, folds_of(80)
    scores = cross_fitted(features, labels, folds)
    for fold in range(5):
        turned = np.where(folds == fold, ~labels, labels)
        again = cross_fitted(features, turned, folds)
        np.testing.assert_array_equal(again[folds == fold], scores[folds == fold])
        assert not np.allclose(again[folds != fold], scores[folds != fold])


def test_what_can_be_read_is_found_and_what_cannot_is_not():
    draw = np.random.default_rng(2)
    features, folds = draw.normal(size=(300, 64)), folds_of(300)
    labels = features @ draw.normal(size=64) > 0
    assert auc(cross_fitted(features, labels, folds), labels, [folds]).value > 0.9
    turned = cross_fitted(features * 1e-4 + 7, labels, folds)  # scale and offset of a feature do not matter
    np.testing.assert_allclose(turned, cross_fitted(features, labels, folds), rtol=1e-3, atol=1e-3)
    noise = shuffled(labels, 0)
    assert noise.sum() == labels.sum() and (noise != labels).any()
    assert abs(auc(cross_fitted(features, noise, folds), noise, [folds]).value - 0.5) < 0.1


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_a_planted_bit_is_found(seed):
    features = np.random.default_rng(seed).normal(size=(60, 16)) * np.arange(1, 17)
    with_bit, bit = planted(features, seed)
    assert bit.sum() == 30
    np.testing.assert_array_equal(with_bit[~bit], features[~bit])
    moved = (with_bit - features)[bit]
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), np.sqrt(features.var(0).sum()))
    assert auc(cross_fitted(with_bit, bit, folds_of(60)), bit, draws=0).value > 0.8


def test_features_that_do_not_vary_rank_nothing():
    labels = np.arange(40) % 2 == 0
    scores = cross_fitted(np.full((40, 3), 5.0), labels, folds_of(40))
    assert auc(scores, labels, [folds_of(40)]).value == 0.5

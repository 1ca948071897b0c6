"""Comparing results: paired tests against hand-worked numbers, and the two GSM8K scores of one checkpoint."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.evaluation.compare import bootstrap_interval, compare_results, mcnemar, paired_test
from looplm.evaluation.recipe import Recipe
from looplm.evaluation.results import ItemScore, Metric, Result, mean_metric


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 7, 2 * (1 + 8) / 256),
        (3, 3, 1.0),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p) == mcnemar(lost, gained)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_a_probability_that_falls_with_the_imbalance(gained, lost):
    p = mcnemar(gained, lost)
    assert 0 < p <= 1 and mcnemar(max(gained, lost) + 1, min(gained, lost)) <= p + 1e-12


def test_the_bootstrap_is_that_of_plain_resamples():
    import numpy as np

    values = [0.0] * 30 + [1.0] * 20 + [-1.0] * 10
    low, high = bootstrap_interval(values, seed=1)
    draw = np.random.default_rng(0)
    means = [draw.choice(values, size=60).mean() for _ in range(4000)]
    slow = np.quantile(means, [0.025, 0.975])
    assert low == pytest.approx(slow[0], abs=0.02) and high == pytest.approx(slow[1], abs=0.02)
    assert bootstrap_interval(values, seed=1) == (low, high)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=20, max_size=60))
def test_the_interval_holds_the_mean_and_stays_inside_the_data(values):
    low, high = bootstrap_interval(values)
    mean = sum(values) / len(values)
    assert min(values) - 1e-9 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= max(values) + 1e-9


def test_a_paired_test_by_hand():
    first = [1.0] * 10 + [0.0] * 20
    second = [1.0] * 8 + [0.0] * 2 + [1.0] * 6 + [0.0] * 14
    test = paired_test(first, second)
    assert (test.items, test.gained, test.lost) == (30, 6, 2)
    assert test.difference == pytest.approx(4 / 30) and test.p_value == pytest.approx(2 * (1 + 8 + 28) / 256)
    assert test.low < test.difference < test.high


def test_few_items_have_no_interval_and_graded_scores_no_mcnemar():
    assert paired_test([1.0] * 19, [0.0] * 19).low is None
    graded = paired_test([0.5] * 30, [0.25] * 30)
    assert graded.p_value is None and graded.low == graded.high == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="0 and 0 scores"):
        paired_test([], [])


STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"


def gsm8k(name: str, strict: int, flexible: int, **recipe) -> Result:
    """100 items of which so many are right under each extraction."""
    items = tuple(
        ItemScore(str(n), f"doc{n}", None, {STRICT: float(n < strict), FLEXIBLE: float(n < flexible)})
        for n in range(100)
    )
    metrics = {metric: mean_metric(item.scores[metric] for item in items) for metric in (STRICT, FLEXIBLE)}
    base = Recipe(
        "ouro-1.4b", "a" * 64, "bfloat16", 4, task="gsm8k_cot", data="d" * 64, prompts="p" * 64, num_fewshot=3
    )
    return Result(replace(base, **recipe), name, "gsm8k_cot", metrics, items)


def test_the_two_gsm8k_scores_of_one_checkpoint_are_explained_and_refused():
    paper = gsm8k("few-shot", 79, 80)
    other = gsm8k("chat", 41, 62, num_fewshot=0, chat_template="c" * 64, prompts="q" * 64)
    with pytest.raises(ValueError, match="num_fewshot: 0 against 3") as refused:
        compare_results(other, paper, FLEXIBLE, STRICT)
    message = str(refused.value)
    assert "chat_template: cccccccccccc against none" in message and "--anyway" in message
    assert f"metric: {FLEXIBLE} against {STRICT}" in message
    found = compare_results(other, paper, FLEXIBLE, STRICT, anyway=True)
    text = found.text()
    assert "0.6200" in text and "0.7900" in text and "+0.1700" in text
    assert {d.field for d in found.differences if d.kind == "measure"} == {
        "num_fewshot",
        "chat_template",
        "prompts",
        "metric",
    }
    assert found.test.gained == 17 and found.test.p_value == pytest.approx(2 / 2**17)
    assert "these alone can make the difference" in text


def test_the_same_measure_at_two_depths_needs_no_permission():
    found = compare_results(gsm8k("a", 70, 70, loops=2), gsm8k("b", 79, 79))
    assert [d.field for d in found.differences] == ["loops"] and found.first == f"a {STRICT}"


def test_equal_results():
    one = gsm8k("a", 50, 50)
    found = compare_results(one, one)
    assert found.test.p_value == 1.0 and found.text().endswith("the recipes are the same")
    assert found.as_dict()["test"]["difference"] == 0.0


def test_what_cannot_be_compared():
    one = gsm8k("a", 50, 50)
    with pytest.raises(ValueError, match="a has no metric 'bleu'; it has"):
        compare_results(one, one, "bleu")
    moved = replace(one, items=tuple(replace(item, doc=f"other{item.doc}") for item in one.items))
    with pytest.raises(ValueError, match="share no items"):
        compare_results(one, moved)


def test_documents_that_come_twice_are_paired_in_order():
    items = (ItemScore("1", "d", None, {"acc": 1.0}), ItemScore("2", "d", None, {"acc": 0.0}))
    result = replace(gsm8k("a", 1, 1), items=items, metrics={"acc": Metric(0.5, None)})
    assert result.scores("acc") == {"d": 1.0, "d#2": 0.0}


def test_the_standard_error_of_a_mean_by_hand():
    metric = mean_metric([0.0, 0.0, 1.0, 1.0])
    assert metric.value == 0.5 and metric.stderr == pytest.approx(math.sqrt((1 / 3) / 4))
    assert mean_metric([1.0]).stderr is None
    with pytest.raises(ValueError, match="no scores"):
        mean_metric([])

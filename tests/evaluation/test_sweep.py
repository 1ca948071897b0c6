"""The depth sweep's tables against numbers worked out by hand."""

import pytest

from looplm.evaluation.recipe import Recipe
from looplm.evaluation.results import ItemScore, Metric, Result
from looplm.evaluation.sweep import Sweep, categories_tables, gains_table, gather, scores_table, sweep_chart


def sweep(**changes) -> Sweep:
    """40 items: 10, 20, 30 and 24 right at loops 1, 2, 4 and 6, the first ones; categories by halves."""
    right = {1: 10, 2: 20, 4: 30, 6: 24}
    scores = {loop: [float(n < count) for n in range(40)] for loop, count in right.items()}
    values = {"task": "t", "metric": "acc", "scores": scores, "categories": ["a"] * 20 + ["b"] * 20, "trained": 4}
    return Sweep(**{**values, **changes})


def test_gains_are_taken_at_the_trained_depth_whatever_lies_beyond():
    gains = sweep().gains()
    assert list(gains) == ["a", "b", "all"] and sweep().ends == (1, 4)
    assert (gains["a"].first, gains["a"].second, gains["b"].difference) == (0.5, 1.0, 0.5)
    assert gains["all"].difference == 0.5 and gains["all"].gained == 20 and gains["all"].lost == 0
    rows = gains_table(sweep()).rows
    assert rows[-1][:4] == ("all", "40", "25.0", "75.0") and rows[-1][5] == "+200.0 %"
    assert sweep(trained=2).gains()["all"].difference == 0.25


def test_wilson_intervals_and_marks_beyond_training():
    table = scores_table([sweep()], 4)
    assert [row[0] for row in table.rows] == ["1", "2", "4", "6 *"]
    # Wilson for 20 of 40: 0.5 -+ sqrt(z^2 (10 + z^2 / 4)) / (40 + z^2), z = 1.96
    assert table.rows[1][1] == "50.0 [35.2, 64.8]"
    assert any("extrapolation" in note for note in table.notes)


def test_scores_between_0_and_1_have_the_interval_of_a_mean():
    graded = sweep(scores={1: [0.25, 0.75] * 20, 2: [0.5] * 40})
    assert not graded.binary and graded.mark(2).low == graded.mark(2).high == 0.5
    half = 1.96 * (0.0625 * 40 / 39) ** 0.5 / 40**0.5
    assert graded.mark(1).low == pytest.approx(0.5 - half)


def test_too_few_examples_are_said_to_be():
    few = sweep(scores={1: [1.0] * 5, 4: [0.0] * 5}, categories=[None] * 5)
    table = scores_table([few], 4)
    assert table.rows[0][1] == "100.0 (too few)" and any("too few" in note for note in table.notes)
    assert gains_table(few).rows[0][4].endswith("(too few)")


def result(task: str, group: str, loops: int, scores: list[float]) -> Result:
    items = tuple(ItemScore(str(n), f"{task}{n}", "own", {"acc,none": score}) for n, score in enumerate(scores))
    recipe = Recipe("m", "f", "float32", loops, task=task)
    return Result(recipe, f"{task}.loops-{loops}", group, {"acc,none": Metric(0.0, None)}, items)


def test_a_group_is_one_column_whose_tasks_are_its_categories():
    results = [result(t, "mmlu", loops, [1.0, 0.0]) for t in ("mmlu_law", "mmlu_art") for loops in (1, 2)]
    (found,) = gather(results, 2)
    assert found.task == "mmlu" and found.metric == "acc" and len(found.scores[1]) == 4
    assert list(found.categories) == ["mmlu_law"] * 2 + ["mmlu_art"] * 2
    (alone,) = gather([result("t", "t", 1, [1.0])], 2)
    assert alone.categories == ["own"] and alone.ends == (1, 1)


def test_table_15_stands_beside_the_categories_that_were_run():
    results = [result(t, "mmlu", 1, [1.0, 0.0]) for t in ("mmlu_anatomy", "mmlu_global_facts", "mmlu_law")]
    (table,) = categories_tables(gather(results, 2))
    assert table.rows == (
        ("anatomy", "41.48", "51.11", "53.33", "50.37", "+21.4 %"),
        ("global_facts", "36.00", "37.00", "36.00", "39.00", "+8.3 %"),
    )
    assert categories_tables(gather([result("t", "t", 1, [1.0])], 2)) == []


def test_the_chart_has_a_line_for_each_task():
    chart = sweep_chart([sweep(), sweep(task="other")], 4)
    assert chart.count("<title>t at") == 4 and chart.count("<title>other at") == 4

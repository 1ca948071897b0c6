"""The paper's numbers as data: complete, consistent with each other, and set beside the right tasks."""

import pytest

from looplm.evaluation.paper import HUB_DATA, benchmark_of, benchmarks, paper, published, unlike_paper


def test_every_score_is_of_a_known_benchmark_in_percent():
    rows = [row["scores"] for row in paper()["models"]] + [row["scores"] for row in paper()["by_loop"]]
    for scores in rows:
        assert set(scores) <= set(benchmarks())
        values = [v for value in scores.values() for v in (value if isinstance(value, list) else [value])]
        assert all(0 <= value <= 100 for value in values)
    assert all(len(values) == 8 for row in paper()["by_loop"] for values in row["scores"].values())
    assert {row["table"] for row in paper()["models"]} == {7, 8, 9}
    assert [row["table"] for row in paper()["by_loop"]] == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("task", "model", "loops", "table", "score"),
    [
        ("gsm8k_cot", "Ouro-1.4B", 4, 7, 78.92),
        ("mmlu", "Qwen3-8B", None, 8, 76.63),
        ("arc_challenge", "Ouro-1.4B", 1, 10, 37.63),
        ("arc_challenge", "Ouro-2.6B", 8, 11, 64.76),
        ("aime24", "Ouro-1.4B-Thinking", 2, 12, 37.33),
    ],
)
def test_numbers_are_found_by_the_task_of_lm_eval(task, model, loops, table, score):
    found = {(p.model, p.loops, p.table): p.score for p in published(task)}
    assert found[model, loops, table] == score


def test_tables_that_repeat_a_number_differ_as_little_as_the_paper_says():
    rows = {row["model"]: row["scores"] for row in paper()["models"] if "Ouro" in row["model"]}
    for row in paper()["by_loop"]:
        for name, values in row["scores"].items():
            if name in rows[row["model"]] and row["table"] in (10, 11):
                assert abs(values[3] - rows[row["model"]][name]) <= 0.33


def test_the_gains_of_table_15_follow_from_its_scores():
    for name, row in paper()["categories"].items():
        if "first" in row:
            assert 100 * (row["last"] / row["first"] - 1) == pytest.approx(row["gain"], abs=0.1), name


def test_a_benchmark_has_a_task_or_columns_to_read():
    assert HUB_DATA["gsm8k_cot"] == "openai/gsm8k"
    assert all((b.task is None) == (b.fields is not None) for b in benchmarks().values())


def test_what_the_paper_did_otherwise():
    assert unlike_paper("gsm8k_cot", 3, "exact_match,strict-match", None) == []
    said = unlike_paper("gsm8k_cot", 0, "exact_match,flexible-extract", "c" * 64)
    assert said == [
        "0 examples before the question, the paper 3",
        "metric exact_match,flexible-extract, the paper exact_match,strict-match",
        "a chat template, the paper none",
    ]
    assert unlike_paper("mine", 0, "acc", None) == [] and benchmark_of("mine") is None and published("mine") == []
    assert unlike_paper("mmlu", 5, "acc,none", None) == []
    assert unlike_paper("super_gpqa", 0, "acc,none", "c" * 64) == ["metric acc,none, the paper judged"]

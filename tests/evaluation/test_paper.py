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
    found = {(p.model, p.loops, p.table): p.score for p in published(task) if not p.measure}
    assert found[model, loops, table] == score


def test_tables_that_repeat_a_number_differ_as_little_as_the_paper_says():
    rows = {row["model"]: row["scores"] for row in paper()["models"] if "Ouro" in row["model"]}
    for row in paper()["by_loop"]:
        for name, values in row["scores"].items():
            if name in rows[row["model"]] and row["table"] in (10, 11):
                assert abs(values[3] - rows[row["model"]][name]) <= 0.33


def test_the_gains_of_table_15_follow_from_its_scores_and_its_mean_is_that_of_mmlu():
    categories = paper()["categories"]
    assert len(categories) == 57 and next(iter(categories)) == "elementary_mathematics"
    for name, row in categories.items():
        assert len(row["scores"]) == 4
        assert 100 * (row["scores"][3] / row["scores"][0] - 1) == pytest.approx(row["gain"], abs=0.1), name
    by_loop = next(row for row in paper()["by_loop"] if row["table"] == 10)["scores"]["mmlu"]
    for loop in range(4):  # the paper weighs categories by their questions, so this is only near
        mean = sum(row["scores"][loop] for row in categories.values()) / 57
        assert mean == pytest.approx(by_loop[loop], abs=2.5)


@pytest.mark.parametrize(
    ("table", "model", "scores"),
    [
        (7, "Gemma3-1B", {"mmlu": 39.85, "gsm8k": 2.05, "math500": 41.0, "mbpp_plus": 10.1}),
        (7, "Llama3.2-3B", {"bbh": 39.45, "humaneval": 29.9}),
        (7, "Gemma3-4B", {"arc_challenge": 60.92, "winogrande": 71.07}),
        (8, "Gemma3-4B", {"arc_challenge": 60.75, "winogrande": 71.27}),
        (8, "Gemma3-12B", {"hellaswag": 83.68, "math500": 83.2}),
        (8, "Llama3.1-8B", {"mmlu_pro": 43.24, "mbpp": 62.4}),
        (9, "DeepSeek-Distill-Qwen-1.5B", {"aime24": 29.6, "olympiad": 56.44}),
        (9, "DeepSeek-Distill-Qwen-7B", {"aime25": 36.0, "gpqa": 51.0}),
    ],
)
def test_dense_peers(table, model, scores):
    (row,) = [row for row in paper()["models"] if (row["table"], row["model"]) == (table, model)]
    assert "loops" not in row and {name: row["scores"][name] for name in scores} == scores


def test_every_table_is_whole():
    """Nine models in Tables 7 and 8 with twelve benchmarks each, seven in Table 9 with seven and pass@10 of two."""
    for table, models, count in ((7, 9, 12), (8, 9, 12), (9, 7, 7)):
        rows = [row for row in paper()["models"] if row["table"] == table]
        assert len(rows) == models and all(len(row["scores"]) == count for row in rows)
        assert all(set(row.get("pass_at_10", {})) == ({"aime24", "aime25"} if table == 9 else set()) for row in rows)


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

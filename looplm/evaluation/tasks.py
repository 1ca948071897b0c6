"""Tasks for lm-eval from what is on the machine: JSON lines, BIG-bench JSON, reasoning-gym, programs; and its own.

A task is written as one of

    NAME                            any task or group of lm-eval
    FILE.jsonl, FOLDER/task.json    items as in `looplm.evaluation.items`
    reasoning-gym:FAMILY[:N]        N generated questions (100), answers judged by the family's own verifier
    reasoning-gym-choice:FAMILY[:N] the same questions; the right answer among up to four, by log-likelihood
    humaneval[:N], humaneval_plus[:N], mbpp[:N], mbpp_plus[:N]
                                    N samples a problem (1), run against the tests in a sandbox
    math500                         worked examples before the question, answers compared as mathematics
    paper:NAME[:N]                  a benchmark of the paper with its few-shot count, and with its sampling where
                                    models think before they answer (looplm/evaluation/paper.yaml); N samples a
                                    problem (1) of those that are scored by pass@k: AIME (Table 9) and programs

Everything becomes an lm-eval task, so that few-shot examples, chat templates and limits mean the same for all. The
settings of our own tasks are `VERSION` of this module; raise it where a prompt or a score changes.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from looplm.data.gym import open_family
from looplm.data.stated import normal
from looplm.evaluation.hub import how_to_get, hub_items
from looplm.evaluation.items import Item, Question, load_items
from looplm.evaluation.math500 import math500_task
from looplm.evaluation.paper import HUB_DATA, benchmarks
from looplm.evaluation.programs import PROGRAMS, program_task
from looplm.evaluation.sampling import sampled_task

VERSION = 1
_SIZE, _SHOTS, _SEED = 100, 16, 0
"""Questions of a reasoning-gym family, those beside them for few-shot prompts, and the seed of both."""
_CHOICES = 4
_THINKING = {"do_sample": True, "temperature": 1.0, "top_p": 0.7, "max_gen_toks": 32768}
"""Table 17's sampling; the paper gives no length, this one is lm-eval's of AIME."""


@dataclass(frozen=True)
class Loaded:
    """A task that is ready: its own name, the name it was asked for by (a group's, or its own), and what to run."""

    name: str
    group: str
    task: Task


def load_tasks(written: Sequence[str], allow_code: bool = False) -> list[Loaded]:
    """The tasks in the order they are named; a group gives all of its tasks.

    Args:
        allow_code: whether tasks may run what the model writes.

    Raises:
        ValueError: an unknown task, one whose data is not on this machine (with how to get it), a file that is not as
            described, one that runs code where that is not allowed.
    """
    if not written:
        raise ValueError("tasks is empty; name at least one, e.g. a file of JSON lines")
    found: dict[str, Loaded] = {}
    for name in written:
        tasks = _load(name, allow_code)
        for key, task in tasks.items():
            if key in found:
                raise ValueError(f"two tasks are called {key}; name each once")
            found[key] = Loaded(key, key if len(tasks) == 1 else name.removeprefix("paper:"), task)
    return list(found.values())


def _load(written: str, allow_code: bool) -> dict[str, Task]:
    kind, _, rest = written.partition(":")
    if Path(written).suffix in (".jsonl", ".json"):
        return _one(items_task(load_items(written), _file_name(Path(written))))
    if kind in ("reasoning-gym", "reasoning-gym-choice"):
        return _one(reasoning_gym_task(rest, as_choice=kind.endswith("choice")))
    if kind in PROGRAMS:
        if not allow_code:
            raise ValueError(f"{kind} runs code that the model writes: allow it with --allow-code-execution")
        return _one(program_task(kind, _count(rest or "1", written)))
    if written == "math500":
        return _one(math500_task())
    if kind == "paper":
        return _of_paper(rest, allow_code)
    return _of_lm_eval(written, allow_code)


def _of_paper(written: str, allow_code: bool) -> dict[str, Task]:
    """A benchmark with the settings of the paper's Tables 16 and 17, from "NAME" or "NAME:N"."""
    name, _, count = written.partition(":")
    benchmark = benchmarks().get(name)
    if benchmark is None:
        raise ValueError(f"the paper has no benchmark {name!r}; there are {', '.join(benchmarks())}")
    several = [known.name for known in benchmarks().values() if known.samples]
    if count and not benchmark.samples:
        raise ValueError(f"paper:{written}: N samples of each problem are for {', '.join(several)}; leave :{count} out")
    samples = _count(count or "1", f"paper:{written}")
    if benchmark.task is None:
        tasks = _one(items_task(hub_items(benchmark), benchmark.name))
    else:
        tasks = _load(f"{benchmark.task}:{samples}" if benchmark.task in PROGRAMS else benchmark.task, allow_code)
    for task in tasks.values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=benchmark.num_fewshot)
        if benchmark.thinks and task.OUTPUT_TYPE == "generate_until":
            stops: dict[str, Any] = {"until": []} if benchmark.task is None else {}  # a thought has many lines
            task.set_config(key="generation_kwargs", value={**_THINKING, **stops}, update=True)
    if benchmark.samples and benchmark.thinks:
        return {name: sampled_task(task, samples) for name, task in tasks.items()}
    return tasks


def _one(task: ConfigurableTask) -> dict[str, Task]:
    return {task.task_name: task}


def _file_name(path: Path) -> str:
    return path.parent.name if path.name == "task.json" else path.stem


def items_task(items: Sequence[Item] | Sequence[Question], name: str) -> ConfigurableTask:
    """A task of items: choices by log-likelihood (`acc`, and `acc_norm` by character), answers by exact match."""
    if isinstance(items[0], Item):
        docs = [_choice_doc(item) for item in items if isinstance(item, Item)]
        return ConfigurableTask(config={**_choice_settings(name), "custom_dataset": _split(docs)})
    docs = [{"id": q.id, "prompt": q.prompt, "answers": list(q.answers), "category": q.category or ""} for q in items]  # type: ignore[union-attr]
    return ConfigurableTask(
        config={
            **_common(name),
            "custom_dataset": _split(docs),
            "output_type": "generate_until",
            "doc_to_target": "answers",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
            "process_results": partial(_exact_match),
            "metric_list": [_mean("exact_match")],
        }
    )


def _choice_doc(item: Item) -> dict[str, Any]:
    choices = list(item.choices)
    return {
        "id": item.id,
        "prompt": item.prompt,
        "choices": choices,
        "answer": item.answer,
        "category": item.category or "",
    }


def _common(name: str) -> dict[str, Any]:
    return {
        "task": name,
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "prompt",
        "metadata": {"version": VERSION},
    }


def _choice_settings(name: str) -> dict[str, Any]:
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    return {
        **_common(name),
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _split(test: list[dict[str, Any]], shots: list[dict[str, Any]] | None = None) -> Callable[..., dict[str, Dataset]]:
    """The data as lm-eval asks for it."""
    sets = {"test": Dataset.from_list(test)}
    if shots is not None:
        sets["shots"] = Dataset.from_list(shots)
    return lambda **_: sets


def _exact_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the text is one of the answers, but for case, outer white space and a full stop at its end."""
    said = normal(results[0])
    return {"exact_match": float(any(said == normal(answer) for answer in doc["answers"]))}


def _count(written: str, task: str) -> int:
    if not written.isdigit() or int(written) < 1:
        raise ValueError(f"task {task!r}: {written!r} is no number of examples or samples above 0")
    return int(written)


def reasoning_gym_task(written: str, as_choice: bool) -> ConfigurableTask:
    """A family of reasoning-gym as a task, from "FAMILY" or "FAMILY:N".

    Raises:
        ValueError: not installed, an unknown family or one that does not verify itself, no number.
    """
    family, _, count = written.partition(":")
    size = _count(count, f"reasoning-gym:{written}") if count else _SIZE
    data = open_family(family, size=size, seed=_SEED)
    more = open_family(family, size=_SHOTS, seed=_SEED + 1)
    if as_choice:
        items = gym_choices([(entry["question"], str(entry["answer"])) for entry in data])
        return items_task(items, f"reasoning-gym-choice-{family}")
    docs, shots = ([_gym_doc(place, entry) for place, entry in enumerate(part)] for part in (data, more))
    return ConfigurableTask(
        config={
            **_common(f"reasoning-gym-{family}"),
            "fewshot_split": "shots",
            "custom_dataset": _split(docs, shots),
            "output_type": "generate_until",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": 128, "do_sample": False},
            "process_results": partial(_verified, data),
            "metric_list": [_mean("score"), _mean("solved")],
        }
    )


def _gym_doc(place: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    prompt = f"Question: {entry['question'].strip()}\nAnswer:"
    return {"id": str(place), "place": place, "prompt": prompt, "answer": str(entry["answer"]), "category": ""}


def _verified(data: Any, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The family's own score of the answer, and whether it is full."""
    score = float(data.score_answer(answer=results[0].strip(), entry=data[doc["place"]]))
    return {"score": score, "solved": float(score == 1.0)}


def gym_choices(pairs: Sequence[tuple[str, str]]) -> list[Item]:
    """Questions with their answer among up to three others, drawn from the answers to the other questions.

    Raises:
        ValueError: all answers are the same.
    """
    draw, answers = random.Random(_SEED), sorted({answer for _, answer in pairs})
    if len(answers) < 2:
        raise ValueError("every question has the same answer; there is nothing to choose between")
    items = []
    for place, (question, answer) in enumerate(pairs):
        others = draw.sample([other for other in answers if other != answer], min(_CHOICES - 1, len(answers) - 1))
        choices = draw.sample([answer, *others], len(others) + 1)
        items.append(Item(str(place), f"Question: {question.strip()}\nAnswer:", tuple(choices), choices.index(answer)))
    return items


@cache
def _manager() -> TaskManager:
    """lm-eval's index of its tasks, which takes seconds to read."""
    return TaskManager()


def _of_lm_eval(name: str, allow_code: bool) -> dict[str, Task]:
    """A task or group that ships with lm-eval; its data come from the hub's cache."""
    manager = _manager()
    if name not in manager.all_tasks:
        near = manager.match_tasks([f"*{name}*"])[:5]
        hint = f"near it: {', '.join(near)}" if near else "see `lm-eval ls tasks`"
        raise ValueError(f"no such task: {name} is no task of lm-eval, no file and no reasoning-gym:FAMILY; {hint}")
    try:
        with _reading():
            tasks: dict[str, Task] = manager.load([name])["tasks"]
            for task in tasks.values():
                _settle(task)
    except Exception as error:  # whatever the hub, a proxy or the loader of the data set throws
        raise ValueError(how_to_get(name, error, HUB_DATA.get(name))) from None
    unsafe = [key for key, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not allow_code:
        raise ValueError(f"{unsafe[0]} runs code that the model writes: allow it with --allow-code-execution")
    return tasks


@contextmanager
def _reading() -> Iterator[None]:
    """Data is read without bars, and what is drawn meanwhile is alike in every run, whatever an earlier one has kept.

    Some tasks shuffle choices when they read them (GPQA), and `datasets` keeps what such a function has made.
    """
    bars, cached = datasets.utils.logging.is_progress_bar_enabled(), datasets.is_caching_enabled()
    state = random.getstate()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(state)
        if bars:
            datasets.enable_progress_bars()
        if cached:
            datasets.enable_caching()


def _settle(task: Task) -> None:
    """Process the documents once and for all.

    lm-eval does so whenever it reads them: shuffled choices may then lie otherwise in a question and its check.
    """
    process = task.get_config("process_docs")
    if process is None or not isinstance(task, ConfigurableTask):
        return
    config, shots = task.config, task.fewshot_cfg
    alike = shots.process_docs is process
    named = [config.training_split, config.validation_split, config.test_split, shots.split if alike else None]
    task.dataset = {split: process(task.dataset[split]) for split in dict.fromkeys(named) if split is not None}
    config.process_docs = None
    if alike:
        shots.process_docs = None
        if (examples := task.fewshot_docs()) is not None:
            task.sampler.replace_df(list(examples))

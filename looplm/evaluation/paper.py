"""The paper's own numbers and its dense peers', and the settings of its benchmarks: paper.yaml, read once.

Ouro Tables 7 to 17. A user's results are set beside them where the task is the same, with the settings that
differ named: a number measured otherwise is not the same number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the paper ran it.

    Attributes:
        name: its key here; title: what the paper calls it.
        data: its data set on the hub; config, split: which part of it, where this package reads it.
        num_fewshot, metric, how: the paper's settings.
        task: of lm-eval or of this package; None: the data set is read as questions, by `fields`.
        fields: which columns are question, answer (a letter where there are choices), choices and category.
        picture: a column; questions with something in it are left out.
        samples: whether a problem may be asked several times, for pass@k.
    """

    name: str
    title: str
    data: str
    num_fewshot: int
    metric: str
    how: str
    task: str | None = None
    config: str | None = None
    split: str | None = None
    fields: Mapping[str, str] | None = None
    picture: str | None = None
    samples: bool = False

    @property
    def thinks(self) -> bool:
        """Whether it is for models that think before they answer (Table 17)."""
        return self.how.startswith("thinking")


@dataclass(frozen=True)
class Published:
    """A number of the paper.

    Attributes:
        model, table: whose it is and where it stands.
        loops: None of a dense model; score: percent.
        measure: what else than the benchmark's usual metric it is: "" or "pass@10".
    """

    model: str
    table: int
    loops: int | None
    score: float
    measure: str = ""


@cache
def paper() -> dict[str, Any]:
    """Everything in paper.yaml, as it stands there."""
    text = resources.files("looplm.evaluation").joinpath("paper.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    return values


@cache
def benchmarks() -> dict[str, Benchmark]:
    """The paper's benchmarks by name."""
    return {name: Benchmark(name, **values) for name, values in paper()["benchmarks"].items()}


def benchmark_of(task: str) -> Benchmark | None:
    """The benchmark that a task runs, by its name or by that of lm-eval; None where the paper has none."""
    known = benchmarks()
    return known.get(task) or next((benchmark for benchmark in known.values() if benchmark.task == task), None)


def published(task: str) -> list[Published]:
    """What the paper says of a task: its own models by loop, and the dense peers; empty where it says nothing."""
    benchmark = benchmark_of(task)
    if benchmark is None:
        return []
    found = [
        Published(row["model"], row["table"], row.get("loops"), row[scores][benchmark.name], measure)
        for scores, measure in (("scores", ""), ("pass_at_10", "pass@10"))
        for row in paper()["models"]
        if benchmark.name in row.get(scores, {})
    ]
    for row in paper()["by_loop"]:
        scores = row["scores"].get(benchmark.name, [])
        found += [Published(row["model"], row["table"], loop, score) for loop, score in enumerate(scores, start=1)]
    return found


def unlike_paper(task: str, num_fewshot: int | None, metric: str | None, chat_template: str | None) -> list[str]:
    """How a measurement differs from the paper's settings, in words; empty where it does not, or nothing is known."""
    benchmark = benchmark_of(task)
    if benchmark is None:
        return []
    found = []
    if num_fewshot != benchmark.num_fewshot:
        found.append(f"{num_fewshot} examples before the question, the paper {benchmark.num_fewshot}")
    if metric is not None and metric.removesuffix(",none") != benchmark.metric:
        found.append(f"metric {metric}, the paper {benchmark.metric}")
    if chat_template is not None and not benchmark.thinks:
        found.append("a chat template, the paper none")
    return found


HUB_DATA = {
    benchmark.task: benchmark.data
    for benchmark in (Benchmark(name, **values) for name, values in paper()["benchmarks"].items())
    if benchmark.task is not None
}
"""The data set of the hub that a task needs."""

"""Result files: one task at one depth, with the recipe, every item's score and what it cost in loops."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from looplm.evaluation.recipe import Recipe
from looplm.files import write_json

KIND = "looplm-eval"
"""What a result file says it is."""


@dataclass(frozen=True)
class Metric:
    """A score over all items, its standard error where there is one, and which way is better."""

    value: float
    stderr: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class ItemScore:
    """One item.

    Attributes:
        id: its name or number in the task.
        doc: the start of the SHA-256 of the document, which pairs the items of two files.
        category: where the data names one.
        scores: by metric and filter, e.g. "exact_match,strict-match"; a number each.
        outputs: the generated texts; empty of log-likelihood tasks.
        question, reference: of a free answer, what a judge is shown.
    """

    id: str
    doc: str
    category: str | None
    scores: Mapping[str, float]
    outputs: tuple[str, ...] = ()
    question: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Result:
    """A task at a depth.

    Attributes:
        recipe: what the numbers depend on.
        name: of the task and depth, which is the file's name.
        group: the name the task was asked for by, e.g. a group's.
        metrics: by metric and filter.
        items: in the order of the task.
        cost: mean loops over read and over processed positions, and how many there were.
        judge: who judged free answers, and how many wait for a verdict; None where nobody was asked.
    """

    recipe: Recipe
    name: str
    group: str
    metrics: Mapping[str, Metric]
    items: tuple[ItemScore, ...]
    cost: Mapping[str, Any] = field(default_factory=dict)
    judge: Mapping[str, Any] | None = None

    @property
    def main_metric(self) -> str:
        """The metric shown where one has to be chosen: a judge's, the paper's of this task, or the first one."""
        from looplm.evaluation.paper import benchmark_of

        if "judged" in self.metrics:
            return "judged"
        benchmark = benchmark_of(self.recipe.task) or benchmark_of(self.group)
        wanted = None if benchmark is None else benchmark.metric
        return next(
            (name for name in self.metrics if wanted in (name, name.removesuffix(",none"))), next(iter(self.metrics))
        )

    def scores(self, metric: str) -> dict[str, float]:
        """The items' scores by document; a document that comes twice is numbered.

        Raises:
            ValueError: a metric that the file does not have.
        """
        if metric not in self.metrics:
            raise ValueError(f"{self.name} has no metric {metric!r}; it has {', '.join(self.metrics)}")
        found: dict[str, float] = {}
        seen: dict[str, int] = {}
        for item in self.items:
            seen[item.doc] = seen.get(item.doc, 0) + 1
            if metric in item.scores:
                found[item.doc if seen[item.doc] == 1 else f"{item.doc}#{seen[item.doc]}"] = item.scores[metric]
        return found

    def save(self, folder: Path) -> Path:
        """Write the file into a folder."""
        path = folder / f"{self.name}.json"
        write_json(path, {"kind": KIND, **asdict(self), "recipe": self.recipe.as_dict()})
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """A result file.

        Raises:
            ValueError: no such file, or none of these.
        """
        if not path.is_file():
            raise ValueError(f"no such result file: {path}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict) or values.pop("kind", None) != KIND:
            raise ValueError(f"{path} is no result file of `looplm eval`")
        values["recipe"] = Recipe.from_dict(values["recipe"])
        values["metrics"] = {name: Metric(**metric) for name, metric in values["metrics"].items()}
        values["items"] = tuple(ItemScore(**{**item, "outputs": tuple(item["outputs"])}) for item in values["items"])
        return cls(**values)


def load_results(folder: Path) -> list[Result]:
    """The result files of a folder, by name; other JSON files there are left alone.

    Raises:
        ValueError: no such folder, or none in it.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    found = [Result.load(path) for path in sorted(folder.glob("*.json")) if _is_result(path)]
    if not found:
        raise ValueError(f"{folder} holds no result files of `looplm eval`")
    return found


def _is_result(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"kind": "{KIND}"' in file.read(200)


def mean_metric(values: Iterable[float]) -> Metric:
    """The mean of scores with its standard error, sqrt(variance / n) with n - 1 in the variance.

    Raises:
        ValueError: no values.
    """
    numbers = list(values)
    if not numbers:
        raise ValueError("no scores to take the mean of")
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return Metric(mean, None)
    variance = sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return Metric(mean, (variance / len(numbers)) ** 0.5)

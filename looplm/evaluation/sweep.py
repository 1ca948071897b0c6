"""`looplm study depth-sweep`: score by loop, below and beyond the trained depth, and where the loops gain most.

Ouro Tables 10 to 13 (score by loop 1..8) and Table 15 (gain by category from loop 1 to the trained T). All depths of a
log-likelihood task come from one pass. The paper gives no errors; here every share has Wilson's interval, every gain a
paired bootstrap interval, and too few items are said to be too few.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from looplm.evaluation.compare import PairedTest, paired_test
from looplm.evaluation.drawings import Mark, share_chart
from looplm.evaluation.intervals import FEWEST, Share, share
from looplm.evaluation.paper import benchmark_of, paper
from looplm.evaluation.recipe import digest
from looplm.evaluation.results import ItemScore, Result
from looplm.evaluation.running import Settings, run_tasks
from looplm.evaluation.saving import save_study
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tables import Table
from looplm.model.loading import load_config

STUDY = "depth-sweep"


@dataclass(frozen=True)
class Sweep:
    """A task (or group) at every depth.

    Attributes:
        task, metric: what was scored; higher_is_better: which way is up.
        scores: by loop, the score of every item (a number each), in the same order at all loops.
        categories: of the items.
        trained: T of the model.
    """

    task: str
    metric: str
    scores: Mapping[int, Sequence[float]]
    categories: Sequence[str | None]
    trained: int

    @property
    def binary(self) -> bool:
        """Whether every score is right or wrong."""
        return all(value in (0.0, 1.0) for values in self.scores.values() for value in values)

    def share(self, loop: int) -> Share:
        """The share of right items with its interval."""
        values = self.scores[loop]
        return share(int(sum(values)), len(values))

    def mark(self, loop: int) -> Mark:
        """The mean with its interval, for the figure."""
        if self.binary:
            part = self.share(loop)
            return Mark(loop, part.hits / part.total, part.low, part.high)
        mean, half = statistics.fmean(self.scores[loop]), self.half_width(loop)
        return Mark(loop, mean, None if half is None else mean - half, None if half is None else mean + half)

    def half_width(self, loop: int) -> float | None:
        """1.96 standard errors of the mean; None of too few items."""
        values = self.scores[loop]
        return 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) >= FEWEST else None

    @property
    def ends(self) -> tuple[int, int]:
        """The loops between which gains are taken: the first one, and the deepest that was trained."""
        return min(self.scores), max([loop for loop in self.scores if loop <= self.trained] or [min(self.scores)])

    def gains(self) -> dict[str, PairedTest]:
        """From the first loop to the trained one by category, the largest first, and of all items."""
        first, last = self.ends
        names = sorted({category for category in self.categories if category is not None})
        tests = {name: self._gain(first, last, name) for name in names}
        ordered = dict(sorted(tests.items(), key=lambda pair: -pair[1].difference))
        return {**ordered, "all": self._gain(first, last, None)}

    def _gain(self, first: int, last: int, category: str | None) -> PairedTest:
        kept = [n for n, name in enumerate(self.categories) if category is None or name == category]
        return paired_test([self.scores[first][n] for n in kept], [self.scores[last][n] for n in kept])


def run_sweep(model_name: str, settings: Settings, output: Path, beside_paper: bool = False) -> list[Table]:
    """Run the tasks at all depths, write the study, and return its tables.

    Raises:
        ValueError: as `run_tasks`.
    """
    trained = load_config(model_name).total_ut_steps
    results = run_tasks(model_name, settings, output / "results")
    sweeps = gather(results, trained)
    tables = [scores_table(sweeps, trained), *(gains_table(sweep) for sweep in sweeps)]
    if beside_paper:
        tables += [by_loop_table(sweeps), *categories_tables(sweeps), paper_table(results)]
    figures = {f"Score by loop; {trained} loops are trained": sweep_chart(sweeps, trained)}
    recipe = replace(
        results[0].recipe,
        loops=trained,
        task=STUDY,
        data=digest([result.recipe.data for result in results]),
        prompts=digest([result.recipe.prompts for result in results]),
        task_version=None,
        generation=None,
        settings={"tasks": list(settings.tasks), "loops": [depth.loops for depth in settings.depths]},
    )
    save_study(
        output, STUDY, recipe, {"trained": trained, "sweeps": [as_dict(sweep) for sweep in sweeps]}, tables, figures
    )
    return tables


def gather(results: Sequence[Result], trained: int) -> list[Sweep]:
    """The results of each task or group, loop by loop; a group's tasks are the categories of its items."""
    sweeps = []
    for group in dict.fromkeys(result.group for result in results):
        part = [result for result in results if result.group == group]
        metric, loops = part[0].main_metric, sorted({result.recipe.loops for result in part})
        items = {
            loop: [(result, item) for result in part if result.recipe.loops == loop for item in result.items]
            for loop in loops
        }
        scores = {loop: [item.scores[metric] for _, item in found] for loop, found in items.items()}
        categories = [_category(result, item) for result, item in items[loops[0]]]
        sweeps.append(Sweep(group, metric.removesuffix(",none"), scores, categories, trained))
    return sweeps


def _category(result: Result, item: ItemScore) -> str | None:
    return item.category if result.recipe.task == result.group else result.recipe.task


def as_dict(sweep: Sweep) -> dict[str, Any]:
    """Plain values for JSON: means and intervals by loop, gains by category, and every item's score."""
    marks = {str(loop): sweep.mark(loop) for loop in sweep.scores}
    return {
        "task": sweep.task,
        "metric": sweep.metric,
        "items": len(sweep.categories),
        "by_loop": {loop: {"score": m.value, "low": m.low, "high": m.high} for loop, m in marks.items()},
        "gains": {name: asdict(test) for name, test in sweep.gains().items()},
        "scores": {str(loop): list(values) for loop, values in sweep.scores.items()},
    }


def scores_table(sweeps: Sequence[Sweep], trained: int) -> Table:
    """Tables 10 to 13: a row a loop, a column a task, percent with 95 % intervals."""
    loops = sorted({loop for sweep in sweeps for loop in sweep.scores})
    rows = [(_row_name(loop, trained), *(_cell(sweep, loop) for sweep in sweeps)) for loop in loops]
    notes = [f"Trained with {trained} loops."]
    if loops[-1] > trained:
        notes.append("* extrapolation: more loops than the model was trained with.")
    if any(len(sweep.categories) < FEWEST for sweep in sweeps):
        notes.append(f"(too few): fewer than {FEWEST} examples carry no interval.")
    header = ("loops", *(f"{sweep.task} ({sweep.metric}, {len(sweep.categories)})" for sweep in sweeps))
    return Table("Score by loop, percent [95 % interval]", header, tuple(rows), tuple(notes))


def _row_name(loop: int, trained: int) -> str:
    return f"{loop} *" if loop > trained else str(loop)


def _cell(sweep: Sweep, loop: int) -> str:
    if loop not in sweep.scores:
        return "–"
    mark = sweep.mark(loop)
    if mark.low is None or mark.high is None:
        return f"{100 * mark.value:.1f} (too few)"
    return f"{100 * mark.value:.1f} [{100 * mark.low:.1f}, {100 * mark.high:.1f}]"


def gains_table(sweep: Sweep) -> Table:
    """Table 15: by category the score at one loop and at the trained depth, the gain and its paired interval."""
    gains = sweep.gains()
    rows = [_gain_row(name, test) for name, test in gains.items()]
    first, deepest = sweep.ends
    header = ("category", "items", f"loop {first}", f"loop {deepest}", "gain [95 %, paired]", "relative", "McNemar p")
    title = f"{sweep.task}: gain from loop {first} to loop {deepest}, {sweep.metric} in percent"
    unmoved = any(test.low == test.high == 0 for test in gains.values())
    notes = ("An interval of no width: no item changed, so that resampling them shows no spread.",) if unmoved else ()
    return Table(title, header, tuple(rows), notes)


def _gain_row(name: str, test: PairedTest) -> tuple[str, ...]:
    gain = f"{100 * test.difference:+.1f}"
    if test.low is None or test.high is None:
        gain += " (too few)"
    else:
        gain += f" [{100 * test.low:+.1f}, {100 * test.high:+.1f}]"
    relative = f"{100 * test.difference / test.first:+.1f} %" if test.first else "–"
    p_value = "–" if test.p_value is None else f"{test.p_value:.2g}"
    return name, str(test.items), f"{100 * test.first:.1f}", f"{100 * test.second:.1f}", gain, relative, p_value


def by_loop_table(sweeps: Sequence[Sweep]) -> Table:
    """The paper's Tables 10 to 13 for the tasks that were run."""
    names = {sweep.task: benchmark.name for sweep in sweeps if (benchmark := benchmark_of(sweep.task)) is not None}
    rows = [
        (task, row["model"], *(f"{score:.2f}" for score in row["scores"][name]))
        for task, name in names.items()
        for row in paper()["by_loop"]
        if name in row["scores"]
    ]
    notes = () if rows else ("The paper has no score by loop for these tasks.",)
    return Table("The paper's scores by loop, percent", ("task", "model", *map(str, range(1, 9))), tuple(rows), notes)


def categories_tables(sweeps: Sequence[Sweep]) -> list[Table]:
    """The paper's Table 15 for the categories of MMLU that were run, where some were."""
    ran = {str(name).removeprefix("mmlu_") for sweep in sweeps if sweep.task == "mmlu" for name in sweep.categories}
    rows = [
        (name, *(f"{score:.2f}" for score in row["scores"]), f"{row['gain']:+.1f} %")
        for name, row in paper()["categories"].items()
        if name in ran
    ]
    header = ("category", "loop 1", "loop 2", "loop 3", "loop 4", "relative")
    return [Table("The paper's gains by category of MMLU (Table 15), percent", header, tuple(rows))] if rows else []


def sweep_chart(sweeps: Sequence[Sweep], trained: int) -> str:
    """A line a task, with its intervals."""
    lines = {f"{sweep.task}": [sweep.mark(loop) for loop in sorted(sweep.scores)] for sweep in sweeps}
    return share_chart(lines, f"Score by loop; the model was trained with {trained}", "score")

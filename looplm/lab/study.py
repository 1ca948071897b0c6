"""`looplm lab run`: a few kinds of runs with the same seeds, their results, a table and charts.

A folder belongs to one study: `study.json` says which runs. Started again with the same settings it goes on, with more
seeds it grows, with other settings it is refused.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from looplm.files import write_json, write_text
from looplm.lab.figures import curves, line_chart
from looplm.lab.results import by_run
from looplm.lab.runner import run_all
from looplm.lab.settings import RunSettings, load_grid, matched
from looplm.lab.tasks import task_class

FILE = "study.json"
SEEDS = 5


@dataclass(frozen=True)
class Study:
    """Settings by name, and how many seeds each gets (1 to `seeds`)."""

    arms: Mapping[str, RunSettings]
    seeds: int

    def run(self, folder: Path, workers: int = 2) -> Table:
        """Finish all runs, draw the charts, and give the table of scores.

        Raises:
            ValueError: a folder of another study, or as `looplm.lab.runner.run_all`.
        """
        self._check(folder)
        wanted = {
            settings.changed(seed=seed).key: (name, settings.changed(seed=seed))
            for name, settings in self.arms.items()
            for seed in range(1, self.seeds + 1)
        }
        runs = by_run(run_all([settings for _, settings in wanted.values()], folder, workers, self._begin))
        rows = [{**row, "arm": name} for key, (name, _) in wanted.items() for row in runs[key]]
        self._draw(rows, folder)
        return self._table(rows)

    def _plain(self) -> dict[str, Any]:
        plain = {name: settings.plain() for name, settings in self.arms.items()}
        return {name: {key: value for key, value in values.items() if key != "seed"} for name, values in plain.items()}

    def _check(self, folder: Path) -> None:
        path = folder / FILE
        if not path.exists():
            return
        before, now = json.loads(path.read_text(encoding="utf-8")), self._plain()
        if before == now:
            return
        remedy = "choose another --output, or the settings it began with"
        if list(before) != list(now):
            raise ValueError(f"{folder} holds runs of {', '.join(before)}, not {', '.join(now)}; {remedy}")
        arm, name = next((arm, name) for arm in now for name in now[arm] if before[arm].get(name) != now[arm][name])
        was, given = before[arm].get(name), now[arm][name]
        raise ValueError(f"{folder} holds runs with {name} = {was!r}, not {given!r} ({arm}); {remedy}")

    def _begin(self, folder: Path) -> None:
        write_json(folder / FILE, self._plain())

    def _draw(self, rows: list[dict[str, Any]], folder: Path) -> None:
        """Scores by loop and difficulty at the end, and by step at the last trained loop."""
        task = next(iter(self.arms.values())).make_task()
        last = _last(rows)
        read = [row for row in last if row["loop"] == row["loops"]]
        on_the_way = [row for row in rows if row["loop"] == row["loops"]]
        charts = {
            "by-loop": line_chart(curves(last, "loop", "arm"), f"{task.name}: score after every loop", "loop"),
            "by-difficulty": line_chart(
                curves(read, "difficulty", "arm"), f"{task.name}: score by {task.unit}", task.unit
            ),
            "learning-curves": line_chart(
                curves(on_the_way, "step", "arm"), f"{task.name}: score over training", "optimizer steps"
            ),
        }
        for name, drawing in charts.items():
            write_text(folder / f"{name}.svg", drawing)

    def _table(self, rows: list[dict[str, Any]]) -> Table:
        """One row an arm: scores at the last trained loop by difficulty, mean and range over seeds."""
        read = [row for row in _last(rows) if row["loop"] == row["loops"]]
        levels = sorted({row["difficulty"] for row in read})
        table = Table(title=f"score after the last loop, mean (lowest to highest) of {self.seeds} seeds")
        for heading in ("", "FLOPs", *map(str, levels)):
            table.add_column(heading, justify="left" if not heading else "right")
        for arm, line in curves(read, "difficulty", "arm").items():
            spent = statistics.fmean(row["flops"] for row in read if row["arm"] == arm)
            table.add_row(arm, f"{spent:.2e}", *(_spread(line.get(level, [])) for level in levels))
        return table


def study_of(task: str, options: Mapping[str, Any], seeds: int | None, compared: bool) -> Study:
    """The study that a command line asks for.

    Args:
        task: a task's name, or the path of a YAML grid.
        options: settings of the run, of those given.
        seeds: 5 by default, or the grid's.
        compared: add what a looped model has to be compared with (`matched`).

    Raises:
        ValueError: an unknown task, options beside a grid, or settings that cannot be.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    if task.endswith((".yaml", ".yml")):
        if options or compared:
            name = next(iter(options), "matched").replace("_", "-")
            raise ValueError(f"--{name} goes with a task; {task} is a grid and says it itself")
        grid = load_grid(Path(task))
        return Study(grid.arms(), seeds or grid.seeds)
    task_class(task)
    settings = RunSettings.validated({"task": task, **options}, "lab run")
    return Study(matched(settings) if compared else {settings.shape: settings}, seeds or SEEDS)


def _last(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every run the rows of its last evaluation, exit rules left out."""
    ends: dict[str, int] = {}
    for row in rows:
        ends[row["run"]] = max(row["step"], ends.get(row["run"], 0))
    return [row for row in rows if row["step"] == ends[row["run"]] and row["rule"] is None]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.3f} ({min(values):.2f} to {max(values):.2f})"

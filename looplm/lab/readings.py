"""Readings of runs: which number of a run a claim is about, and whether runs of given settings have it at all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from looplm.lab.settings import COMPARING, ORACLES, Over, Rule, RunSettings
from looplm.settings import Section

Measure = Literal["score", "loss", "exit_probability", "bits_per_parameter", "mean_loops"]
OF_LOOPS = ("exit_probability", "bits_per_parameter")
"""Measures of a fixed loop, which no rule is read by."""


class Reading(Section):
    """A number of a run."""

    measure: Measure = "score"
    """Exact matches, nats a graded target, mean probability of exiting after the loop, Capo's R, loops of a rule."""
    loop: Annotated[int, Field(ge=1)] | Literal["last"] = "last"
    """The loop read; `last` is the last one trained."""
    difficulty: int | None = None
    """The level of the items; all by default."""
    step: Annotated[int, Field(ge=1)] | None = None
    """When: the first evaluation from this step on; the end by default."""
    rule: Rule | None = None
    """Read under this exit rule and freezing instead of at a fixed loop; the run's `frontier` asks for it."""
    mean_loops: float | None = None
    """The rule's budget, one of those in `frontier`; None for an oracle, which has its own."""
    over: Over = "graded"
    """Which positions' loops are counted."""


class Side(Section):
    """One side of a contrast: an arm, and how it is read where the claim's reading does not hold."""

    arm: str
    condition: str = ""
    measure: Measure | None = None
    loop: Annotated[int, Field(ge=1)] | Literal["last"] | None = None
    difficulty: int | None = None
    step: Annotated[int, Field(ge=1)] | None = None
    rule: Rule | None = None
    mean_loops: float | None = None
    over: Over | None = None

    @property
    def label(self) -> str:
        """The arm and what is particular about its reading."""
        more = [part for part in (self.condition, (self.measure or "").replace("_", " ")) if part]
        more += [f"{name} {getattr(self, name)}" for name in ("loop", "difficulty", "step") if getattr(self, name)]
        budget = f" at {self.mean_loops:g} loops" if self.mean_loops else ""
        more += [self.rule + budget] if self.rule else []
        more += [f"{self.over} positions"] if self.over else []
        return self.arm + (f" ({', '.join(more)})" if more else "")


def reading_of(reading: Reading, side: Side) -> Reading:
    """A claim's reading with what one side has of its own."""
    own = {name: getattr(side, name) for name in Reading.model_fields}
    return reading.model_copy(update={name: value for name, value in own.items() if value is not None})


def unreadable(read: Reading, arm: str, settings: RunSettings) -> str | None:
    """Why an arm of these settings cannot be read so: a loop, a step or a rule that is not scored."""
    scored = settings.evaluation_loops or settings.loops
    if read.loop != "last" and read.loop > scored:
        return f"loop {read.loop} of {arm!r} is not scored, only {scored}"
    if read.step is not None and read.step > settings.steps:
        return f"{arm!r} is read at step {read.step} of {settings.steps}"
    fault = _rule_fault(read, settings.frontier or ())
    return f"{read.rule} cannot be read at mean_loops {read.mean_loops}: {fault}" if fault else None


def _rule_fault(read: Reading, budgets: Sequence[float]) -> str | None:
    """Why a rule cannot be read so: it is scored at the budgets of `frontier` alone, at the end, over all levels."""
    if read.rule is None:
        return "no rule is named" if read.mean_loops is not None or read.measure == "mean_loops" else None
    if not budgets:
        return "the settings have no frontier"
    if (read.mean_loops is None) != (read.rule in ORACLES):
        return "an oracle has no budget" if read.rule in ORACLES else "mean_loops is missing"
    if read.mean_loops is not None and read.mean_loops not in budgets:
        return f"frontier has {list(budgets)}"
    if read.mean_loops is not None and read.mean_loops < 2 and read.rule in COMPARING:
        return "no such rule stops before loop 2"
    if (read.loop, read.difficulty, read.step) != ("last", None, None) or read.measure in OF_LOOPS:
        return "rules are read at the end, over all levels, by score, loss or mean_loops"
    return None


def value_of(rows: Iterable[Mapping[str, Any]], reading: Reading, side: Side | None = None) -> float:
    """A number of a run from its rows; levels weigh by their items.

    Args:
        rows: all rows of the run.
        reading: the claim's.
        side: what differs from it.

    Returns: not a number where the run diverged before anything was scored there, or to a loss that is none.

    Raises:
        ValueError: nothing was scored at that loop, level, step or budget.
    """
    read, rows = reading if side is None else reading_of(reading, side), list(rows)
    steps = sorted({row["step"] for row in rows})
    step = steps[-1] if read.step is None else next((step for step in steps if step >= read.step), None)
    loop = rows[0]["loops"] if read.loop == "last" else read.loop
    if read.rule is None:
        asked = {"loop": loop, "step": step, "difficulty": read.difficulty, "rule": None}
    else:
        asked = {"rule": read.rule, "step": step, "over": read.over, "mean_loops": read.mean_loops}
    optional = ("difficulty", "mean_loops")  # any where they are not given
    chosen = [
        row
        for row in rows
        if all(row[name] == value or (value is None and name in optional) for name, value in asked.items())
        and row[read.measure] is not None
    ]
    if not chosen and rows[0]["diverged"]:
        return math.nan
    if not chosen:
        raise ValueError(f"no {read.measure} at " + ", ".join(f"{name} {value}" for name, value in asked.items()))
    items = sum(row["items"] for row in chosen)
    return sum(row[read.measure] * row["items"] for row in chosen) / items

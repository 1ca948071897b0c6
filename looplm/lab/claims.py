"""Claims, written down before they are tested: arms, measure, contrasts, margins and seeds (claims.yaml).

The rules of evidence that a claim cannot get round, checked when the file is read:

- Arms are paired: task, items, batch and seeds belong to the claim, not to an arm. Beyond layers, loops, steps and the
  two widths an arm may change only what the claim names under `varies`; the loss is the same for all arms otherwise.
- `matched` makes the arms that a looped model k⊗L has to be compared with (`looplm.lab.settings.matched`).
- Learning rates are swept for every arm alike, on validation items and on a seed that is not reported.
- A null claim (`kind: equal`) needs a margin above 0; a claim of a difference states the margin it must exceed.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from looplm.lab.readings import Reading, Side, reading_of, unreadable, value_of
from looplm.lab.settings import RunSettings, Seed, matched
from looplm.lab.statistics import MOST
from looplm.settings import NotNegative, Positive, Section

FILE = Path(__file__).with_name("claims.yaml")
SHAPE = {"layers", "loops", "width", "feed_forward", "steps"}
PAIRED = set("task scale task_settings batch seed split evaluations evaluation_items learning_rate".split())
FEWEST, QUICK_SEEDS = 5, 3

LOWER_IS_BETTER = ("loss", "mean_loops")
Arms = dict[tuple[str, str], RunSettings]
"""Settings by arm and condition; learning rate and seed are still to be put in."""


class Contrast(Section):
    """Left minus right, paired by seed: above a margin, or within it."""

    left: Side
    right: Side
    kind: Literal["greater", "equal"] = "greater"
    margin: NotNegative
    """`greater`: what the difference must exceed. `equal`: how far from 0 it may be; above 0."""

    @model_validator(mode="after")
    def _margin(self) -> "Contrast":
        if self.kind == "equal" and not self.margin > 0:
            raise ValueError("margin is 0; a claim of no difference needs a margin above 0")
        return self

    @property
    def label(self) -> str:
        """In words."""
        sign = ">" if self.kind == "greater" else "="
        return f"{self.left.label} {sign} {self.right.label}"


class Testable(Section):
    """What must be reached for the claim to be testable at all: else a task is too hard here, or too easy to tell."""

    arm: str
    condition: str = ""
    at_least: float


class Claim(Section):
    """A claim of a paper, as it is tested."""

    number: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    paper: str
    statement: str
    waiting: str | None = None
    """Why it cannot be run yet; such a claim has no arms."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of a run, the same for all arms."""
    matched: bool = False
    """Make the arms from the settings, which loop."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further arms: what each changes."""
    varies: list[str] = Field(default_factory=list)
    """Settings besides the shape and the steps that arms may change, where the claim is about them."""
    conditions: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"": {}}  # noqa: RUF012 - frozen
    """Settings of the task that all arms are run under, by name."""
    learning_rates: list[Positive] = Field(default_factory=list)
    """Swept for each arm under the first condition; a single one is not swept."""
    sweep_seed: Seed = 0
    seeds: Annotated[list[Seed], Field(max_length=MOST)] = Field(default_factory=list)
    reading: Reading = Reading()
    contrasts: list[Contrast] = Field(default_factory=list)
    testable: Testable | None = None
    quick: bool = False
    """Part of the reduced ledger, by its contrasts under the first condition."""

    @model_validator(mode="after")
    def _evidence(self) -> "Claim":
        if self.waiting is not None:
            return self
        if not (self.contrasts and self.learning_rates and len(self.seeds) >= FEWEST):
            raise ValueError(f"claim {self.name} needs contrasts, learning_rates and at least {FEWEST} seeds")
        if len({self.sweep_seed, *self.seeds}) <= len(self.seeds):
            raise ValueError(f"claim {self.name}: seeds must differ, from sweep_seed {self.sweep_seed} as well")
        unfair = sorted(set(self.varies) & PAIRED)
        if unfair:
            raise ValueError(f"claim {self.name}: varies names {unfair[0]}, by which arms are paired")
        for arm, changes in self.arms.items():
            other = sorted(set(changes) - SHAPE - set(self.varies))
            if other:
                raise ValueError(f"claim {self.name}: arm {arm!r} changes {other[0]}, which is not under varies")
        known = self.runs()
        if self.quick and not self.shortened().contrasts:
            raise ValueError(f"claim {self.name}: quick needs a contrast under the first condition")
        self._check_sides(known)
        self._check_readings(known)
        return self

    def _check_sides(self, known: Arms) -> None:
        named = [(side.arm, side.condition) for side in self.sides()]
        if self.testable is not None:
            named.append((self.testable.arm, self.testable.condition))
        for arm, condition in named:
            if (arm, condition) not in known:
                names = ", ".join(" under ".join(filter(None, key)) for key in known)
                raise ValueError(f"claim {self.name}: no arm {arm!r} under condition {condition!r}; there are {names}")

    def _check_readings(self, known: Arms) -> None:
        """What is read must be scored, by the sweep as well."""
        for side in self.sides():
            fault = unreadable(reading_of(self.reading, side), side.arm, known[side.arm, side.condition])
            if fault:
                raise ValueError(f"claim {self.name}: {fault}")
        for arm, swept in self.sweep().items():  # judged as the claim reads
            fault = unreadable(self.of_sweep, arm, swept[0])
            if fault:
                raise ValueError(f"claim {self.name}: the sweep of learning_rates cannot be judged: {fault}")

    @property
    def of_sweep(self) -> Reading:
        """What the sweep is judged by: the claim's reading, at the end."""
        return self.reading.model_copy(update={"step": None})

    def sides(self) -> list[Side]:
        """The left and the right of every contrast."""
        return [side for contrast in self.contrasts for side in (contrast.left, contrast.right)]

    def uncontrasted(self) -> list[Side]:
        """Arms, by condition, that no contrast names, where they can be read as the claim reads."""
        named = {(side.arm, side.condition) for side in self.sides()}
        return [
            Side(arm=arm, condition=condition)
            for (arm, condition), settings in self.runs().items()
            if (arm, condition) not in named and not unreadable(self.reading, arm, settings)
        ]

    def runs(self) -> Arms:
        """The settings of every arm under every condition. Raises ValueError for settings that cannot be."""
        where = f"claim {self.name}"
        found: Arms = {}
        for condition, of_task in self.conditions.items():
            base = RunSettings.validated(self.settings, where).changed(task_settings=of_task)
            arms = matched(base) if self.matched else {}
            arms |= {arm: base.changed(**changes) for arm, changes in self.arms.items()}
            found |= {(arm, condition): settings for arm, settings in arms.items()}
        return found

    def sweep(self) -> dict[str, list[RunSettings]]:
        """The runs that choose each arm's learning rate; none where there is only one rate."""
        if len(self.learning_rates) == 1:
            return {}
        first = next(iter(self.conditions))
        return {
            arm: [
                settings.changed(learning_rate=rate, seed=self.sweep_seed, split="validation", evaluations=1)
                for rate in self.learning_rates
            ]
            for (arm, condition), settings in self.runs().items()
            if condition == first
        }

    def reported(self, rates: Mapping[str, float]) -> dict[tuple[str, str], list[RunSettings]]:
        """The runs that count, in the order of the seeds, at each arm's learning rate."""
        return {
            key: [settings.changed(learning_rate=rates[key[0]], seed=seed) for seed in self.seeds]
            for key, settings in self.runs().items()
        }

    def shortened(self) -> "Claim":
        """For the reduced ledger: the first condition and seeds, and the middle one of the learning rates unswept."""
        first, rates = next(iter(self.conditions)), sorted(self.learning_rates)
        changes = {
            "conditions": {first: self.conditions[first]},
            "contrasts": [c for c in self.contrasts if c.left.condition == c.right.condition == first],
            "testable": self.testable if self.testable and self.testable.condition == first else None,
            "seeds": self.seeds[:QUICK_SEEDS],
            "learning_rates": [rates[len(rates) // 2]],
        }
        return self.model_copy(update=changes)


class _File(Section):
    claims: Annotated[list[Claim], Field(min_length=1)]

    @model_validator(mode="after")
    def _names(self) -> "_File":
        names = [claim.name for claim in self.claims]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two claims are called {twice!r}")
        return self


def load_claims(path: Path = FILE) -> list[Claim]:
    """Read a file of claims.

    Raises:
        ValueError: no such file, not YAML, or a claim that breaks a rule.
    """
    if not path.is_file():
        raise ValueError(f"no such file of claims: {path}")
    try:
        return _File.validated(entries(path.read_text(encoding="utf-8")), path.name).claims
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def entries(text: str) -> Any:
    """The YAML of a file of claims as plain values."""
    return yaml.safe_load(text)


def best_rates(claim: Claim, runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, float] | None:
    """The learning rate of each arm: the best of the sweep by the claim's reading, the lower one where two are equal.

    Args:
        runs: rows by the key of their run; one that diverged to no number is the worst.

    Returns: None while a run of the sweep is missing.
    """
    if len(claim.learning_rates) == 1:
        return {arm: claim.learning_rates[0] for arm, _ in claim.runs()}
    rates = {}
    lower_is_better = claim.reading.measure in LOWER_IS_BETTER
    for arm, swept in claim.sweep().items():
        if any(settings.key not in runs for settings in swept):
            return None
        found = [(value_of(runs[settings.key], claim.of_sweep), settings.learning_rate) for settings in swept]
        costs = [(value if lower_is_better else -value, rate) for value, rate in found]
        rates[arm] = min(costs, key=lambda pair: (math.isnan(pair[0]), *pair))[1]
    return rates


def missing_runs(claim: Claim, runs: Mapping[str, Any]) -> Iterator[RunSettings]:
    """What is to be run next: the sweep, and once it is there the runs that count."""
    if claim.waiting is not None:
        return
    rates = best_rates(claim, dict(runs))
    if rates is None:
        wanted = [settings for swept in claim.sweep().values() for settings in swept]
    else:
        wanted = [settings for seeds in claim.reported(rates).values() for settings in seeds]
    yield from (settings for settings in wanted if settings.key not in runs)

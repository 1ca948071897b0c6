"""What one run of the lab is: a task, a shape written k⊗L (k layers looped L times), a budget and a seed.

A run's settings are all it depends on; `key` is their digest, and runs with the same key are the same run. Defaults are
those of a laptop: minutes on one core (the paper's optimiser settings of B.2 where they fit). Training itself is a
`Stage` of `looplm.training` over the task's batches, so schedules, losses and FLOPs are the package's own.

A grid is settings and lists of values to put in place of them, in YAML:

    settings: {task: p-hop, steps: 800}
    vary: {layers: [1, 2], loops: [1, 4]}
    seeds: 5
"""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from looplm.lab.tasks import Task, make_task
from looplm.objectives.settings import LoopCountSettings
from looplm.settings import NotNegative, Positive, Section
from looplm.training.planning import forward_flops, new_config
from looplm.training.recipe import ModelSettings, Stage

HEAD = 32
"""Width of an attention head: two of 32 ran nearly twice as fast on a CPU as four of 16."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rule = Literal[
    "static depth",
    "Stage I gate",
    "Stage II published",
    "Stage II lookahead",
    "max probability",
    "entropy",
    "KL divergence",
    "state difference",
    "agreement oracle",
    "hindsight oracle",
]
"""How positions stop where exit rules are scored (`looplm.lab.frontier`)."""
COMPARING = ("KL divergence", "state difference")
"""Rules that compare a loop with the one before, so that none stops before loop 2."""
ORACLES = ("agreement oracle", "hindsight oracle")
"""They have no threshold, and so no budget."""
YOUNGER = ("frontier", "curriculum_score")
"""Settings that the first results were made without."""
Over = Literal["graded", "all"]
"""The positions whose loops are counted: those graded, or all up to the last target of their row."""


class RunSettings(Section):
    """Settings of a run."""

    task: str
    """A task of `looplm lab list`."""
    scale: Literal["laptop", "paper"] = "laptop"
    """Of the task; the shape of the model and the budget are given here."""
    task_settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the task in place of those of its scale."""
    layers: PositiveInt = 1
    """k"""
    loops: PositiveInt = 1
    """L, loops in training."""
    width: Annotated[int, Field(ge=HEAD, multiple_of=16)] = 64
    """D, with a head for every whole 32."""
    feed_forward: PositiveInt | None = None
    """Width of the MLP; twice the model's by default."""
    tied: bool = False
    """One matrix for embedding and head."""
    embedding_std: Positive = 1.0
    """Of the first embeddings."""
    post_norm_gain: Positive = 0.2
    """First gain of the norms after attention and MLP."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = -1.1
    """The gate's first bias."""
    steps: PositiveInt = 1000
    batch: PositiveInt = 64
    """B, items an optimizer step."""
    learning_rate: Positive = 3e-3
    """At its peak, after a twentieth of the steps; it falls to a twentieth along half a cosine."""
    weight_decay: NotNegative = 0.05
    objective: Literal["expected", "last", "mean"] = "last"
    """Stage I (equation 4), or the loss of the last loop alone, or the mean over the loops."""
    exit_beta: NotNegative = 0.05
    """beta of equation 4."""
    exit_beta_start: NotNegative | None = None
    """beta for the first three fifths of the steps, where it is another."""
    exit_prior: Literal["uniform"] | Annotated[float, Field(gt=0, lt=1)] = "uniform"
    loop_counts: LoopCountSettings | None = None
    """Draw the loops of each step instead of always running L."""
    curriculum: PositiveInt | None = None
    """Begin with the easiest level, and let in the next one after each so many steps."""
    curriculum_score: Annotated[float, Field(gt=0, le=1)] | None = None
    """Let it in only where this share of validation answers of the hardest level so far is right; else look again after
    as many steps."""
    evaluations: PositiveInt = 8
    """Points of the learning curve, the end included."""
    evaluation_loops: PositiveInt | None = None
    """Loops to score; those trained by default, more to look beyond."""
    evaluation_items: PositiveInt = 1024
    """Items of an evaluation, at least."""
    split: Literal["test", "validation"] = "test"
    """What is scored."""
    frontier: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """Fit both gates of Stage II at the end, and score exit rules at these mean loops."""
    seed: Seed = 0
    """Of the first weights, the order of the data, and the facts of a task that has some."""

    @model_validator(mode="after")
    def _fits(self) -> "RunSettings":
        if self.loop_counts is not None and self.loop_counts.most > self.loops:
            raise ValueError(f"loop_counts.most is {self.loop_counts.most}, more than the {self.loops} loops")
        if self.curriculum_score is not None and self.curriculum is None:
            raise ValueError(f"curriculum_score is {self.curriculum_score}, but curriculum, the steps, is missing")
        if self.frontier is not None and (self.objective != "expected" or self.loops < 2):
            what = f"objective {self.objective!r} at {self.loops} loops"
            raise ValueError(f"frontier compares gates, but {what} trains none; use 'expected' and 2 loops or more")
        if self.frontier is not None and not all(1 <= budget <= self.loops for budget in self.frontier):
            raise ValueError(f"frontier is {list(self.frontier)}; mean loops must lie in 1..{self.loops}")
        return self

    @property
    def shape(self) -> str:
        """k⊗L, and the width where it is not the usual one."""
        return f"{self.layers}⊗{self.loops}" + (f" width {self.width}" if self.width != 64 else "")

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that stand for all settings."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def canonical(self) -> str:
        """The settings as JSON, the same for the same settings."""
        return json.dumps(self.plain(), sort_keys=True)

    def plain(self) -> dict[str, Any]:
        """The settings as plain values. Those younger than the first results are left out where unset, as there."""
        unset = {name for name in YOUNGER if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=unset)

    def make_task(self) -> Task:
        """The task. Raises ValueError for an unknown one or settings that cannot be."""
        return make_task(self.task, self.scale, **self.task_settings)

    def model(self, task: Task) -> ModelSettings:
        """The shape of the model."""
        return ModelSettings(
            vocab_size=len(task.vocabulary),
            hidden_size=self.width,
            intermediate_size=self.feed_forward or 2 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // HEAD,
            total_ut_steps=self.loops,
            tie_word_embeddings=self.tied,
            max_position_embeddings=task.length,
            initializer_range=1 / math.sqrt(self.width),
            post_norm_gain=self.post_norm_gain,
            gate_bias=self.gate_bias,
        )

    def stage(self, task: Task) -> Stage:
        """How it is trained: AdamW (0.9, 0.98) and clipping at 1.0 as in B.2; fp32, which is faster at this size."""
        return Stage(
            name=self.task,
            steps=self.steps,
            sequence_length=task.length,
            batch_tokens=self.batch * task.length,
            micro_batch_size=self.batch,
            learning_rate=self.learning_rate,
            final_learning_rate=self.learning_rate / 20,
            warmup_steps=max(self.steps // 20, 1),
            decay="cosine",
            betas=(0.9, 0.98),
            weight_decay=self.weight_decay,
            objective=self.objective,
            exit_beta=self.exit_beta,
            exit_beta_start=self.exit_beta_start,
            exit_prior=self.exit_prior,
            loop_counts=self.loop_counts,
            autocast="none",
        )

    def changed(self, **changes: Any) -> "RunSettings":
        """With some settings in place of others, checked. `task_settings` are added to those there are."""
        values = {**self.model_dump(), **changes}
        values["task_settings"] = {**self.task_settings, **changes.get("task_settings", {})}
        return RunSettings.validated(values, self.task)


def flops(settings: RunSettings, loops: int | None = None) -> float:
    """Of the forward pass of a token (see `looplm.training.planning`), with another number of loops where given."""
    task = settings.make_task()
    config = new_config(settings.model(task), len(task.vocabulary))
    config.total_ut_steps = loops or settings.loops
    return forward_flops(config, settings.stage(task))


def matched(looped: RunSettings) -> dict[str, RunSettings]:
    """A looped model k⊗L and what it has to be compared with, by name.

    k⊗1 at the same steps, k⊗1 at L times the steps (equal parameters and FLOPs), kL⊗1 (equal FLOPs), and a wider k⊗1
    of equal FLOPs: its width is the multiple of 32 next to D sqrt(L), its MLP makes up the difference.

    Raises:
        ValueError: the model does not loop.
    """
    layers, loops = looped.layers, looped.loops
    if loops < 2:
        raise ValueError(f"loops is {loops}; matched arms are those of a looped model, from 2 loops on")
    plain = looped.changed(loops=1, loop_counts=None, evaluation_loops=None, frontier=None)
    return {
        f"{layers}⊗{loops}": looped,
        f"{layers}⊗1": plain,
        f"{layers}⊗1 long": plain.changed(steps=looped.steps * loops),
        f"{layers * loops}⊗1": plain.changed(layers=layers * loops),
        f"{layers}⊗1 wide": _widened(plain, flops(looped)),
    }


def _widened(plain: RunSettings, target: float) -> RunSettings:
    """A wider model with so many FLOPs a token: they grow linearly with the width of the MLP."""
    ratio = target / flops(plain)
    width = max(round(plain.width * math.sqrt(ratio) / HEAD), 1) * HEAD
    narrow, wide = (plain.changed(width=width, feed_forward=size) for size in (1, 2))
    missing = (target - flops(narrow)) / (flops(wide) - flops(narrow))
    return plain.changed(width=width, feed_forward=max(1 + round(missing), 1))


class Grid(Section):
    """Many runs: every combination of some settings, each with every seed."""

    settings: RunSettings
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values by the name of a setting."""
    seeds: PositiveInt = 5
    """Seeds 1 to this number."""

    @model_validator(mode="after")
    def _known(self) -> "Grid":
        for name in self.vary:
            if name not in RunSettings.model_fields or name == "seed":
                raise ValueError(f"vary names {name!r}; choose settings of a run other than seed")
        return self

    def arms(self) -> dict[str, RunSettings]:
        """Settings by what is particular about them. Raises ValueError for a combination that cannot be."""
        found = {}
        for values in itertools.product(*self.vary.values()):
            changes = dict(zip(self.vary, values, strict=True))
            name = ", ".join(f"{name} {value}" for name, value in changes.items())
            settings = self.settings.changed(**changes)
            found[name or settings.shape] = settings
        return found


def load_grid(path: Path) -> Grid:
    """Read a grid.

    Raises:
        ValueError: no such file, not YAML, or a fault in it.
    """
    if not path.is_file():
        raise ValueError(f"no such grid: {path}")
    try:
        return Grid.validated(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None

"""Recipes of reinforcement learning with verifiable rewards (Ouro section 4.5): a YAML file, checked strictly.

The paper names GRPO and DAPO and gives no settings for them. Defaults of the two are those of their papers
(arXiv 2402.03300; arXiv 2503.14476); what decides the depth is `mode`. Reading a recipe loads no torch.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from looplm.settings import NotNegative, Positive, Section
from looplm.tuning.problems import EnvironmentSettings, RewardSettings
from looplm.tuning.recipe import LoraSettings, TuningCheckpoints

Mode = Literal["fixed", "adaptive", "sampled", "per-loop", "paper-off-policy"]

_DAPO = {"clip_high": 0.28, "token_level": True, "dynamic_sampling": True}
_GRPO = {"clip_high": 0.2, "token_level": False, "dynamic_sampling": False}


class DepthSettings(Section):
    """What decides how deep tokens go, and what the learner does with it."""

    mode: Mode = "fixed"
    """`fixed`: all loops, in rollout and learner (the paper's second strategy). `adaptive`: the exit rule decides and
    the learner replays what it decided; the gate gets no gradient. `sampled`: exits are drawn from the gate and are
    part of the policy. `per-loop`: full depth, and every loop's log-probability is credited (RLTT, without ratios).
    `paper-off-policy`: full depth, the first loop over the threshold supplies the token, and the losses up to it are
    added up (the paper's first strategy; a baseline)."""
    loops: PositiveInt | None = None
    """Full depth; the trained one by default."""
    min_loops: PositiveInt = 1
    """No exit before it."""
    exit_threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """q of `adaptive` and `paper-off-policy`."""
    cost: NotNegative = 0.0
    """Of a loop, taken from the advantage of `sampled` exits; in units of the normalised outcome."""
    ratio: Literal["joint", "separate"] = "joint"
    """Of `sampled`: one ratio for token and exit, or one each, clipped by itself."""
    gate_entropy: NotNegative = 0.0
    """Bonus of the gate's entropy, of `sampled`."""
    exit_gradients: Literal["all", "gate"] = "all"
    """Of `sampled`: whether gradients of exits go on into the trunk, or end in the gate."""
    credit: Literal["uniform", "progressive", "exit"] = "uniform"
    """Of `per-loop`, what loop t counts for: 1 / T, in proportion to t, or as the (detached) exit distribution says."""

    @model_validator(mode="after")
    def _consistent(self) -> "DepthSettings":
        ruled = self.mode in ("adaptive", "paper-off-policy")
        if ruled and self.exit_threshold is None:
            raise ValueError(f"exit_threshold is missing, which mode {self.mode!r} needs; give a number in (0, 1]")
        if not ruled and self.exit_threshold is not None:
            raise ValueError(f"exit_threshold goes with adaptive and paper-off-policy; drop it in mode {self.mode!r}")
        defaults = DepthSettings.model_fields
        for name, modes in _ONLY.items():
            if self.mode not in modes and getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name} goes with mode {' or '.join(modes)}; drop it in mode {self.mode!r}")
        if self.loops is not None and self.min_loops > self.loops:
            raise ValueError(f"min_loops is {self.min_loops}; it must be at most loops = {self.loops}")
        return self


_ONLY = {
    "min_loops": ("adaptive", "sampled"),
    "cost": ("sampled",),
    "ratio": ("sampled",),
    "gate_entropy": ("sampled",),
    "exit_gradients": ("sampled",),
    "credit": ("per-loop",),
}


class HeldOutSettings(Section):
    """How the model is measured on problems that it was not trained on, before and after."""

    problems: PositiveInt = 256
    """At most."""
    loops: tuple[PositiveInt, ...] = ()
    """Fixed depths that are measured too, beside the mode's own."""
    every_steps: PositiveInt | None = None
    """Also on the way, with the mode's own depths."""


class GRPORecipe(Section):
    """A whole run."""

    model: Annotated[str, Field(min_length=1)]
    """A folder or hub name of a looped model; its tokenizer and chat template come with it."""
    output: Annotated[str, Field(min_length=1)]
    """Folder for the model, the adapter, checkpoints, metrics.jsonl, recipe.yaml and report.json."""
    environment: EnvironmentSettings
    rewards: Annotated[tuple[RewardSettings, ...], Field(min_length=1)]
    """Added up by their weights; one of them is the outcome."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    depth: DepthSettings = DepthSettings()
    algorithm: Literal["grpo", "dapo"] = "grpo"
    """Sets what of the next four is not given."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive | None = None
    """grpo 0.2, dapo 0.28."""
    token_level: bool | None = None
    """Whether all tokens of a step count alike (dapo), or all samples do (grpo)."""
    dynamic_sampling: bool | None = None
    """Draw other prompts for groups whose outcomes are all the same (dapo), `redraws` times."""
    redraws: PositiveInt = 3
    overlong_buffer: Annotated[int, Field(ge=0)] = 0
    """The last so many tokens before `max_new_tokens` cost up to 1; 0: none (dapo's paper: 4096 of 20480)."""
    kl: NotNegative = 0.0
    """Weight of the KL to the model that the run began with, on the recorded depths."""
    steps: PositiveInt = 100
    """Rollouts, each learnt from `epochs` times in `updates` optimizer steps."""
    prompts: PositiveInt = 16
    """Groups of a rollout."""
    samples: Annotated[int, Field(ge=2)] = 8
    """G, samples of a prompt."""
    updates: PositiveInt = 1
    epochs: PositiveInt = 1
    micro_batch_size: PositiveInt = 16
    """Samples in one pass of the learner; memory follows it, results do not."""
    max_new_tokens: PositiveInt = 256
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Of the rollout, and so of the policy; top-p is 1 and top-k off, as the log-probabilities need it."""
    learning_rate: Positive = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which it rises to its peak."""
    decay: Literal["cosine", "linear", "none"] = "none"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    """Largest gradient norm."""
    lora: LoraSettings | None = None
    held_out: HeldOutSettings = HeldOutSettings()
    gradient_checkpointing: bool = False
    kv_gigabytes: Positive = 2.0
    """Keys and values of the rollout, at most, in GiB."""
    checkpoints: TuningCheckpoints = TuningCheckpoints(every_steps=20)
    """`every_steps` counts rollouts."""

    @model_validator(mode="after")
    def _consistent(self) -> "GRPORecipe":
        for name, value in (_DAPO if self.algorithm == "dapo" else _GRPO).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        rows = self.prompts * self.samples
        if rows % (self.micro_batch_size * self.updates):
            raise ValueError(
                f"prompts x samples is {rows}; it must be a multiple of micro_batch_size x updates = "
                f"{self.micro_batch_size} x {self.updates}"
            )
        if self.overlong_buffer >= self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer is {self.overlong_buffer}; it must be below max_new_tokens = {self.max_new_tokens}"
            )
        if self.depth.mode in ("per-loop", "paper-off-policy"):
            if self.updates * self.epochs > 1:
                raise ValueError(f"mode {self.depth.mode!r} has no ratios: updates and epochs must be 1")
            if self.kl:
                raise ValueError(f"kl is {self.kl}; mode {self.depth.mode!r} has no single log-probability for it")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, which reads back as itself."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=False), sort_keys=False, allow_unicode=True)


def load_grpo_recipe(path: str | Path) -> GRPORecipe:
    """Read and check a recipe file.

    Raises:
        ValueError: no such file, not YAML, or a fault in it.
    """
    return GRPORecipe.read(path, example="grpo-cpu.yaml")

"""What reinforcement learning asks a model: settings of environments and rewards, and one problem. Loads no torch.

The paper tried reinforcement learning on DAPO-17K (Ouro section 4.4) and left its settings out; these are ours.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from looplm.data.settings import HUB_PREFIX, LocationSettings
from looplm.settings import Positive, Section

Prompt = str | list[dict[str, str]] | list[int]
"""Text as it is, a conversation for the chat template, or token ids."""


@dataclass(frozen=True)
class Problem:
    """A prompt and what its answer is judged by.

    Attributes:
        prompt: text, a conversation (messages with `role` and `content`) or token ids.
        answer: the right answer as text.
        entry: what the environment's own scorer needs: reasoning-gym's entry, the record of a source.
        answer_tokens: the right answer as token ids, in environments of tokens.
    """

    prompt: Prompt
    answer: str
    entry: dict[str, Any] = field(default_factory=dict)
    answer_tokens: list[int] | None = None


Score = Callable[[Problem, str, Sequence[int]], float]
"""The reward of a completion: the problem, the text without special tokens, its token ids."""


class ProblemSource(LocationSettings):
    """Prompts and answers in records: files, folders, installed packages or a hub data set."""

    prompt_field: str = "prompt"
    """The field with the question: text, or a list of messages; dots reach into nested fields."""
    answer_field: str | None = None
    """The field with the answer, e.g. `reward_model.ground_truth`; not needed where conversations end with it."""


class EnvironmentSettings(Section):
    """Where problems come from: exactly one of `reasoning_gym`, `source` and `lab`."""

    reasoning_gym: str | None = None
    """A family of reasoning-gym, e.g. `chain_sum`."""
    source: ProblemSource | None = None
    """Records with a prompt and a verifiable answer."""
    lab: str | None = None
    """A task of the lab, e.g. `mano`: prompts and answers are token ids."""
    options: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Of the family or the task."""
    size: PositiveInt = 2000
    """Problems to be made, held-out ones among them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the problems that are made."""
    held_out_every: Annotated[int, Field(ge=2)] = 10
    """One problem in so many is held out, chosen by its text."""
    system: str | None = None
    """A system message before every question."""
    suffix: str | None = None
    """A line after every question, e.g. "Answer with a number."."""
    raw: bool = False
    """Give the text as it is; by default it is the user's message in the model's chat template."""

    @model_validator(mode="after")
    def _consistent(self) -> "EnvironmentSettings":
        kinds = [name for name in ("reasoning_gym", "source", "lab") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of reasoning_gym, source and lab; there are {' and '.join(kinds) or 'none'}"
            )
        foreign = {"source": ("options", "size", "seed"), "lab": ("system", "suffix", "raw")}.get(kinds[0], ())
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} does not belong to {kinds[0]}; drop it")
        if self.raw and self.system is not None:
            raise ValueError("raw text has no system message; drop system, or write it into suffix")
        return self

    @property
    def name(self) -> str:
        """What a report calls the environment."""
        if self.source is not None:
            name = self.source.location.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
            return name.removesuffix(".jsonl").removesuffix(".parquet")
        return self.reasoning_gym or f"lab-{self.lab}"


class RewardSettings(Section):
    """One reward, from 0 to 1 by custom: exactly one of `scorer`, `python` and `format`."""

    scorer: Literal["environment", "math-verify"] | None = None
    """The environment's own score, or whether math-verify finds the answer equal to the right one."""
    python: Annotated[str, Field(pattern=r"^.+\.py:[^:]+$")] | None = None
    """A function of a file, `path/to/file.py:function`, called with prompt, completion (text, or the token ids in an
    environment of tokens), answer and entry by name. It runs in processes that share nothing."""
    format: str | None = None
    """A regular expression: 1 where the whole completion matches (`.` matches new lines too)."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """In the sum of rewards; 0 for one that is only watched."""
    outcome: bool = False
    """Whether this is the outcome: what dynamic sampling and reports look at; the first reward by default."""
    seconds: Positive = 5.0
    """Time for one sample."""

    @model_validator(mode="after")
    def _consistent(self) -> "RewardSettings":
        kinds = [name for name in ("scorer", "python", "format") if getattr(self, name) is not None]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of scorer, python and format; there are {' and '.join(kinds) or 'none'}"
            )
        if self.format is not None:
            try:
                re.compile(self.format)
            except re.error as error:
                raise ValueError(f"format {self.format!r} is no regular expression: {error}") from None
        return self

    @property
    def name(self) -> str:
        """The scorer's name, the function's, or `format`."""
        return self.scorer or (self.python.rpartition(":")[2] if self.python is not None else "format")


@dataclass(frozen=True)
class Scores:
    """The rewards of samples, in their order.

    Attributes:
        totals: the weighted sum of the rewards; NaN where one of them could not be had.
        outcomes: the reward that is the outcome; NaN likewise.
        parts: every reward by its name, unweighted.
        faults: what went wrong, a sentence for each sample and reward; those samples are NaN.
        unparseable: answers that math-verify or a family could not read, or not to an end in time; they score 0.
    """

    totals: list[float]
    outcomes: list[float]
    parts: dict[str, list[float]]
    faults: list[str]
    unparseable: int

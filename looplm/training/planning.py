"""What a recipe amounts to before anything runs: every stage resolved, counted and checked against the one before.

`plan` builds the model's shape on the meta device (no weights) and reads no data, so the paper's recipes are planned
in seconds. It refuses stages that cannot follow each other; training begins with the same checks.

FLOPs count a multiply-add as two, a training token as three forward passes (one forward, two backward), without the
recomputation of checkpointed loops:

    forward = 2 (P_once + T P_loop + T_head V D) + 4 A (S + 1) / 2
    P_loop  = matrix parameters of the looped layers (of prelude and coda: P_once, where a coda runs T_head times)
    A       = attention width H D_h, summed over layer passes: (L T + prelude + coda T_head) H D_h
    T_head  = T for the Stage I objective, which reads every loop, else 1

(6 N a token for an unlooped model with N matrix parameters, and the attention term: query-key and attention-value
products over (S + 1) / 2 keys on average.) The gate, norms and embedding look-up are left out. Fitting the gate costs
one forward pass a token; its own epochs over D + 1 parameters are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_config
from looplm.model.modeling import OuroForCausalLM
from looplm.model.upcycling import layer_origins
from looplm.training.recipe import ModelSettings, Recipe, Stage
from looplm.training.schedule import BatchPlan
from looplm.training.tracking import short


@dataclass(frozen=True)
class PlannedStage:
    """A stage with everything it leaves open filled in.

    Attributes:
        number: counted from 1.
        settings: the recipe's section.
        layers, loops, rope_theta: of the model during the stage.
        view: counts the changes of mixture, sequence length or packing up to here. Stages of the same view share one
            order of samples; the later one goes on where the earlier stopped.
        parameters, trained: numbers of parameters in all, and of those that change.
        steps, tokens: optimizer steps and tokens; None where minutes decide. Of a gate stage, tokens it reads.
        flops: of the whole stage (see the module); None where tokens are.
    """

    number: int
    settings: Stage
    layers: int
    loops: int
    rope_theta: float
    view: int
    parameters: int
    trained: int
    steps: int | None
    tokens: int | None
    flops: float | None

    @property
    def name(self) -> str:
        """As on screen: `stage 2 anneal`."""
        return f"stage {self.number} {self.settings.name}"

    @property
    def folder(self) -> str:
        """The name of the model folder that the stage leaves."""
        return f"stage-{self.number}-{self.settings.name}"

    @property
    def batches(self) -> BatchPlan:
        """Which samples each step takes."""
        return BatchPlan.of(self.settings)


def plan(recipe: Recipe, config: OuroConfig) -> list[PlannedStage]:
    """Resolve the stages of a recipe for a model that begins as `config`.

    Raises:
        ValueError: a stage that cannot be, or cannot follow the one before it; names the stage and the setting.
    """
    stages: list[PlannedStage] = []
    layers, loops, theta = config.num_hidden_layers, config.total_ut_steps, config.rope_theta
    for stage in recipe.stages:
        where = f"stages: {stage.name}"
        if stage.upcycle is not None:
            layers = _grown(stage, layers, where)
        loops, theta = stage.loops or loops, stage.rope_theta or theta
        _check_depth(stage, layers, loops, where)
        _check_sizes(stage, config.max_position_embeddings, where)
        _check_sources(recipe, stage, where)
        stages.append(_planned(stage, stages, _shape(config, layers, loops), theta, where))
    _check_unused(recipe)
    return stages


def _planned(stage: Stage, before: Sequence[PlannedStage], shape: OuroConfig, theta: float, where: str) -> PlannedStage:
    """A checked stage over a model of this shape, counted."""
    parameters = count_parameters(shape)
    steps, tokens = _budget(stage, where)
    passes = 1 if stage.gate is not None else 3
    return PlannedStage(
        number=len(before) + 1,
        settings=stage,
        layers=shape.num_hidden_layers,
        loops=shape.total_ut_steps,
        rope_theta=theta,
        view=_view(before, stage),
        parameters=parameters,
        trained=shape.hidden_size + 1 if stage.gate is not None else parameters,
        steps=steps,
        tokens=tokens,
        flops=None if tokens is None else passes * tokens * forward_flops(shape, stage),
    )


def plan_recipe(recipe: Recipe) -> list[PlannedStage]:
    """The plan from the recipe alone: no weights, no text, and no tokenizer where `model.vocab_size` is given.

    A tokenizer that is yet to be trained counts with the size it asks for.

    Raises:
        ValueError: as `plan`, or a pretrained model or tokenizer that cannot be read.
    """
    settings, tokenizer = recipe.model, recipe.tokenizer
    if settings.pretrained is not None:
        return plan(recipe, load_config(settings.pretrained))
    assert tokenizer is not None
    size = settings.vocab_size or tokenizer.train_bpe
    if size is None:
        from looplm.data.tokenizers import load_tokenizer

        assert tokenizer.pretrained is not None
        size = len(load_tokenizer(tokenizer.pretrained))
    return plan(recipe, new_config(settings, size))


def new_config(settings: ModelSettings, vocab_size: int, **fields: Any) -> OuroConfig:
    """The shape of a new model."""
    ours = {"pretrained", "vocab_size", "gate_bias", "post_norm_gain", "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": settings.rope_theta}
    return OuroConfig(vocab_size=vocab_size, rope_parameters=rope, **settings.model_dump(exclude=ours), **fields)


def _grown(stage: Stage, layers: int, where: str) -> int:
    assert stage.upcycle is not None
    try:
        return len(layer_origins(layers, stage.upcycle.num_hidden_layers, stage.upcycle.arrangement))
    except ValueError as error:
        raise ValueError(f"{where}: upcycle.{error}") from None


def _check_depth(stage: Stage, layers: int, loops: int, where: str) -> None:
    """What depends on layers and loops."""
    if stage.gate is not None and loops < 2:
        raise ValueError(f"{where}: the model has {loops} loop; a gate has something to decide from 2 on")
    if stage.loop_counts is not None and stage.loop_counts.most > loops:
        raise ValueError(f"{where}: loop_counts.most is {stage.loop_counts.most}, more than the {loops} loops")
    block = None if stage.loop_regulariser is None else stage.loop_regulariser.block
    if block is not None and (layers % block or block == layers):
        raise ValueError(f"{where}: loop_regulariser.block is {block}; it must divide the {layers} layers and be fewer")


def _check_sizes(stage: Stage, limit: int, where: str) -> None:
    """Sequence against context, batch against sequence."""
    size, start = stage.sequence_length, stage.batch_tokens_start
    if size > limit:
        raise ValueError(f"{where}: sequence_length is {size}, beyond max_position_embeddings = {limit} of the model")
    if stage.gate is not None:
        return
    for name, batch in (("batch_tokens", stage.batch_tokens), ("batch_tokens_start", start)):
        if batch is not None and batch < size:
            raise ValueError(f"{where}: {name} is {batch}, less than one sequence of {size} tokens (sequence_length)")
        if batch is not None and batch % size:
            near = batch - batch % size
            raise ValueError(f"{where}: {name} is {batch}, no multiple of sequence_length = {size}; {near} would be")
    if start is not None and start > stage.batch_tokens:
        raise ValueError(f"{where}: batch_tokens_start is {start}, above batch_tokens = {stage.batch_tokens}")


def _check_sources(recipe: Recipe, stage: Stage, where: str) -> None:
    missing = [name for name in stage.mixture or {} if name not in recipe.data.sources]
    if missing:
        known = ", ".join(recipe.data.sources)
        raise ValueError(f"{where}: mixture names {missing[0]!r}, which is not in data.sources ({known})")


def _check_unused(recipe: Recipe) -> None:
    used: set[str] = set()
    for stage in recipe.stages:
        used.update(recipe.data.sources if stage.mixture is None else stage.mixture)
    idle = [name for name in recipe.data.sources if name not in used]
    if idle:
        raise ValueError(f"data.sources.{idle[0]} is in no stage's mixture; give it a weight in one or remove it")


def _view(before: Sequence[PlannedStage], stage: Stage) -> int:
    def seen(stage: Stage) -> tuple[object, ...]:
        return stage.mixture, stage.sequence_length, stage.separate_documents

    if not before:
        return 0
    return before[-1].view + (seen(before[-1].settings) != seen(stage))


def _budget(stage: Stage, where: str) -> tuple[int | None, int | None]:
    """Steps and tokens; a budget in tokens is rounded up to whole steps."""
    if stage.gate is not None:
        return None, stage.gate.tokens
    if stage.minutes is not None:
        return None, None
    batches, size = BatchPlan.of(stage), stage.sequence_length
    if stage.tokens is not None and stage.tokens < size * batches.first(1):
        raise ValueError(f"{where}: tokens is {stage.tokens}, less than the first batch of {size * batches.first(1)}")
    steps = stage.steps if stage.tokens is None else batches.steps(-(-stage.tokens // size))
    assert steps is not None
    return steps, size * batches.first(steps)


def _shape(config: OuroConfig, layers: int, loops: int) -> OuroConfig:
    values = config.to_dict()
    values.pop("layer_types", None)
    return OuroConfig.from_dict({**values, "num_hidden_layers": layers, "total_ut_steps": loops})


def count_parameters(config: OuroConfig) -> int:
    """Parameters of a model of this shape, a tied head counted once; no weights are made."""
    with torch.device("meta"):
        return sum(p.numel() for p in OuroForCausalLM(config).parameters())


def forward_flops(config: OuroConfig, stage: Stage) -> float:
    """FLOPs of a forward pass a token (see the module); with drawn loop counts, those of a pass of T loops."""
    reads = 1 if stage.objective == "last" and stage.gate is None else config.total_ut_steps
    return token_flops(config, config.total_ut_steps, reads, (stage.sequence_length + 1) / 2)


def token_flops(config: OuroConfig, loops: float, reads: float, keys: float) -> float:
    """FLOPs of one token in a forward pass (see the module).

    Args:
        loops: passes of the core; reads: vocabulary products, before each of which a coda runs. Means may be broken.
        keys: that each attention sees on average.
    """
    width, attention = config.hidden_size, config.num_attention_heads * (config.head_dim or 0)
    pairs = 2 * (config.num_key_value_heads or 0) * (config.head_dim or 0)
    layer = width * (2 * attention + pairs) + 3 * width * config.intermediate_size
    passes = loops * config.num_hidden_layers + config.num_prelude_layers + reads * config.num_coda_layers
    matrices = passes * layer + reads * config.vocab_size * width
    return 2 * matrices + 4 * passes * attention * keys


def plan_table(stages: Sequence[PlannedStage]) -> Table:
    """Every stage as a column, for `looplm train --dry-run`; values fold where the screen is narrow."""
    table = Table(title="the plan, stage by stage")
    table.add_column("", no_wrap=True)
    for stage in stages:
        table.add_column(stage.settings.name, justify="right", overflow="fold")
    rows = [_facts(stage) for stage in stages]
    for name in rows[0]:
        table.add_row(name, *(facts[name] for facts in rows))
    return table


def _facts(stage: PlannedStage) -> dict[str, str]:
    settings = stage.settings
    facts = {
        "tokens": f"{settings.minutes:g} min" if settings.minutes is not None else _count(stage.tokens),
        "steps": _count(stage.steps),
        "parameters": _count(stage.parameters),
        "trained": _count(stage.trained),
        "FLOPs": "?" if stage.flops is None else f"{stage.flops:.2e}",
        "layers": str(stage.layers),
        "loops": str(stage.loops),
        "sequence": str(settings.sequence_length),
        "RoPE base": f"{stage.rope_theta:g}",
    }
    if settings.gate is not None:
        return {**facts, "batch": "-", "learning rate": f"{settings.gate.learning_rate:g}", "beta": "-"}
    return {
        **facts,
        "batch": _change(settings.batch_tokens_start, settings.batch_tokens, short),
        "learning rate": _change(settings.learning_rate, settings.final_learning_rate, "{:g}".format),
        "beta": _change(settings.exit_beta_start, settings.exit_beta, "{:g}".format),
    }


def _change(start: float | None, end: float | None, form: Callable[[float], str]) -> str:
    """`start > end`, or the one that there is."""
    return " > ".join(form(value) for value in (start, end) if value is not None)


def _count(value: int | None) -> str:
    return "?" if value is None else short(value)

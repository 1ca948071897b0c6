"""A recipe from text to trained folders: data, tokenizer, model, then stage after stage.

`train` is what both `looplm train RECIPE.yaml` and `looplm demo` run. Everything that can be wrong with the input is
checked before the output folder is made. It leaves in the output folder:

    recipe.yaml         the recipe, resolved
    data/               the tokenised text, unless `data.folder` is another place
    metrics.jsonl       every step, evaluation and warning, and the result of every stage
    stage-N-NAME/       what each stage but the last left: a `save_pretrained` folder with the recipe
    model/              the newest model, saved at every evaluation; in the end what the last stage left
    checkpoints/        the state of the run, from which it goes on (`looplm.training.resume`)

Between stages the optimizer's state goes on with the parameters: a new stage is a new schedule, not a new optimizer.
Only upcycling makes new parameters, and so a new optimizer, which wants a warmup. (The paper does not say.)
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.init import constant_
from transformers import PreTrainedTokenizerBase

from looplm.data.mixture import Mixture
from looplm.data.pipeline import Windows
from looplm.data.preparing import prepare
from looplm.data.shards import PreparedSource
from looplm.data.splitting import training_texts
from looplm.data.tokenizers import load_tokenizer, train_bpe
from looplm.files import save_folder, write_text
from looplm.model.configuration import OuroConfig
from looplm.model.loading import load_model
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import Provenance, write_model
from looplm.model.upcycling import upcycle
from looplm.training.acceleration import check_compiler
from looplm.training.checkpoint import Checkpoint, Checkpoints
from looplm.training.evaluation import LoopEvaluation
from looplm.training.gate_stage import run_gate_stage
from looplm.training.planning import PlannedStage, new_config, plan
from looplm.training.preparation import PreparationProgress
from looplm.training.recipe import Recipe
from looplm.training.resume import Keeper, RunLock, StopSignal, last_checkpoint, resumption_note
from looplm.training.state import TrainingState
from looplm.training.tracking import MetricsLog, Tracker, check_tracking
from looplm.training.trainer import StageResult, Trainer, build_optimizer

Views = list[tuple[Mixture, dict[str, Windows]]]
"""Training samples and validation windows of every stage."""


@dataclass(frozen=True)
class PreparedData:
    """The text of a run by source, tokenised, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, PreparedSource]

    def mixture(self, stage: PlannedStage, seed: int) -> Mixture:
        """The training samples of a stage's view.

        Raises:
            ValueError: a source with too little text for one sequence.
        """
        settings = stage.settings
        train = {name: source.train for name, source in self.sources.items()}
        weights = settings.mixture or {name: len(corpus.tokens) for name, corpus in train.items()}
        return Mixture(
            train, weights, settings.sequence_length, (seed + stage.view) % 2**32, settings.separate_documents
        )

    def windows(self, stage: PlannedStage) -> dict[str, Windows]:
        """Validation windows by source, of the stage's sequence length."""
        size, apart = stage.settings.sequence_length, stage.settings.separate_documents
        return {
            name: Windows(source.validation, size, separate_documents=apart, keep_remainder=True)
            for name, source in self.sources.items()
        }

    def summary(self) -> dict[str, Any]:
        """The `data` section of a report."""
        train = [source.train for source in self.sources.values()]
        validation = [source.validation for source in self.sources.values()]
        return {
            "sources": list(self.sources),
            "train_tokens": sum(len(corpus.tokens) for corpus in train),
            "validation_tokens": sum(len(corpus.tokens) for corpus in validation),
            "train_documents": sum(corpus.documents for corpus in train),
            "validation_documents": sum(corpus.documents for corpus in validation),
            "validation_characters": sum(corpus.characters for corpus in validation),
        }


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        recipe, stages: what it did.
        state: as it ended; its model is the last stage's.
        data: what it read.
        results: of the stages, in order.
    """

    recipe: Recipe
    stages: list[PlannedStage]
    state: TrainingState
    data: PreparedData
    results: list[StageResult]


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: trained on the training side of its sources, or loaded.

    Raises:
        ValueError: no such tokenizer, or a source that cannot be read.
    """
    settings = recipe.tokenizer
    if settings is not None and settings.train_bpe is not None:
        return train_bpe(training_texts(recipe.data.sources, recipe.data.validation_every), settings.train_bpe)
    place = recipe.model.pretrained if settings is None else settings.pretrained
    assert place is not None
    return load_tokenizer(place)


def data_folder(recipe: Recipe) -> Path:
    """Where the tokenised text of a recipe is kept."""
    return Path(recipe.data.folder or Path(recipe.output) / "data")


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, workers: int | None = None, anew: bool = False
) -> PreparedData:
    """Tokenise the sources that are not in the data folder yet, and open all of them.

    Args:
        workers: processes that encode; None takes one for each core.
        anew: replace prepared sources that no longer match, instead of refusing.

    Raises:
        ValueError: a missing source, an empty one, or prepared data that does not fit the recipe any more.
    """
    settings = recipe.data
    with PreparationProgress() as report:
        sources = prepare(
            settings.sources,
            tokenizer,
            data_folder(recipe),
            settings.validation_every,
            workers=workers,
            anew=anew,
            report=report,
        )
    return PreparedData(tokenizer, sources)


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OuroConfig:
    """The shape of a new model, over the tokenizer's vocabulary.

    Raises:
        ValueError: a field that does not fit, or a vocabulary smaller than the tokenizer's.
    """
    size = recipe.model.vocab_size or len(tokenizer)
    if size < len(tokenizer):
        raise ValueError(f"model.vocab_size is {size}, fewer than the tokenizer's {len(tokenizer)} entries")
    return new_config(
        recipe.model,
        size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        exit_beta=recipe.stages[0].exit_beta,
        exit_prior=recipe.stages[0].exit_prior,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> OuroForCausalLM:
    """The model a recipe begins with: freshly initialised, seeded by the recipe, or the pretrained one in fp32.

    Raises:
        ValueError: a shape that does not fit, no such model, or one with fewer embeddings than the tokenizer.
    """
    settings = recipe.model
    if settings.pretrained is not None:
        model, _ = load_model(settings.pretrained, dtype=torch.float32)
        if model.config.vocab_size < len(tokenizer):
            raise ValueError(
                f"{settings.pretrained} has {model.config.vocab_size} embeddings, fewer than the tokenizer's "
                f"{len(tokenizer)}: use the tokenizer it was trained with"
            )
        return model
    config = model_config(recipe, tokenizer)
    torch.manual_seed(recipe.seed)
    model = OuroForCausalLM(config)
    constant_(model.model.early_exit_gate.bias, settings.gate_bias)
    for name, gain in model.named_parameters():
        if name.endswith("layernorm_2.weight"):
            constant_(gain, settings.post_norm_gain)
    return model


def begin_stage(state: TrainingState, stage: PlannedStage, before: PlannedStage | None) -> None:
    """Bring a state that has finished the stage `before` to the start of the next one."""
    settings = stage.settings
    if before is not None:
        same = before.view == stage.view
        state.first_sample = state.first_sample + before.batches.first(state.step) if same else 0
    if settings.upcycle is not None:
        state.model = upcycle(
            state.model,
            num_hidden_layers=settings.upcycle.num_hidden_layers,
            arrangement=settings.upcycle.arrangement,
        )
        state.optimizer = build_optimizer(state.model, settings)
    state.stage, state.step, state.minutes, state.evaluated = stage.number, 0, 0.0, 0
    state.recent_losses, state.skipped = [], []
    state.health.forget_losses()


def enter_stage(state: TrainingState, stage: PlannedStage) -> None:
    """Give model and optimizer the stage's settings, at its start or where a run goes on in it.

    The rotary frequencies are computed from the configuration in every forward pass, so a new base needs nothing else.
    """
    settings, config = stage.settings, state.model.config
    config.total_ut_steps, config.exit_beta, config.exit_prior = stage.loops, settings.exit_beta, settings.exit_prior
    config.rope_parameters = {**(config.rope_parameters or {}), "rope_theta": stage.rope_theta}
    for group, decay in zip(state.optimizer.param_groups, (settings.weight_decay, 0.0), strict=True):
        group["weight_decay"], group["betas"] = decay, settings.betas
    if settings.gradient_checkpointing:
        state.model.gradient_checkpointing_enable()
    elif state.model.model.gradient_checkpointing:
        state.model.gradient_checkpointing_disable()


def train(recipe: Recipe, anew: bool = False) -> Run:
    """Run a recipe; where its output folder holds a checkpoint of it, go on from there.

    Args:
        anew: begin at the beginning; checkpoints of an earlier run of the same data and model are removed.

    Raises:
        ValueError: anything wrong with the recipe's input, before anything is written; or the output folder holds a
            run of another recipe.
        FloatingPointError: the loss stopped being finite, or spiked too often.
        Stopped: SIGTERM came; everything is saved.
    """
    check_tracking(recipe.tracking)
    check_compiler([stage.compile for stage in recipe.stages])
    folder = Path(recipe.output)
    with RunLock(folder) as lock:
        checkpoints = Checkpoints(folder / "checkpoints", recipe.checkpoints.keep)
        found = last_checkpoint(recipe, checkpoints, _say, anew)
        tokenizer = recipe_tokenizer(recipe)
        model = build_model(recipe, tokenizer)
        stages = plan(recipe, model.config)
        data = prepare_data(recipe, tokenizer)
        views = [(data.mixture(stage, recipe.seed), data.windows(stage)) for stage in stages]
        run = Run(recipe, stages, TrainingState(model, build_optimizer(model, recipe.stages[0]), stage=0), data, [])
        if found is None:
            checkpoints.remove_all()
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        else:
            _go_on(run, found)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        lock.take()
        with nullcontext(StopSignal()) if anew else StopSignal() as stop:
            _run_stages(run, views, checkpoints, stop)
    return run


def _go_on(run: Run, checkpoint: Checkpoint) -> None:
    """Bring a run that has just been built to where a checkpoint left it."""
    state, saved = run.state, checkpoint.state
    reached = saved["training"]["stage"]
    for before, stage in zip([None, *run.stages], run.stages[:reached], strict=False):
        begin_stage(state, stage, before)
        enter_stage(state, stage)
    state.load(checkpoint)
    for result in saved["results"]:
        run.results.append(StageResult(**{**result, "final": LoopEvaluation(**result["final"])}))
    MetricsLog(Path(run.recipe.output) / "metrics.jsonl").cut(saved["metrics"])
    _say(resumption_note(checkpoint, run.recipe, state))


def _run_stages(run: Run, views: Views, checkpoints: Checkpoints, stop: StopSignal) -> None:
    """The stages that are left, each from where the state is in it."""
    recipe, state, folder = run.recipe, run.state, Path(run.recipe.output)
    with Tracker(folder, recipe.tracking, state.tokens) as tracker:
        keeper = Keeper(recipe, checkpoints, state, run.results, tracker, stop)
        save = _saver(recipe, state, run.data, folder / "model")
        for before, stage, view in zip([None, *run.stages], run.stages, views, strict=False):
            if stage.number < state.stage:
                continue
            if stage.number > state.stage:
                begin_stage(state, stage, before)
            enter_stage(state, stage)
            keeper.between_stages()
            if stage.settings.gate is not None:
                run.results.append(run_gate_stage(state, stage, *view, recipe.seed, tracker))
                save(run.results[-1].final)
            else:
                run.results.append(Trainer(state, stage, *view, recipe.seed, tracker, save, keeper).run())
            tracker.stage(asdict(run.results[-1]))
            if stage is not run.stages[-1]:
                _saver(recipe, state, run.data, folder / stage.folder)(run.results[-1].final)
        if state.stage == len(run.stages):
            state.stage, state.step = state.stage + 1, 0
            keeper.save(milestone=True)
        checkpoints.wait()


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _saver(recipe: Recipe, state: TrainingState, data: PreparedData, folder: Path) -> Callable[[LoopEvaluation], None]:
    """Writes model, tokenizer, recipe and card to a folder, whole or not at all; the card tells the evaluation."""

    def write(evaluation: LoopEvaluation, path: Path) -> None:
        stage = recipe.stages[state.stage - 1].name
        whole = evaluation.bits_per_character is not None
        provenance = Provenance(
            f"Trained by looplm with the recipe in recipe.yaml; stage {state.stage} of {len(recipe.stages)}, {stage}.",
            data=list(recipe.data.sources),
            losses=evaluation.losses,
            measured_on="held-out documents" if whole else "some of the held-out documents",
        )
        write_model(path, state.model, data.tokenizer, provenance)
        write_text(path / "recipe.yaml", recipe.to_yaml())

    return lambda evaluation: save_folder(folder, partial(write, evaluation))

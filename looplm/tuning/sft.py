"""Supervised fine-tuning from a recipe (Ouro section 4.4): conversations in, a tuned model folder out.

The output folder holds `model/` (for an adapter: merged), `adapter/` where one was trained, report.json with the loss
of every loop before and after, metrics.jsonl with every step, recipe.yaml, the encoded conversations and checkpoints.
Started again, a run goes on from its last whole checkpoint. In the same surroundings (device, threads, versions) its
losses are those of a run that nobody interrupted: transformers puts back weights, optimizer, schedule, random numbers
and the place in the data.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from looplm.data.sources import open_source
from looplm.files import public_name, save_folder, write_json, write_text
from looplm.model.loading import load_config, load_model
from looplm.model.measuring import TextMeasurement
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import Provenance, write_model
from looplm.objectives.token_losses import IGNORED
from looplm.training.acceleration import choose_autocast
from looplm.training.frontier import Gate, gate_of
from looplm.training.resume import RunLock, StopSignal
from looplm.training.tracking import MetricsLog, Progress
from looplm.tuning.conversations import Conversations, collate, marked_template, prepare_conversations, windows
from looplm.tuning.lora import adapter_config, keep_adapter, save_gate, weights_digest
from looplm.tuning.recalibration import Recalibration, check_gate, measure_rows, recalibrate
from looplm.tuning.recipe import SFTRecipe
from looplm.tuning.resuming import Keeper, check_folder, finished, resume_point
from looplm.tuning.trainer import LoopSFTTrainer, Reporter, training_arguments

BEYOND = 2
"""Loops beyond the trained depth that are measured too."""
_ROWS = 16
"""Rows in which the end of a turn is looked for."""


@dataclass
class Work:
    """A run while it goes on.

    Attributes:
        recipe, folder: what is done, and its output.
        model, tokenizer: tuned in place, and as they are saved.
        adapter: of a LoRA run.
        base_gate, base_digest: of the model before tuning.
        dtype: that the model came in and is saved in.
        autocast: whether passes run under bf16 autocast.
    """

    recipe: SFTRecipe
    folder: Path
    model: OuroForCausalLM
    tokenizer: PreTrainedTokenizerBase
    adapter: LoraConfig | None
    base_gate: Gate
    base_digest: str
    dtype: torch.dtype
    autocast: bool

    @contextmanager
    def precision(self) -> Iterator[None]:
        """The arithmetic of the run."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            yield


def tune(recipe: SFTRecipe) -> dict[str, Any]:
    """Carry a recipe out, or go on with it.

    Returns:
        The report, which is report.json: `before` and `after` (`losses` of loops 1.. and `exit_probabilities` on the
        held-out conversations), `conversations`, `steps`, and with `recalibrate_gate` `gate` (its fit and frontier).

    Raises:
        ValueError: a recipe that does not fit the model or the data, or a folder with another recipe's run.
        FloatingPointError: a loss that is not finite.
        Stopped: that was asked for (SIGTERM); the state is saved.
    """
    folder = Path(recipe.output)
    with RunLock(folder) as lock, StopSignal() as stop:
        check_folder(recipe, folder)
        if (report := finished(folder)) is not None:
            return report
        work = _begin(recipe, folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock.take()
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        data = prepare_conversations(recipe, work.tokenizer, folder / "data")
        before = _before(work, data)
        with MetricsLog(folder / "metrics.jsonl") as log:
            steps = _train(work, data, log, stop)
            gate = _recalibrate(work, data, log) if recipe.recalibrate_gate else None
        return _finish(work, data, before, steps, gate)


def _begin(recipe: SFTRecipe, folder: Path) -> Work:
    """Load the model and refuse what cannot work, before anything is written.

    All weights are tuned in fp32; under an adapter the model keeps the dtype that it came in.
    """
    for name, settings in recipe.data.sources.items():
        open_source(name, settings)
    config = load_config(recipe.model)
    if recipe.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length is {recipe.sequence_length}, but {recipe.model} has a context of "
            f"{config.max_position_embeddings} tokens; give at most as many"
        )
    if recipe.recalibrate_gate:
        check_gate(config)
    adapter = None if recipe.lora is None else adapter_config(recipe.lora, config)
    model, tokenizer = load_model(recipe.model, None if adapter else torch.float32)
    marked_template(tokenizer, recipe.model)  # refuses one that cannot be learnt from
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{recipe.model} has {config.vocab_size} embeddings, fewer than the tokenizer's {len(tokenizer)}: "
            "use the tokenizer it was trained with"
        )
    cast("Any", model).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return Work(
        recipe=recipe,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        adapter=adapter,
        base_gate=gate_of(model),
        base_digest="" if adapter is None else weights_digest(model),
        dtype=cast("torch.dtype", config.dtype or torch.float32),
        autocast=choose_autocast(recipe.autocast, model.device, config.hidden_size),
    )


def _measure(work: Work, data: Conversations) -> TextMeasurement:
    """On the held-out conversations."""
    recipe = work.recipe
    batches = windows(data.validation, recipe.micro_batch_size, recipe.evaluation_rows)
    with work.precision():
        return measure_rows(work.model, batches, work.model.config.total_ut_steps + BEYOND)


def _before(work: Work, data: Conversations) -> TextMeasurement:
    """Measured once, and read again where a run goes on."""
    file = work.folder / "before.json"
    if not file.is_file():
        write_json(file, asdict(_measure(work, data)))
    return TextMeasurement(**json.loads(file.read_text("utf-8")))


def _train(work: Work, data: Conversations, log: MetricsLog, stop: StopSignal) -> int:
    """Tune the model of `work` from the last whole checkpoint on; an adapter is saved and merged. The steps in all."""
    recipe, checkpoints = work.recipe, work.folder / "checkpoints"
    found = resume_point(checkpoints, log)
    with Progress(1.0, "tuning") as bar:
        trainer = LoopSFTTrainer(
            work.model,
            training_arguments(recipe, checkpoints, work.autocast),
            data_collator=collate,
            train_dataset=data.train,
            processing_class=work.tokenizer,
            callbacks=[Reporter(log, bar), Keeper(log, stop)],
            peft_config=work.adapter,
            objective=recipe.objective,
            exit_beta=recipe.exit_beta,
        )
        trainer.go_on(found, bar)
    if work.adapter is not None:
        keep_adapter(work.folder / "adapter", cast("PeftModel", trainer.model), recipe.model, work.base_digest)
    work.model.__dict__.pop("forward", None)  # TRL's own way through the head, which nothing here takes
    cast("Any", work.model).to(work.dtype).eval()
    return trainer.state.global_step


def _recalibrate(work: Work, data: Conversations, log: MetricsLog) -> Recalibration:
    """Stage II on the tuned model; an adapter takes the gate along."""
    recipe = work.recipe
    with work.precision():
        found = recalibrate(
            work.model,
            windows(data.train, recipe.micro_batch_size),
            list(windows(data.validation, recipe.micro_batch_size, recipe.evaluation_rows)),
            work.base_gate,
            recipe.gate,
            recipe.seed,
            lambda record: log.write({"gate": record}),
        )
    if work.adapter is not None:
        save_gate(work.folder / "adapter", gate_of(work.model))
    return found


def _finish(
    work: Work, data: Conversations, before: TextMeasurement, steps: int, gate: Recalibration | None
) -> dict[str, Any]:
    """Measure, save the model and write the report."""
    recipe, after = work.recipe, _measure(work, data)
    report = {
        "model": recipe.model,
        "trained_loops": work.model.config.total_ut_steps,
        "steps": steps,
        "conversations": data.counts,
        "measured_tokens": after.tokens,
        "before": asdict(before),
        "after": asdict(after),
        "gate": None if gate is None else asdict(gate),
    }
    learn_to_stop(work.model, work.tokenizer, data)
    what = "all weights" if work.adapter is None else f"an adapter of rank {work.adapter.r}, merged"
    base = public_name(recipe.model)
    origin = f"Supervised fine-tuning by looplm of {base}: {what}, {steps} steps."
    origin += "" if gate is None else " The gate was fitted to the tuned model afterwards (Stage II)."
    provenance = Provenance(
        origin, list(recipe.data.sources), after.losses, "what the assistant says in held-out conversations"
    )

    def write(path: Path) -> None:
        write_model(path, work.model, work.tokenizer, provenance)
        write_text(path / "recipe.yaml", recipe.to_yaml())

    save_folder(work.folder / "model", write)
    write_json(work.folder / "report.json", report)
    return json.loads((work.folder / "report.json").read_text("utf-8"))


def learn_to_stop(model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, data: Conversations) -> None:
    """Let generation end where a turn of the assistant ends, with the special token that was learnt there."""
    rows = [data.train[number]["labels"] for number in range(min(_ROWS, len(data.train)))]
    ends = [a for row in rows for a, b in zip(row, [*row[1:], IGNORED], strict=True) if a != IGNORED and b == IGNORED]
    special = [token for token in ends if token in tokenizer.all_special_ids][:1]  # a row may end where it was cut
    for settings in (model.config, model.generation_config):
        known = settings.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        if special and special[0] not in known:
            settings.eos_token_id = [*known, *special]

"""Interrupting a tuning run and going on with it: whole checkpoints, one recipe a folder, records cut to match.

transformers puts back weights, optimizer, schedule, random numbers and the place in the data. Added here: a checkpoint
counts only when it is whole (`MARK`, written last, with the length that metrics.jsonl had), a folder belongs to one
recipe, and a run that has reached its end does not do another step.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from looplm.files import write_json
from looplm.settings import Section
from looplm.training.resume import Stopped, StopSignal, differences
from looplm.training.tracking import MetricsLog, Progress

MARK = "whole.json"
"""Written into a checkpoint when all else of it is; holds how long metrics.jsonl was."""


class Resumable:
    """For trainers of transformers: trains from a checkpoint to the end, and writes no card beside checkpoints."""

    def go_on(self: Any, checkpoint: Path | None, bar: Progress) -> None:
        """Train to the last step, from a checkpoint on where one is given.

        One of the last step has its weights taken and nothing more: `train` would do another step.

        Raises:
            Stopped: that was asked for on the way; the state is saved.
        """
        self.remove_callback(PrinterCallback)
        if checkpoint is not None:
            bar.note(f"going on from step {checkpoint.name.removeprefix('checkpoint-')}")
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step = self.state.global_step
        if step < self.state.max_steps:
            raise Stopped(f"stopped and saved at step {step}; start the same command again to go on")

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None beside checkpoints: the model folder gets a card of its own."""


class Keeper(TrainerCallback):
    """Marks whole checkpoints, and stops where that was asked for.

    Args:
        every: optimizer steps between which a run is not interrupted.
    """

    def __init__(self, log: MetricsLog, stop: StopSignal, every: int = 1) -> None:
        self.metrics, self.stop, self.every = log, stop, every

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """A checkpoint is written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_json(folder / MARK, {"metrics": self.metrics.position()})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Save and stop after this step, where that was asked for."""
        if self.stop.requested and state.global_step % self.every == 0:
            control.should_save = control.should_training_stop = True


def finished(folder: Path) -> dict[str, Any] | None:
    """The report of a run that has reached its end; None of one that has not."""
    file = folder / "report.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint below `folder` and the length that metrics.jsonl had then; None where there is none.

    The optimizer's and the random numbers' states in it are files of torch, which transformers reads with
    `weights_only=True`: no code in them is run. They are the run's own; weights are safetensors.
    """
    found = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return newest, json.loads((newest / MARK).read_text("utf-8"))["metrics"]


def resume_point(checkpoints: Path, log: MetricsLog) -> Path | None:
    """The checkpoint to go on from; saves that were interrupted are removed, and the records after it are cut.

    Raises:
        ValueError: the records are shorter than they were at the checkpoint.
    """
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / MARK).is_file():
            shutil.rmtree(path)  # a save that was interrupted
    found = last_checkpoint(checkpoints)
    kept = 0 if found is None else found[1]
    if log.position() < kept:
        raise ValueError(
            f"{log.path} has {log.position()} bytes, but had {kept} at the last checkpoint: "
            "put it back, or choose another output folder (--output)"
        )
    log.cut(kept)
    return None if found is None else found[0]


def check_folder(recipe: Section, folder: Path) -> None:
    """Refuse a folder in which another recipe was begun.

    Raises:
        ValueError: names the settings that differ.
    """
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        return
    before, now = yaml.safe_load(saved.read_text("utf-8")), recipe.model_dump(mode="json")
    if not isinstance(before, dict) or (changed := differences({**before, "output": now["output"]}, now)):
        what = "; ".join(changed) if isinstance(before, dict) else "its recipe.yaml is no recipe"
        raise ValueError(
            f"{folder} holds a run of another recipe ({what}): "
            "go back to that recipe, or choose another output folder (--output)"
        )

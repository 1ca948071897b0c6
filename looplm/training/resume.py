"""Exact resume: a run that is killed at any moment goes on from its last checkpoint when it is started again.

The losses from there are bit-identical to those of an uninterrupted run in the same surroundings: same device, thread
count, torch and compile setting. They are part of the checkpoint. In other surroundings sums are taken in another
order, so losses agree to rounding only (`SAME_TO`), and a note says so. A stage bounded by minutes goes on with the
minutes it has left; its schedules follow the clock, so there is nothing to be identical to.
"""

import os
import platform
import signal
import threading
import time
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from looplm.files import plain
from looplm.training.acceleration import compiler_fault
from looplm.training.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from looplm.training.recipe import Recipe
from looplm.training.state import TrainingState
from looplm.training.tracking import Tracker

if TYPE_CHECKING:
    from looplm.training.trainer import StageResult

SAME_TO = 1e-3
"""Relative difference of losses that other surroundings may bring within the first steps after a resume."""


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and can go on."""


class StopSignal:
    """Hears SIGTERM while it is entered: `requested` turns true, and the run stops after its step.

    Signals are the main thread's; in another one nothing is heard.
    """

    requested = False

    def __enter__(self) -> Self:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, number: int, frame: types.FrameType | None) -> None:
        self.requested = True


class RunLock:
    """Lets one process at a time write to an output folder; the system releases it however the process ends.

    Args:
        folder: the lock is on the folder itself (POSIX only), so nothing is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handle: int | None = None

    def take(self) -> None:
        """Take the lock, unless it is held or the folder is not there yet.

        Raises:
            ValueError: another process has it.
        """
        if self._handle is not None or os.name != "posix" or not self.folder.is_dir():
            return
        import fcntl

        self._handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise ValueError(
                f"another run is writing to {self.folder}; wait for it, or choose another output folder (--output)"
            ) from None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


class Keeper:
    """Writes the checkpoints of a run when they are due, and puts its state back to the last one.

    Args:
        recipe: as resolved; kept with every checkpoint.
        checkpoints: of the run.
        state: what is kept and put back.
        results: of the finished stages; the list grows while the run goes on.
        tracker: its records are cut back together with the state.
        stop: when it was requested, the next step is the last one.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Checkpoints,
        state: TrainingState,
        results: "list[StageResult]",
        tracker: Tracker,
        stop: StopSignal,
    ) -> None:
        self.recipe, self.checkpoints, self.state, self.results = recipe, checkpoints, state, results
        self.tracker, self.stop = tracker, stop
        self._saved_at = time.monotonic()

    def save(self, milestone: bool = False) -> None:
        """Begin to write the present state, at the end of a step or between stages.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        state = self.state
        values = {
            "recipe": self.recipe.model_dump(mode="json"),
            "surroundings": surroundings(state, self.recipe),
            "training": state.plain(),
            "results": plain([asdict(result) for result in self.results]),
            "metrics": self.tracker.log.position(),
        }
        self.checkpoints.save(f"{state.stage:03}-{state.step:08}", state.tensors(), values, milestone)
        self._saved_at = time.monotonic()

    def after_step(self) -> None:
        """Save if it is time.

        Raises:
            Stopped: that was asked for; the state is saved.
            OSError: a checkpoint could not be written.
        """
        self.checkpoints.check()
        settings = self.recipe.checkpoints
        if settings.every_steps is not None:
            due = self.state.step % settings.every_steps == 0
        else:
            due = time.monotonic() - self._saved_at >= 60 * settings.every_minutes
        if due or self.stop.requested:
            self.save()
        self._stop_if_asked()

    def between_stages(self) -> None:
        """Save the start of a stage; what a stage ended with is kept for good. Raises as `after_step`."""
        self.save(milestone=self.state.stage > 1)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.stop.requested:
            self.checkpoints.wait()
            where = f"stage {self.state.stage}, step {self.state.step}"
            raise Stopped(f"stopped and saved at {where}; start the same command again to go on")

    def go_back(self) -> None:
        """Put the state and the records back to the last checkpoint."""
        self.checkpoints.wait()
        checkpoint = open_checkpoint(self.checkpoints.folder / self.checkpoints.names()[-1])
        self.state.load(checkpoint)
        self.tracker.log.cut(checkpoint.state["metrics"])


def last_checkpoint(
    recipe: Recipe, checkpoints: Checkpoints, note: Callable[[str], None], anew: bool = False
) -> Checkpoint | None:
    """The checkpoint from which a recipe's run goes on; None where it has none yet, or is to begin anew.

    Args:
        note: takes what there is to say of damaged ones.
        anew: accept another run of the same data and model, which is to be replaced.

    Raises:
        ValueError: it is of another recipe (all differences are shown), its records are missing, or all are damaged.
    """
    found = checkpoints.newest(note)
    if found is None:
        return None
    may_differ = {"output", "stages", "defaults", "checkpoints"} if anew else {"output"}
    before, now = (
        {key: value for key, value in values.items() if key not in may_differ}
        for values in (found.state["recipe"], recipe.model_dump(mode="json"))
    )
    if changed := differences(before, now):
        raise ValueError(
            f"{recipe.output} holds a run of another recipe ({'; '.join(changed)}): "
            "go back to that recipe, or choose another output folder (--output)"
        )
    if anew:
        return None
    metrics = Path(recipe.output) / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.is_file() else 0
    if size < found.state["metrics"]:
        raise ValueError(
            f"{metrics} has {size} bytes, but had {found.state['metrics']} at checkpoint {found.folder.name}: "
            "put it back, or choose another output folder (--output)"
        )
    return found


def resumption_note(checkpoint: Checkpoint, recipe: Recipe, state: TrainingState) -> str:
    """What to say when a run goes on: from where, and whether it can be bit-identical."""
    training = checkpoint.state["training"]
    if training["stage"] > len(recipe.stages):
        return f"{recipe.output}: all stages are finished; for another run choose another output folder (--output)"
    text = f"going on from stage {training['stage']}, step {training['step']}"
    changed = differences(checkpoint.state["surroundings"], surroundings(state, recipe))
    if changed:
        text += f"; losses will agree to about {SAME_TO:g}, not bit for bit ({'; '.join(changed)})"
    return text


def surroundings(state: TrainingState, recipe: Recipe) -> dict[str, Any]:
    """What the last bits of a loss depend on besides the recipe and the state."""
    device = state.model.device
    setting = recipe.stages[min(state.stage, len(recipe.stages)) - 1].compile
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "compiled": setting != "off" and compiler_fault() is None,
    }


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Every plain value that differs: its place, what it was and what it is.

    Mappings are compared key by key, lists of the same length entry by entry (counted from 1).
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        pairs = [(key, before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in keys]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(before, now, strict=True), start=1)]
    else:
        return [] if before == now else [f"{place}: {before!r} before, {now!r} now"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{place}.{key}" if place else key)]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()

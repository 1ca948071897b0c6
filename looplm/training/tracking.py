"""What a run says while it works: one JSON line a record in a file, one bar or plain lines on the console.

`Tracker` is what a training run writes to: metrics.jsonl always, TensorBoard beside it where the recipe asks for it.
"""

import importlib.util
import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from looplm.files import plain

_WINDOW = 30.0
"""Seconds of recent updates that the rate and the time left are computed from."""


class MetricsLog:
    """Records appended to a JSON Lines file, flushed one by one; the file is opened at the first record.

    A line that a crash cut short is dropped on opening, so every line of the file is valid JSON. NaN and
    infinite floats become null. Use it as a context manager, or call `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record of plain numbers, strings and lists. Raises TypeError for anything else."""
        line = json.dumps(plain(record), allow_nan=False)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115 - closed in close()
            _drop_torn_line(self.path)
        self._file.write(line + "\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes written so far, and on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Drop the records after an earlier `position`."""
        self.close()
        if self.path.exists():
            os.truncate(self.path, position)

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Tracker:
    """The records of a run: metrics.jsonl in its folder, and event files in `tensorboard/` where asked for.

    metrics.jsonl holds one object a line: the record of every step under plain keys, and `{"evaluation": ...}`,
    `{"warning": ...}`, `{"gate": ...}` and `{"stage_result": ...}` where they happen.

    Args:
        folder: the run's output.
        targets: what else to write to; `tensorboard` or nothing.
        tokens: that the run has seen already, where it goes on; TensorBoard hides what an earlier process wrote beyond.
    """

    def __init__(self, folder: str | os.PathLike[str], targets: Sequence[str] = (), tokens: int = 0) -> None:
        self.log = MetricsLog(Path(folder) / "metrics.jsonl")
        self._board: Any = None
        if "tensorboard" in targets:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=tokens + 1 if tokens else None)

    def step(self, record: Mapping[str, Any]) -> None:
        """A training step; TensorBoard gets its numbers over tokens, lists as one curve a loop."""
        self.log.write(dict(record))
        self._show("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """An evaluation."""
        self.log.write({"evaluation": dict(record)})
        self._show("validation", record)

    def warning(self, record: Mapping[str, Any]) -> None:
        """A warning."""
        self.log.write({"warning": dict(record)})

    def gate(self, record: Mapping[str, Any]) -> None:
        """A step of a gate's fit (Stage II)."""
        self.log.write({"gate": dict(record)})

    def stage(self, record: Mapping[str, Any]) -> None:
        """The result of a finished stage."""
        self.log.write({"stage_result": dict(record)})

    def _show(self, group: str, record: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in record.items():
            if isinstance(value, list):
                for loop, number in enumerate(value, start=1):
                    self._board.add_scalar(f"{group}/{name}/{loop}", number, record["tokens"])
            elif isinstance(value, int | float) and name not in ("tokens", "step"):
                self._board.add_scalar(f"{group}/{name}", value, record["tokens"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.log.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a metrics.jsonl by kind: step, evaluation, warning, gate, stage_result."""
    kinds: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("step", "evaluation", "warning", "gate", "stage_result")
    }
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = next((kind for kind in kinds if isinstance(record.get(kind), dict)), "step")
        kinds[kind].append(record if kind == "step" else record[kind])
    return kinds


def check_tracking(targets: Sequence[str]) -> None:
    """Refuse a tracking target whose library is missing, before a run begins.

    Raises:
        ValueError: tensorboard is asked for, but not installed.
    """
    if "tensorboard" in targets and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("tracking is ['tensorboard'], which is not installed: pip install 'looplm[track]'")


class Progress:
    """How far long work is: a live bar in a terminal, a plain line every `every` seconds elsewhere.

    Args:
        total: where `update`'s `completed` ends, in any unit: 1.0 for a fraction, steps, minutes.
        description: the phase, e.g. "training".
        console: standard error where None, so that standard output keeps results only.
        every: seconds between plain lines.

    Raises ValueError where `total` is not positive.
    """

    def __init__(self, total: float, description: str, console: Console | None = None, every: float = 10.0) -> None:
        if not total > 0:
            raise ValueError(f"total {total} of the progress of {description!r} must be above 0")
        self.total, self.description, self.every = total, description, every
        self.console = console or Console(stderr=True)
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=min(max(self.console.width - 90, 12), 40)),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task(description, total=total, status="")
        self._recent: deque[tuple[float, float, int]] = deque()
        self._line: str | None = None
        self._printed_at = float("-inf")

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
        elif self._line is not None:
            self.note(self._line)

    def update(
        self, completed: float, tokens: int, loss: float | None = None, depth: float | None = None, **more: float
    ) -> None:
        """Show the state after a step.

        Args:
            completed: how much of `total` is done, counted from the start of the whole work.
            tokens: tokens done since then; the rate shown is that of the last half minute.
            loss: nats per token, of training.
            depth: mean (or expected) exit loop, of training.
            **more: further numbers, shown as `name value`.
        """
        now = time.monotonic()
        self._recent.append((now, completed, tokens))
        while now - self._recent[0][0] > _WINDOW and len(self._recent) > 2:
            self._recent.popleft()
        numbers = [] if loss is None else [f"loss {loss:.3f}"]
        numbers += [] if depth is None else [f"depth {depth:.2f}"]
        numbers += [f"{name.replace('_', ' ')} {value:.3g}" for name, value in more.items()]
        status = " · ".join(self._pace() + numbers)
        if self._live:
            self._bar.update(self._task, completed=completed, status=status)
            return
        self._line = f"{self.description} {min(completed / self.total, 1):4.0%} {status}"
        if now - self._printed_at >= self.every:
            self.note(self._line)
            self._line, self._printed_at = None, now

    def note(self, text: str) -> None:
        """Print a line above the bar (or between the plain lines)."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _pace(self) -> list[str]:
        """Rate and time left, from the recent window; nothing before its second update."""
        (began, start, first), (now, completed, tokens) = self._recent[0], self._recent[-1]
        parts = []
        if now > began:
            parts.append(f"{short((tokens - first) / (now - began))} tok/s")
        if now > began and completed > start:
            seconds = max(self.total - completed, 0) * (now - began) / (completed - start)
            parts.append(f"{_clock(seconds)} left")
        return parts


def short(value: float) -> str:
    """A count in three digits or so: 950, 12.3k, 4.5M, 1.2B, 7.7T."""
    units = ["", "k", "M", "B", "T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g}{units[0]}"


def _clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: 0:07, 12:40, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _drop_torn_line(path: Path) -> None:
    """Cut the file after its last newline: what follows is a record whose writing was interrupted."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)

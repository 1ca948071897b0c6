"""Real training processes that die: the command line in a process of its own, killed by SIGKILL at a chosen moment.

The processes are forked from a server that has imported torch once, so that a start costs a fraction of a second.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["looplm.cli", "looplm.training.run", "looplm.training.report"])


@dataclass(frozen=True)
class Moment:
    """The n-th call of a function in a process: the process dies before it, after it or in its middle.

    Attributes:
        place: `module:name` or `module:Class.name`.
        count: which call, from 1.
        when: `before`, `after`, or the name of a function of this module that does a part of the call.
    """

    place: str
    count: int = 1
    when: str = "before"

    def arm(self) -> None:
        """Replace the function."""
        module, name = self.place.split(":")
        owner: Any = importlib.import_module(module)
        *parts, name = name.split(".")
        for part in parts:
            owner = getattr(owner, part)
        real, calls = getattr(owner, name), []

        @functools.wraps(real)
        def deadly(*args: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) < self.count:
                return real(*args, **options)
            if self.when == "after":
                real(*args, **options)
            elif self.when != "before":
                globals()[self.when](*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        setattr(owner, name, deadly)


def half_a_line(log: Any, record: dict[str, Any]) -> None:
    """Of metrics.jsonl."""
    with open(log.path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record)[:40])


def half_a_removal(checkpoints: Any, name: str) -> None:
    """Of an old checkpoint."""
    hidden = checkpoints.folder / f".old-{name}"
    (checkpoints.folder / name).rename(hidden)
    (hidden / "manifest.json").unlink()


def half_a_file(tensor: Any, stream: Any) -> None:
    """Of a tensor's bytes."""
    stream.write(b"PK\x03\x04 the beginning of a tensor")
    stream.flush()


def command(arguments: list[str], log: str, moment: Moment | None, prepare: Callable[[], None] | None) -> None:
    """The body of a child: `looplm ARGUMENTS`, its output in a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["looplm", *arguments]
    from looplm.cli import main

    if prepare is not None:
        prepare()
    if moment is not None:
        moment.arm()
    main()


def run_command(arguments: list[str], log: Path, moment: Moment | None = None) -> tuple[int | None, str]:
    """`looplm ARGUMENTS` as a process of its own: exit code (minus the signal) and what it said."""
    return _ended(_started(arguments, log, moment), log)


def _started(arguments: list[str], log: Path, moment: Moment | None, prepare: Callable[[], None] | None = None) -> Any:
    child = CONTEXT.Process(target=command, args=(arguments, str(log), moment, prepare))
    child.start()
    return child


def _ended(child: Any, log: Path) -> tuple[int | None, str]:
    child.join(400)
    return child.exitcode, log.read_text()


class Runs:
    """Starts of one command, `looplm train RECIPE`, in a folder of its own."""

    def __init__(self, folder: Path, values: dict[str, Any], prepare: Callable[[], None] | None = None) -> None:
        self.folder, self.values, self.prepare = folder, values, prepare
        self.recipe, self.log = folder / "recipe.yaml", folder / "log"
        self.write()

    def write(self, **changes: Any) -> None:
        self.recipe.write_text(yaml.safe_dump({**self.values, **changes}))

    @property
    def output(self) -> Path:
        return Path(self.values["output"])

    def begin(self, moment: Moment | None = None, *more: str) -> Any:
        return _started(["train", str(self.recipe), *more], self.log, moment, self.prepare)

    def run(self, moment: Moment | None = None, *more: str) -> tuple[int | None, str]:
        """Until the process ends; its exit code (minus the signal) and what it said."""
        return _ended(self.begin(moment, *more), self.log)

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl without what the clock says."""
        text = (self.output / "metrics.jsonl").read_text()
        return [_timeless(json.loads(line)) for line in text.splitlines()]

    def left(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """What two equal runs leave alike: the records and the weights of every folder."""
        weights = sorted(path for path in self.output.rglob("*.safetensors"))
        return self.records(), [path.read_bytes() for path in weights]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key != "minutes"}
    return value

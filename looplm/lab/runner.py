"""Many runs: those that are not finished yet, side by side in processes of one thread each.

Small models gain little from a second thread, so two cores are best used by two runs (docs/lab.md has the measurement).
A run is finished when its rows are in the results file, which is replaced as a whole after each; stopped at any moment,
the same command goes on with the rest.
"""

import multiprocessing
import os
import queue
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from looplm.lab.results import FILE, finished, load, save, table_of
from looplm.lab.settings import RunSettings
from looplm.training.tracking import Progress

_reports: Any = None
"""The queue of a worker process to its parent: numbers of steps done."""
_stop: Any = None
"""The event by which the parent ends its workers."""


def run_all(
    runs: Iterable[RunSettings], folder: Path, workers: int = 2, begin: Callable[[Path], None] = lambda folder: None
) -> pa.Table:
    """Finish runs and give all rows of the folder.

    Args:
        runs: those with the same settings count once.
        folder: of the results file.
        workers: processes; 1 where other work needs the other core.
        begin: called with the folder before the first run, when all settings have been found to be possible.

    Raises:
        ValueError: settings that cannot be (told before any run begins), fewer than 1 worker, or a folder that
            another process works in.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    wanted = {settings.key: settings for settings in runs}
    for settings in wanted.values():
        task = settings.make_task()
        for split in ("train", settings.split):
            task.batch(settings.seed, 0, 1, split)
    with locked(folder):
        table = load(folder / FILE)
        done = finished(table)
        missing = [settings for key, settings in wanted.items() if key not in done]
        if not missing:
            return table
        begin(folder)
        return _run_missing(missing, table, folder, min(workers, len(missing)))


def _run_missing(missing: list[RunSettings], table: pa.Table, folder: Path, workers: int) -> pa.Table:
    commit, total = code_commit(), sum(settings.steps for settings in missing)
    tokens = sum(settings.steps * settings.batch * settings.make_task().length for settings in missing)
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(reports, stop))
    with Progress(total, f"{len(missing)} runs") as bar:
        try:
            work = {pool.submit(_run, settings.canonical()): settings for settings in missing}
            open_runs, steps = set(work), 0
            while open_runs:
                ended, open_runs = wait(open_runs, timeout=1.0, return_when=FIRST_COMPLETED)
                steps += _drained(reports)
                table = _kept(ended, work, table, commit, folder)
                bar.update(steps, steps * tokens // total, runs_left=float(len(open_runs)))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return table


def _kept(
    ended: Iterable[Future[Any]], work: dict[Future[Any], RunSettings], table: pa.Table, commit: str, folder: Path
) -> pa.Table:
    """The table with the rows of runs that have ended, saved after each."""
    for future in ended:
        table = pa.concat_tables([table, table_of(work[future], commit, future.result())])
        save(table, folder / FILE)
    return table


def _drained(reports: Any) -> int:
    steps = 0
    while True:
        try:
            steps += reports.get_nowait()
        except queue.Empty:
            return steps


def _begin(reports: Any, stop: Any) -> None:
    """A worker process: one thread, a way to tell how far it is, and interruptions left to the parent."""
    global _reports, _stop
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _reports, _stop = reports, stop


def _run(canonical: str) -> list[dict[str, Any]]:
    """One run in a worker process."""
    import warnings

    from looplm.lab.training import run

    told = 0

    def report(steps: int) -> None:
        nonlocal told
        parent = multiprocessing.parent_process()
        if _stop.is_set() or parent is None or not parent.is_alive():
            raise SystemExit("the command that asked for this run has ended")
        _reports.put(steps - told)
        told = steps

    with warnings.catch_warnings(action="ignore"):  # of looping beyond the trained depth, which is asked for
        return run(RunSettings.model_validate_json(canonical), report)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others out of a results folder. Raises ValueError where another process is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process writes to {folder}; wait for it or choose another --output") from None
    try:
        yield
    finally:
        lock.release()


def code_commit() -> str:
    """The commit of this code, with `-dirty` where files of the package differ from it; `unknown` outside of git."""
    place = Path(__file__).resolve().parent.parent
    try:
        head = git(place, "rev-parse", "--short=12", "HEAD").strip()
        return head + ("-dirty" if git(place, "status", "--porcelain", "--untracked-files=no", ".").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(place: Path, *arguments: str) -> str:
    """What a git command prints. Raises CalledProcessError where it fails, OSError where there is no git."""
    environment = {**os.environ, "LC_ALL": "C"}
    command = ["git", "-C", str(place), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

"""Worker processes that score completions under a time limit, and are killed and replaced when they exceed it.

What scores a completion may be anybody's code on whatever a model wrote: a parser that never ends, an exponential
regular expression, a function that ends the process. A thread cannot be stopped from outside and a signal does not
interrupt C code, so each worker is a process that has one sample at a time. Workers are spawned, not forked (a fork of
a process that has run torch may hang), and import no torch themselves.
"""

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from numbers import Real
from typing import Literal, NamedTuple

from looplm.data.workers import available_cores
from looplm.tuning.problems import Problem, Score
from looplm.tuning.scorers import UnparseableError, told

Opener = Callable[[], Score]
"""Called once in each worker; it can be pickled."""
_MOST = 8
_OPENING = 120.0
"""Seconds for a worker to import and open what it needs."""
_GRACE = 1
"""Seconds beyond its limit after which a worker that nobody has ended, for its parent is gone, ends itself."""


class Job(NamedTuple):
    """One completion for one scorer."""

    scorer: int
    problem: Problem
    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class Result:
    """A reward, or why there is none.

    Attributes:
        kind: `fault` is anything that must not happen; `late` ran into its limit.
        value: the reward of a `score`.
        said: what went wrong, as in "raised TypeError: ...".
    """

    kind: Literal["score", "unparseable", "late", "fault"]
    value: float = 0.0
    said: str = ""


def result_of(score: Score, job: Job) -> Result:
    """Run a scorer on a job here."""
    try:
        reward: object = score(job.problem, job.text, job.token_ids)
    except UnparseableError:
        return Result("unparseable")
    except (Exception, SystemExit) as error:  # whatever a scorer raises is the sample's fault, not the run's
        return Result("fault", said=f"raised {told(error)}")
    if isinstance(reward, Real) and math.isfinite(reward):
        return Result("score", float(reward))
    return Result("fault", said=f"returned {str(reward)[:60]!r} ({type(reward).__name__}), not a finite number")


class ScoringPool:
    """Workers that hold opened scorers.

    Args:
        openers: of the scorers; a job names one by its place.
        seconds: the limit of each scorer for one job.
        workers: processes; as many as there are cores by default, and not more than 8.

    Raises:
        ValueError: a scorer cannot be opened.
    """

    def __init__(self, openers: Sequence[Opener], seconds: Sequence[float], workers: int | None = None):
        self._openers, self._seconds = list(openers), list(seconds)
        count = workers or min(available_cores(), _MOST)
        self._workers: list[_Worker] = []
        try:
            self._workers += [_Worker(self._openers) for _ in range(count)]
            for worker in self._workers:
                worker.opened()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job], on_result: Callable[[int, Result], object]) -> list[Result]:
        """The results of jobs, in their order.

        Args:
            on_result: told of each result as it comes, with the place of its job; where it raises, the pool is closed.

        Raises:
            ValueError: the pool is closed, or a scorer that was opened before can no longer be.
        """
        if not self._workers:
            raise ValueError("the processes that score are closed; open the rewards anew")
        results: dict[int, Result] = {}
        waiting = list(enumerate(jobs))[::-1]
        try:
            while len(results) < len(jobs):
                for worker in self._workers:
                    if waiting and worker.number is None:
                        number, job = waiting.pop()
                        worker.start(number, job, self._seconds[job.scorer])
                self._wait()
                for done in [found for worker in self._workers if (found := worker.finished()) is not None]:
                    results[done[0]] = done[1]
                    on_result(*done)
                self._replace()
        except BaseException:  # what is still running would answer the next call
            self.close()
            raise
        return [results[number] for number in range(len(jobs))]

    def _replace(self) -> None:
        """New workers for those that ended or had to be ended."""
        for place, worker in enumerate(self._workers):
            if not worker.sound:
                worker.close()
                self._workers[place] = _Worker(self._openers)
                self._workers[place].opened()

    def _wait(self) -> None:
        """Until a worker has answered or one has run out of time."""
        busy = [worker for worker in self._workers if worker.number is not None]
        if busy:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            wait([worker.connection for worker in busy], max(left, 0.0))

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
        self._workers = []


class _Worker:
    """One process, from this side.

    Attributes:
        connection: the pipe to it.
        number: of the job it has; None while it is idle.
        deadline: when that job must be done, on the monotonic clock.
        sound: whether it can take another job.
    """

    def __init__(self, openers: Sequence[Opener]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.number: int | None = None
        self.deadline, self.sound = 0.0, True
        self._seconds = 0.0
        self._process = context.Process(target=_serve, args=(theirs, list(openers)), daemon=True)
        self._process.start()
        theirs.close()

    def opened(self) -> None:
        """Wait until its scorers are there.

        Raises:
            ValueError: one of them cannot be opened.
        """
        said = f"did not open within {_OPENING:g} s"
        if self.connection.poll(_OPENING):
            try:
                said = self.connection.recv()
            except (EOFError, OSError):
                said = (
                    "a process that scores ended before it began; a script that opens rewards does so below "
                    '`if __name__ == "__main__":`'
                )
        if said:
            raise ValueError(said)

    def start(self, number: int, job: Job, seconds: float) -> None:
        """Give it a job."""
        self.number, self._seconds, self.deadline = number, seconds, time.monotonic() + seconds
        with suppress(OSError):  # it is gone, which `finished` sees
            self.connection.send((job, seconds))

    def finished(self) -> tuple[int, Result] | None:
        """The number and the result of its job, once there is one or the time is over."""
        if self.number is None:
            return None
        if self.connection.poll():
            try:
                result = self.connection.recv()
            except (EOFError, OSError):
                self.sound = False
                self._process.join()
                late = self._process.exitcode == -signal.SIGALRM  # its own alarm, where this side came to look too late
                result = self._late() if late else Result("fault", said="ended the process that scores")
        elif time.monotonic() >= self.deadline:
            self.sound = False
            result = self._late()
        else:
            return None
        number, self.number = self.number, None
        return number, result

    def _late(self) -> Result:
        return Result("late", said=f"did not end within {self._seconds:g} s")

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, openers: Sequence[Opener]) -> None:
    """The life of a worker: open the scorers, say so, answer jobs until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        scorers = [opener() for opener in openers]
    except Exception as error:
        connection.send(str(error) if isinstance(error, ValueError) else f"a reward cannot be opened: {told(error)}")
        return
    connection.send("")
    with suppress(EOFError, OSError):
        while True:
            job, seconds = connection.recv()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE)
            result = result_of(scorers[job.scorer], job)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(result)

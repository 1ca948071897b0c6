"""Schedules as pure functions of the step and of the progress through a stage (0 at its start, 1 at its end).

Learning rate: linear warmup, a constant rate, then linear or cosine decay (Table 1 has constant and cosine stages).
Beta of equation 4 in two levels: the paper lowers it from 0.1 to 0.05 between stages; a run of minutes needs the same
move within one. Batch: grows linearly (Table 1: 4M to 8M tokens; the paper does not say how).
"""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from looplm.training.recipe import Stage


def learning_rate_factor(
    step: int,
    progress: float,
    warmup_steps: int,
    decay_fraction: float,
    final: float,
    decay: Literal["linear", "cosine"] = "linear",
) -> float:
    """Multiplier of the peak learning rate, in (0, 1].

    Args:
        step: optimizer steps of the stage done before this one; warmup is linear, step 0 takes 1 / warmup_steps.
        progress: 0..1.
        decay_fraction: the rate falls over this last part of the stage.
        final: multiplier at progress 1.
        decay: along a line or half a cosine.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    into = 0.0 if decay_fraction == 0 else min(max(0.0, (progress - (1 - decay_fraction)) / decay_fraction), 1.0)
    fallen = into if decay == "linear" else (1 - math.cos(math.pi * into)) / 2
    return warmup * (1 - (1 - final) * fallen)


def learning_rate(stage: Stage, step: int, progress: float) -> float:
    """The learning rate of a step of a stage."""
    peak = stage.learning_rate
    final = 1.0 if stage.final_learning_rate is None else stage.final_learning_rate / peak
    return peak * learning_rate_factor(step, progress, stage.warmup_steps, stage.decay_fraction, final, stage.decay)


def exit_beta(progress: float, start: float | None, hold: float, end: float) -> float:
    """Beta of equation 4: `start` for the first `hold` part of the stage, then `end`."""
    return end if start is None or progress >= hold else start


@dataclass(frozen=True)
class BatchPlan:
    """How many sequences each step of a stage takes, and so where its samples begin.

    The batch grows linearly from `start` at step 0 to `end` at step `ramp`, in units that the micro-batch divides
    where both ends are multiples of it, so that no forward pass is smaller than the others on the way.

    Attributes:
        start, end: sequences a step, at least 1.
        ramp: steps, 0 for a constant batch of `end`.
        micro: the most sequences in one forward pass.
    """

    start: int
    end: int
    ramp: int
    micro: int

    @classmethod
    def of(cls, stage: Stage) -> "BatchPlan":
        """The plan of a stage's settings."""
        size = stage.sequence_length
        start = stage.batch_tokens if stage.batch_tokens_start is None else stage.batch_tokens_start
        return cls(start // size, stage.batch_tokens // size, stage.batch_ramp_steps, stage.micro_batch_size)

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """Samples before step 0, 1, ... ramp."""
        unit = math.gcd(self.start, self.end, self.micro)
        steps = np.arange(self.ramp, dtype=np.int64)
        grown = (self.end - self.start) // unit * steps // max(self.ramp, 1)
        return np.concatenate(([0], np.cumsum(self.start + unit * grown)))

    def first(self, step: int) -> int:
        """Samples that the stage takes before this step: step s takes samples first(s) to first(s + 1) - 1."""
        if step <= self.ramp:
            return int(self._firsts[step])
        return int(self._firsts[-1]) + (step - self.ramp) * self.end

    def steps(self, samples: int) -> int:
        """The fewest steps that take at least so many samples."""
        grown = int(self._firsts[-1])
        if samples <= grown:
            return int(np.searchsorted(self._firsts, samples))
        return self.ramp + -(-(samples - grown) // self.end)


@dataclass
class Budget:
    """How far a stage is: by steps, or by the clock.

    A stage of minutes ends when they are over; its schedules follow the clock, so a slow machine takes fewer steps.

    Attributes:
        steps, minutes: one of the two.
        before: minutes that an earlier process spent on the stage.
    """

    steps: int | None
    minutes: float | None
    before: float = 0.0
    _began: float = field(default_factory=lambda: time.monotonic())

    def progress(self, step: int) -> float:
        """0..1 after `step` finished steps."""
        done = step / self.steps if self.steps else self.elapsed_minutes / (self.minutes or 1.0)
        return min(done, 1.0)

    @property
    def elapsed_minutes(self) -> float:
        """Since the stage began, without the time between processes."""
        return self.before + (time.monotonic() - self._began) / 60

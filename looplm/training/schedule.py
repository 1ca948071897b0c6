"""Schedules as pure functions of the step and of the progress through the run (0 at its start, 1 at its end).

Warmup-stable-decay learning rate (Table 1 has a constant rate after warmup, then decay), and the two-level beta of
equation 4: the paper lowers it from 0.1 to 0.05 between stages; a run of minutes needs the same move from 1.0.
"""

import time
from dataclasses import dataclass, field


def learning_rate_factor(step: int, progress: float, warmup_steps: int, decay_fraction: float, final: float) -> float:
    """Multiplier of the peak learning rate, in (0, 1].

    Args:
        step: optimizer steps done before this one, from 0; warmup is linear, step 0 takes 1 / warmup_steps.
        progress: 0..1.
        decay_fraction: the rate falls linearly over this last part of the run.
        final: multiplier at progress 1.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    into_decay = 0.0 if decay_fraction == 0 else max(0.0, (progress - (1 - decay_fraction)) / decay_fraction)
    return warmup * (1 - (1 - final) * min(into_decay, 1.0))


def exit_beta(progress: float, start: float | None, hold: float, end: float) -> float:
    """Beta of equation 4: `start` for the first `hold` part of the run, then `end`."""
    return end if start is None or progress >= hold else start


@dataclass
class Budget:
    """How far a run is: by steps, or by the clock.

    A run of minutes ends when they are over; its schedules follow the clock, so a slow machine takes fewer steps.
    """

    steps: int | None
    minutes: float | None
    _began: float = field(default_factory=lambda: time.monotonic())

    def progress(self, step: int) -> float:
        """0..1 after `step` finished steps."""
        done = step / self.steps if self.steps else self.elapsed_minutes / (self.minutes or 1.0)
        return min(done, 1.0)

    @property
    def elapsed_minutes(self) -> float:
        """Since the run began."""
        return (time.monotonic() - self._began) / 60

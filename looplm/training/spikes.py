"""Loss spikes: when a loss is far above the ones before it, judged by median and median absolute deviation.

Looped models are prone to them (Ouro section 4.3: with 8 loops the loss spiked and gradients oscillated). The paper's
remedy is fewer loops and a larger batch; going back and skipping the batch is an old remedy for what is left. It is
off unless a stage asks for it.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PositiveInt

from looplm.settings import Positive, Section

SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation: 1 / Phi^-1(3/4)."""

LEAST_SPREAD = 0.01
"""Least standard deviation that is assumed, as a part of the median: a run of equal losses must not make it 0."""


class RollbackSettings(Section):
    """Go back to the last checkpoint where the loss spikes, and pass over the batch it spiked on."""

    sigmas: Positive = 10.0
    """Robust standard deviations above the running median from which a loss is a spike."""
    window: Annotated[int, Field(ge=4)] = 32
    """Losses the median is taken over; nothing counts as a spike before there are so many."""
    most: PositiveInt = 8
    """Batches of a stage that may be passed over; the run stops at the next spike."""


def spike_limit(recent: Sequence[float], settings: RollbackSettings) -> float:
    """The highest loss that is no spike, in nats a token; infinite while fewer than `window` losses are known.

    median + sigmas * max(1.4826 * median |loss - median|, 0.01 * |median|), over the last `window` of `recent`.
    """
    if len(recent) < settings.window:
        return math.inf
    last = recent[-settings.window :]
    median = statistics.median(last)
    deviation = statistics.median(abs(loss - median) for loss in last)
    return median + settings.sigmas * max(SIGMA * deviation, LEAST_SPREAD * abs(median))

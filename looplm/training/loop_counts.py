"""How many loops a training step runs, drawn anew for every step: training for a plateau over depth.

Training at one depth makes that depth sharp; drawing it makes quality level over depth. Two distributions:

    uniform             n in least..most, each as likely
    poisson_lognormal   tau ~ N(log(mean - 1) - sigma^2 / 2, sigma^2), n = 1 + Poisson(e^tau)   (Geiping et al.,
                        arXiv 2502.05171), held to least..most: what falls outside becomes the nearer end

There the rate e^tau has mean `mean - 1`, so that `mean` is the mean of n itself (the paper's own r counts from 0, and
its n has mean r + 1); its variance is (mean - 1) + (mean - 1)^2 (e^(sigma^2) - 1). Being held to the range moves both.

With n loops the exit distribution of equation 3 is that of n loops: p_n is the survival S_{n-1}, i.e. the last
hazard is taken as 1 and the gate's value there is not used; the uniform prior is over n.
"""

import math

import numpy as np

from looplm.objectives.settings import LoopCountSettings

_LARGEST_RATE = 1e9
"""Of the Poisson law; beyond it numpy could not draw, and no stack loops that often."""

_STREAM = 0x6C6F6F70
"""Keeps these draws apart from others that are keyed by the same seed and step."""


def sampled_loop_count(settings: LoopCountSettings, seed: int, step: int) -> int:
    """Loops of a step: a pure function of (seed, step), so a resumed run and every process draw the same.

    Args:
        seed: of the run, at least 0.
        step: counted from 0; all micro-batches of a step share its draw.
    """
    draw = np.random.default_rng((_STREAM, seed, step))
    if settings.mean is None:
        return int(draw.integers(settings.least, settings.most, endpoint=True))
    middle = math.log(settings.mean - 1) - settings.sigma**2 / 2
    rate = min(draw.lognormal(middle, settings.sigma), _LARGEST_RATE)
    count = 1 + int(draw.poisson(rate))
    return min(max(count, settings.least), settings.most)

"""Depth as part of the policy: probabilities of exits, ratios and what a group of samples is worth (after section 4.5).

A generated token y_i is read at the exit e_i of the position before it, and both are actions of one policy:

    pi(e_i, y_i | y_<i, e_<i) = p(e_i) pi^(e_i)(y_i)
    log p(e) = sum_{s<e} log(1 - lambda_s) + [e < T] log lambda_e

Exits of prompt positions are no actions, so the first new token has none. Loops forced by the least or the most
contribute 0. The paper's own RL had neither: its rollouts ran to full depth, or its learner could not use the depths.
A cost of depth is kept out of the reward that a group is normalised by: where all outcomes tie, dividing by their
deviation would make its coefficient mean nothing.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from looplm.exits import log_hazards

TINY = 1e-4
"""Added to the deviation of a group's rewards, as in TRL."""


class Actions(NamedTuple):
    """Log-probabilities of what was done at each target, (B, N) fp32; both 0 where `mask` or `exits_mask` is.

    Attributes:
        tokens: of the token.
        exits: of the exit that it was read at.
    """

    tokens: Tensor
    exits: Tensor

    @property
    def joint(self) -> Tensor:
        """Of token and exit together."""
        return self.tokens + self.exits


def exit_log_probability(gate_logits: Tensor, depths: Tensor, min_loops: int, max_loops: int) -> Tensor:
    """Log p(e) of recorded exits.

    Args:
        gate_logits: (..., t) with t at least the deepest exit; anything (NaN too) beyond a position's exit.
        depths: (...) the exits e, 0 where there is none.
        min_loops, max_loops: where hazards are 0 and 1.

    Returns:
        (...) in fp32 (fp64 for fp64 logits), differentiable; 0 where there is no exit.
    """
    log_exit, log_stay = _visited_hazards(gate_logits, depths, min_loops, max_loops)
    loops = torch.arange(1, log_exit.shape[-1] + 1, device=depths.device)
    at, before = loops == depths[..., None], loops < depths[..., None]
    return (log_exit.masked_fill(~at, 0) + log_stay.masked_fill(~before, 0)).sum(-1)


def visited_gate_entropy(gate_logits: Tensor, depths: Tensor, min_loops: int, max_loops: int) -> Tensor:
    """Entropy of the exit distribution, estimated by that of the decisions which were taken, in nats.

    By the chain rule H(e) is the expectation of sum_{t <= e} H(lambda_t) over the exits, so this sum is unbiased. Its
    gradient is that of the decisions at the loops visited; that other loops would be visited is left out.

    Args:
        gate_logits, depths, min_loops, max_loops: as in `exit_log_probability`.

    Returns:
        (...), differentiable; 0 where there is no exit.
    """
    log_exit, log_stay = _visited_hazards(gate_logits, depths, min_loops, max_loops)
    free = (log_exit > -torch.inf) & (log_stay > -torch.inf)
    parts = [log_p.masked_fill(~free, 0) for log_p in (log_exit, log_stay)]
    return -sum((log_p.exp() * log_p).masked_fill(~free, 0) for log_p in parts).sum(-1)  # type: ignore[union-attr]


def _visited_hazards(gate_logits: Tensor, depths: Tensor, min_loops: int, max_loops: int) -> tuple[Tensor, Tensor]:
    """Log lambda_t and log(1 - lambda_t), (..., max_loops); 0 and -inf, as forced, beyond a position's exit."""
    missing = max_loops - gate_logits.shape[-1]
    padded = torch.nn.functional.pad(gate_logits, (0, max(missing, 0)))[..., :max_loops]
    beyond = torch.arange(1, max_loops + 1, device=depths.device) > depths[..., None]
    log_exit, log_stay = log_hazards(padded.masked_fill(beyond, 0), min_loops)
    return log_exit.masked_fill(beyond, 0), log_stay.masked_fill(beyond, -torch.inf)


def changed_depths(gate_logits: Tensor, depths: Tensor, threshold: float, min_loops: int, max_loops: int) -> Tensor:
    """Where the paper's rule would now stop elsewhere than it did; (...) bool, False where there is no exit.

    What it would do before the recorded exit and at it is all that is needed, and all that a replay shows.
    """
    log_stay = _visited_hazards(gate_logits, depths, min_loops, max_loops)[1]
    loops = torch.arange(1, max_loops + 1, device=depths.device)
    free = (loops >= min_loops) & (loops <= depths[..., None])
    fires = (log_stay.cumsum(-1) <= torch.log1p(torch.tensor(-threshold, dtype=torch.float64))) & free
    fires = fires | (loops == max_loops)
    now = fires.int().argmax(-1) + 1
    return (depths > 0) & (now != depths)


def normalised(rewards: Tensor) -> Tensor:
    """Rewards (groups, samples) less their group's mean, over its deviation (n - 1); NaN (not scored) gives 0."""
    scored = rewards.isfinite()
    count = scored.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(scored, rewards - torch.where(scored, rewards, 0).sum(1, keepdim=True) / count, 0)
    deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + TINY)


def with_signal(outcomes: Tensor) -> Tensor:
    """Groups (groups,) bool whose outcomes (groups, samples) are not all the same; NaN counts for nothing."""
    high = outcomes.masked_fill(~outcomes.isfinite(), -torch.inf).amax(1)
    low = outcomes.masked_fill(~outcomes.isfinite(), torch.inf).amin(1)
    return high > low


def depth_penalty(depths: Tensor, mask: Tensor, samples: int, cost: float) -> Tensor:
    """What each target's own and later loops cost beyond the mean of its group.

    Args:
        depths: (B, N) loops of each target's exit, 0 where it is no action; rows of a group follow each other.
        mask: (B, N) bool, the targets there are.
        samples: rows of a group.
        cost: of a loop, in units of the normalised outcome.

    Returns:
        (B, N) to be taken from the advantages: cost (own and later loops - mean over the group's rows that have
        this target).
    """
    later = depths.float().flip(1).cumsum(1).flip(1)
    there = mask.view(-1, samples, mask.shape[1]).float()
    grouped = later.view(there.shape)
    mean = (grouped * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    return cost * ((grouped - mean) * there).view(mask.shape)


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """DAPO's soft punishment (arXiv 2503.14476, equation 13): 0 up to longest - buffer, then down to -1 at longest."""
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return -((lengths - (longest - buffer)) / buffer).clamp(0, 1)


def clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) of PPO, (B, N), with DAPO's own upper limit."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def surrogate(
    now: Actions,
    old: Actions,
    advantages: Tensor,
    low: float,
    high: float,
    ratio: Literal["joint", "separate"],
) -> Tensor:
    """What is maximised at each target, (B, N).

    `joint`: one ratio for token and exit, the policy as it is. `separate`: a ratio each, clipped by itself, so that a
    gate that has moved cannot clip away the token's gradient.
    """
    if ratio == "joint":
        return clipped(now.joint - old.joint, advantages, low, high)
    tokens = clipped(now.tokens - old.tokens, advantages, low, high)
    has_exit = old.exits != 0  # an exit with probability 1 was forced, and its ratio is 1 for ever
    return tokens + clipped(now.exits - old.exits, advantages, low, high) * has_exit


def k3(now: Tensor, reference: Tensor) -> Tensor:
    """Schulman's estimate of KL(now || reference) from log-probabilities of what `now` did; 0 or more."""
    difference = reference - now
    return difference.exp() - difference - 1

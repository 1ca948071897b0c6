"""When a token stops looping: the exit distribution and the exit rules.

Ouro section 3.2, equation 3. A gate gives a hazard lambda_t = sigmoid(gate_logit_t) after every loop t = 1..T:

    S_t = prod_{s<=t} (1 - lambda_s)            survival, S_0 = 1
    p_t = lambda_t S_{t-1}  (t < T),  p_T = S_{T-1}    (the last gate is ignored)
    CDF(t) = 1 - S_t        (t < T),  CDF(T) = 1

Everything is computed in log space and in fp32 (fp64 stays fp64), whatever the model's dtype: the released code
sums rounded bf16 probabilities, so a threshold of 1.0 can stop early there. Here CDF(t) >= q is tested as
log S_t <= log(1 - q), which no finite gate logit satisfies at q = 1: threshold 1.0 means all loops, exactly.

Depth limits: hazards before `min_loops` are 0 and the hazard at the last loop is 1. That renormalised distribution
is the one that every rule, every sample and every log-probability uses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def log_hazards(gate_logits: Tensor, min_loops: int = 1) -> tuple[Tensor, Tensor]:
    """Log lambda_t and log (1 - lambda_t), with the depth limits applied.

    Args:
        gate_logits: (..., T) any float dtype; the last loop's value is ignored (its hazard is 1).
        min_loops: hazards of loops 1..min_loops-1 are set to 0; 1..T.

    Returns:
        Two (..., T) tensors in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: `min_loops` outside 1..T.
    """
    num_loops = gate_logits.shape[-1]
    if not 1 <= min_loops <= num_loops:
        raise ValueError(f"min_loops is {min_loops}; it must lie in 1..{num_loops}, the number of loops")
    logits = _at_least_fp32(gate_logits)
    log_exit, log_stay = logsigmoid(logits), logsigmoid(-logits)
    loops = torch.arange(1, num_loops + 1, device=logits.device)
    early, last = loops < min_loops, loops == num_loops
    log_exit = log_exit.masked_fill(early, -math.inf).masked_fill(last, 0.0)
    log_stay = log_stay.masked_fill(early, 0.0).masked_fill(last, -math.inf)
    return log_exit, log_stay


def log_survival(gate_logits: Tensor, min_loops: int = 1) -> Tensor:
    """Log S_t: the log-probability that a token goes on after loop t; (..., T), -inf at T."""
    return log_hazards(gate_logits, min_loops)[1].cumsum(-1)


def exit_log_probabilities(gate_logits: Tensor, min_loops: int = 1) -> Tensor:
    """Log p_t of equation 3.

    Args:
        gate_logits: (..., T).
        min_loops: see `log_hazards`.

    Returns:
        (..., T) in fp32 (fp64 for fp64 input); `exp` of it sums to 1 over T.
    """
    log_exit, log_stay = log_hazards(gate_logits, min_loops)
    before = torch.nn.functional.pad(log_stay[..., :-1].cumsum(-1), (1, 0))
    return log_exit + before


def exit_probabilities(gate_logits: Tensor, min_loops: int = 1) -> Tensor:
    """p_t of equation 3, (..., T)."""
    return exit_log_probabilities(gate_logits, min_loops).exp()


def exit_cdf(gate_logits: Tensor, min_loops: int = 1) -> Tensor:
    """CDF(t) = 1 - S_t, (..., T); exactly 1 at the last loop."""
    return -torch.expm1(log_survival(gate_logits, min_loops))


def entropy(log_probabilities: Tensor) -> Tensor:
    """H = -sum p log p in nats over the last axis; log p = -inf contributes 0, to the gradient too."""
    finite = log_probabilities.masked_fill(log_probabilities == -math.inf, 0.0)
    return -(log_probabilities.exp() * finite).sum(-1)


def expected_depth(probabilities: Tensor) -> Tensor:
    """sum_t t p_t over the last axis, in loops."""
    loops = torch.arange(1, probabilities.shape[-1] + 1, device=probabilities.device, dtype=probabilities.dtype)
    return (probabilities * loops).sum(-1)


@dataclass
class LoopView:
    """What an exit rule may look at after a loop, for the N positions that are still looping.

    `loop` is a number, or (N,) where positions in several loops are judged at once: the rules of this module take both.

    `rows` (N,) are their rows in the batch, `positions` (N,) their position ids, `index` (N,) their places in the
    flattened (B, S) of the pass.

    `log_probabilities()` is the read-out after this loop, (N, V) in fp32; it costs one vocabulary product, so it is
    computed only if the rule asks. `previous_*` are None at loop 1: a rule that compares loops cannot fire there.
    """

    loop: int | Tensor
    log_hazard: Tensor
    log_survival: Tensor
    state: Tensor
    previous_state: Tensor | None
    log_probabilities: Callable[[], Tensor]
    previous_log_probabilities: Tensor | None
    rows: Tensor
    positions: Tensor
    index: Tensor


class ExitRule(Protocol):
    """Says after each loop which positions stop; every rule is a small frozen object."""

    def __call__(self, view: LoopView) -> Tensor:
        """(N,) bool: True where the position stops after loop `view.loop`."""
        ...


def _per_row(value: float | int | Tensor, rows: Tensor) -> Tensor | float | int:
    return value.to(rows.device)[rows] if isinstance(value, Tensor) and value.ndim else value


def _check_range(name: str, value: float | Tensor, low: float, high: float) -> None:
    values = torch.as_tensor(value, dtype=torch.float64)
    if not bool(((values > low) & (values <= high)).all()):
        accepted = f"({low:g}, {high:g}]" if high < math.inf else f"above {low:g}"
        raise ValueError(f"{name} is {value}; it must lie in {accepted}")


@dataclass(frozen=True)
class FixedDepth:
    """Every position stops after `loops` loops (a number, or (B,) with one a row)."""

    loops: int | Tensor

    def __post_init__(self) -> None:
        _check_range("FixedDepth.loops", self.loops, 0, math.inf)

    def __call__(self, view: LoopView) -> Tensor:
        """Stop at the given loop."""
        return (view.loop >= torch.as_tensor(_per_row(self.loops, view.rows))).expand(view.rows.shape)


@dataclass(frozen=True)
class RecordedDepth:
    """Replay: every position of a pass stops where it is recorded to have stopped; `depths` is (B, S), 0 as 1."""

    depths: Tensor

    def __call__(self, view: LoopView) -> Tensor:
        """Stop at the recorded loop."""
        return self.depths.flatten()[view.index] <= view.loop


@dataclass(frozen=True)
class QExit:
    """The paper's rule (3.2): the first loop with CDF(t) >= q; q in (0, 1], a number or (B,) with one a row."""

    threshold: float | Tensor

    def __post_init__(self) -> None:
        _check_range("exit_threshold", self.threshold, 0, 1)

    def __call__(self, view: LoopView) -> Tensor:
        """Stop where log S_t <= log(1 - q); never before the last loop at q = 1."""
        q = torch.as_tensor(_per_row(self.threshold, view.rows), dtype=torch.float64, device=view.rows.device)
        return view.log_survival <= torch.log1p(-q)


@dataclass(frozen=True)
class StateDifference:
    """Stop when the state moved less than `epsilon` in the last loop: ||h_t - h_{t-1}||_2 < epsilon (Fig. 5)."""

    epsilon: float | Tensor

    def __post_init__(self) -> None:
        _check_range("StateDifference.epsilon", self.epsilon, 0, math.inf)

    def __call__(self, view: LoopView) -> Tensor:
        """Stop where the change is small; cannot fire before loop 2."""
        if view.previous_state is None:
            return torch.zeros_like(view.rows, dtype=torch.bool)
        change = (_at_least_fp32(view.state) - _at_least_fp32(view.previous_state)).norm(dim=-1)
        return change < _per_row(self.epsilon, view.rows)


@dataclass(frozen=True)
class Confidence:
    """Stop when the read-out is sure of itself (arXiv 2607.20519 finds these strong on Ouro).

    `max_probability`: max p >= threshold; `entropy`: H(p) <= threshold (nats); `kl`: KL(p_t || p_{t-1}) <= threshold
    (nats), which cannot fire before loop 2. Each loop costs one vocabulary product.
    """

    measure: Literal["max_probability", "entropy", "kl"]
    threshold: float | Tensor

    def __post_init__(self) -> None:
        if self.measure not in ("max_probability", "entropy", "kl"):
            raise ValueError(f"Confidence.measure is {self.measure!r}; it must be max_probability, entropy or kl")
        _check_range("Confidence.threshold", self.threshold, 0, 1 if self.measure == "max_probability" else math.inf)

    def __call__(self, view: LoopView) -> Tensor:
        """Stop where the measure passes the threshold."""
        threshold = _per_row(self.threshold, view.rows)
        log_p = view.log_probabilities()
        if self.measure == "max_probability":
            return log_p.amax(-1).exp() >= threshold
        if self.measure == "entropy":
            return entropy(log_p) <= threshold
        if view.previous_log_probabilities is None:
            return torch.zeros_like(view.rows, dtype=torch.bool)
        return (log_p.exp() * (log_p - view.previous_log_probabilities)).sum(-1) <= threshold


@dataclass(frozen=True)
class SampledExit:
    """Draw the exit from the distribution itself: stop after loop t with probability lambda_t (for RL).

    The draw is a function of (seed, position, loop) alone, so every path that meets a position agrees, whatever else
    is in the batch. `seed` is a number or (B,) with one a row (rows that share a seed share their draws).
    """

    seed: int | Tensor

    def __call__(self, view: LoopView) -> Tensor:
        """Stop where a uniform draw falls below the hazard."""
        seeds = torch.as_tensor(_per_row(self.seed, view.rows), device=view.rows.device).long()
        return keyed_uniform(seeds, view.positions, view.loop).log() < view.log_hazard.double()


def check_rows(rule: ExitRule, batch: int) -> None:
    """Refuse a rule whose (B,) values do not fit the batch.

    Raises:
        ValueError: a tensor that is neither a single number nor one value for each of the `batch` rows.
    """
    if not isinstance(rule, FixedDepth | QExit | StateDifference | Confidence | SampledExit):
        return
    for name, value in vars(rule).items():
        if isinstance(value, Tensor) and value.ndim and value.shape != (batch,):
            values = "x".join(map(str, value.shape))
            raise ValueError(f"{type(rule).__name__}.{name} has {values} values; the batch has {batch} rows")


_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _splitmix64(x: Tensor) -> Tensor:
    """One step of SplitMix64 on int64 lanes (wrapping arithmetic, logical shifts)."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def keyed_uniform(seeds: Tensor, positions: Tensor, loop: int | Tensor) -> Tensor:
    """Uniform draws in [0, 1) with 53 bits, fp64, that depend only on (seed, position, loop).

    Args:
        seeds, positions: int64, broadcastable; `loop` too, or a number, counted from 1.
    """
    mixed = _splitmix64(_splitmix64(_splitmix64(seeds) ^ positions) ^ loop)
    return ((mixed >> 11) & ((1 << 53) - 1)).double() * 2.0**-53

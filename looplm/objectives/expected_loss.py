"""The Stage I objective: the expected loss over exit depths with a prior on the depth (Ouro section 3.3, eq. 4).

For every token with exit distribution p (eq. 3) and losses L_t after each loop,

    sum_t p_t L_t - beta * H(p)                        prior "uniform", the paper's choice
    sum_t p_t L_t + beta * KL(p || pi)                 geometric prior of hazard g (PonderNet; the paper's appendix A):
                                                       pi_t = g (1 - g)^(t-1), pi_T = (1 - g)^(T-1)

and the mean over the tokens is taken. The first line is beta * KL(p || uniform) without its constant beta * log T.
The gradient reaches the gate through p and the model through L_t; nothing is detached, as in the paper.

Two plainer objectives for comparison (`fixed_loss`) take no notice of the gate and do not train it: the loss of the
last loop alone, or the mean over the loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from looplm.exits import entropy, exit_log_probabilities
from looplm.objectives.token_losses import IGNORED, token_losses, weighted_token_losses

Prior = Literal["uniform"] | float
Objective = Literal["expected", "last", "mean"]


@dataclass(frozen=True)
class StageOneOutput:
    """The loss and what to log beside it.

    Attributes:
        loss: scalar, differentiable; the only value that `num_items` scales.
        expected_loss: scalar, sum_t p_t L_t in nats, detached, mean over this call's valid tokens (as all below).
        kl: scalar, KL(p || prior) in nats, the constant log T included; detached.
        loop_losses: (T,) L_t in nats, detached.
        token_losses: (T, B, S) L_t in nats of every token, 0 where the target is ignored; detached.
        exit_probabilities: (..., T) p of every position, valid or not; detached.
    """

    loss: Tensor
    expected_loss: Tensor
    kl: Tensor
    loop_losses: Tensor
    token_losses: Tensor
    exit_probabilities: Tensor


def prior_log_probabilities(prior: Prior, num_loops: int) -> Tensor:
    """Log pi_t of a prior on the exit loop.

    Args:
        prior: "uniform", or the hazard g in (0, 1) of a geometric prior whose last loop takes the remaining mass.
        num_loops: T.

    Returns:
        (T,) fp64.

    Raises:
        ValueError: anything else.
    """
    if prior == "uniform":
        return torch.full((num_loops,), -math.log(num_loops), dtype=torch.float64)
    if isinstance(prior, str) or not 0 < prior < 1:
        raise ValueError(f"prior is {prior!r}; it must be 'uniform' or a geometric hazard between 0 and 1")
    return exit_log_probabilities(torch.full((num_loops,), prior, dtype=torch.float64).logit())


def stage_one_loss(
    states: Sequence[Tensor],
    head_weight: Tensor,
    targets: Tensor,
    gate_logits: Tensor,
    *,
    beta: float,
    prior: Prior = "uniform",
    num_items: int | Tensor | None = None,
) -> StageOneOutput:
    """Equation 4 over a batch.

    Args:
        states: T tensors (B, S, D): what the head reads after each loop.
        head_weight: (V, D).
        targets: (B, S) int64, already shifted; -100 is ignored.
        gate_logits: (B, S, T); the last loop's is not used.
        beta: weight of the prior, at least 0.
        prior: see `prior_log_probabilities`.
        num_items: what the sum over tokens is divided by, for gradient accumulation; default the valid tokens here.

    Returns:
        See `StageOneOutput`; fp32 (fp64 for fp64 states). Without a valid token all means are 0.

    Raises:
        ValueError: a negative beta, an unknown prior, shapes that do not fit, or targets outside the vocabulary.
    """
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must be at least 0")
    if gate_logits.shape != (*targets.shape, len(states)):
        raise ValueError(
            f"gate_logits have shape {tuple(gate_logits.shape)}; they must be {(*targets.shape, len(states))},"
            " one for every target and loop"
        )
    valid = targets != IGNORED
    num_valid = valid.sum().clamp(min=1)
    log_p = exit_log_probabilities(gate_logits)
    p = log_p.exp()
    sum_expected, losses = weighted_token_losses(states, head_weight, targets, p.movedim(-1, 0))
    kl = _divergence(log_p[valid], prior)
    constant = math.log(len(states)) if prior == "uniform" else 0.0
    return StageOneOutput(
        loss=(sum_expected + beta * (kl - constant).sum()) / number_of_items(targets, num_items),
        expected_loss=sum_expected.detach() / num_valid,
        kl=kl.detach().sum() / num_valid,
        loop_losses=losses.flatten(1).sum(1) / num_valid,
        token_losses=losses,
        exit_probabilities=p.detach(),
    )


def fixed_loss(
    states: Sequence[Tensor],
    head_weight: Tensor,
    targets: Tensor,
    *,
    objective: Literal["last", "mean"],
    num_items: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of the last loop alone, or the mean over the loops; the gate takes no part.

    Args:
        states, head_weight, targets, num_items: as in `stage_one_loss`.
        objective: `last`: the other loops are only evaluated, without gradients; `mean`: all weigh 1 / T.

    Returns:
        The loss, a scalar, and the losses of every token (T, B, S) in nats, detached.

    Raises:
        ValueError: as `stage_one_loss`, or another objective.
    """
    if objective not in ("last", "mean"):
        raise ValueError(f"objective is {objective!r}; it must be expected, last or mean")
    taught = states[-1:] if objective == "last" else states
    ones = torch.ones(len(taught), *targets.shape, device=targets.device)
    total, losses = weighted_token_losses(taught, head_weight, targets, ones)
    if len(taught) < len(states):
        losses = torch.cat((token_losses(states[:-1], head_weight, targets), losses))
    return total / (len(taught) * number_of_items(targets, num_items)), losses


def number_of_items(targets: Tensor, num_items: int | Tensor | None) -> Tensor:
    """What a sum over tokens is divided by: `num_items`, or the valid targets; at least 1."""
    items = (targets != IGNORED).sum() if num_items is None else torch.as_tensor(num_items)
    return items.to(targets.device).clamp(min=1)


def _divergence(log_p: Tensor, prior: Prior) -> Tensor:
    """KL(p || prior) in nats, (n,) from (n, T)."""
    log_prior = prior_log_probabilities(prior, log_p.shape[-1]).to(log_p)
    return -entropy(log_p) - (log_p.exp() * log_prior).sum(-1)

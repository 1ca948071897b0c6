"""The Stage II objective: the gate learns from what a loop gained, the model stays (Ouro section 3.4, eq. 5 and 6).

For every token with detached losses L_t after each loop and hazards lambda_t,

    I   = max(0, loss before a loop - loss after it)                  what that loop gained, in nats (eq. 5)
    w   = sigmoid(k (I - gamma))                                      1: go on, 0: exit; k = 50, gamma = 0.005
    BCE = -[w log(1 - lambda) + (1 - w) log lambda]                   (eq. 6)

and the sum of BCE over the gates that have a target is divided by T, whatever their number T - 1. Which gate is
judged by which loop is the target's only choice:

    published   gate t by L_{t-1} - L_t, t = 2..T      as printed: gate t says whether loop t was worth it
    lookahead   gate t by L_t - L_{t+1}, t = 1..T-1    ours: gate t says whether loop t + 1 will be

The printed form has faults that follow from its own mathematics. The decision after loop t is about loop t + 1, but
the target tells of loop t. Gate 1 has no target, and gate T has one that equation 3 never reads; as all loops share
one gate, gate 1 moves all the same. Both forms share the soft floor: w is never below sigmoid(-k gamma) = 0.438, so a
token with nothing to gain still goes on with that probability, and since max(0, .) of noise around 0 is positive on
average, noisy losses raise it further (0.61 at a standard deviation of 0.05 nats).
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from looplm.objectives.settings import GateTarget


def judged_gates(target: GateTarget, num_loops: int) -> slice:
    """The places, in a last axis of T gates, of the T - 1 that have a target.

    Raises:
        ValueError: an unknown target, or fewer than 2 loops.
    """
    if target not in ("published", "lookahead"):
        raise ValueError(f"target is {target!r}; it must be published or lookahead")
    if num_loops < 2:
        raise ValueError(f"the number of loops is {num_loops}; a gate is judged by the gain between two, so give 2 up")
    return slice(1, num_loops) if target == "published" else slice(0, num_loops - 1)


def continuation_targets(losses: Tensor, k: float = 50.0, gamma: float = 0.005) -> Tensor:
    """How much each loop from the second on was worth running (equation 5).

    Args:
        losses: (..., T) nats; detached here.
        k: steepness, above 0. gamma: the gain in nats that is worth a loop, at least 0.

    Returns:
        (..., T - 1) w in fp32 (fp64 for fp64 losses): element i judges the step from loop i + 1 to loop i + 2.

    Raises:
        ValueError: k or gamma out of range.
    """
    if not k > 0:
        raise ValueError(f"k is {k}; it must be above 0")
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0 nats")
    losses = losses.detach() if losses.dtype == torch.float64 else losses.detach().float()
    gain = (losses[..., :-1] - losses[..., 1:]).clamp(min=0)
    return torch.sigmoid(k * (gain - gamma))


def adaptive_gate_loss(
    gate_logits: Tensor, losses: Tensor, *, target: GateTarget, k: float = 50.0, gamma: float = 0.005
) -> Tensor:
    """Equation 6, summed over the gates that `target` judges, divided by T, mean over the tokens.

    Args:
        gate_logits: (..., T) of the tokens that count; differentiable. The hazards are the gate's own: no depth limit
            is applied, so under `published` the last one is trained too.
        losses: (..., T) nats; no gradient reaches them.
        target, k, gamma: see the module.

    Returns:
        Scalar, fp32 (fp64 for fp64 gates); its least value is the mean entropy of the soft targets, not 0.

    Raises:
        ValueError: shapes that differ, no token, fewer than 2 loops, or a setting out of range.
    """
    if gate_logits.shape != losses.shape or not losses.numel():
        raise ValueError(
            f"gate_logits have shape {tuple(gate_logits.shape)} and losses {tuple(losses.shape)}; both must be"
            " (..., T) of the same tokens, one or more"
        )
    judged = judged_gates(target, losses.shape[-1])
    logits = gate_logits if gate_logits.dtype == torch.float64 else gate_logits.float()
    leave = 1 - continuation_targets(losses, k, gamma).to(logits.dtype)
    cross_entropy = binary_cross_entropy_with_logits(logits[..., judged], leave, reduction="none")
    return cross_entropy.sum(-1).mean() / losses.shape[-1]

"""The learner's side: probabilities of recorded tokens and exits, replayed at the depths that were sampled.

One parallel pass gives what step-by-step generation gave (`looplm.model.freezing`), so the log-probabilities of learner
and rollout are those of one policy, and their difference on fresh samples is rounding. Logits are held for the targets
only. `loop_losses` is the other kind of learner: all loops over all positions, and a weight for the loss of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.exits import exit_probabilities
from looplm.model.context import PassContext
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.token_losses import IGNORED, weighted_token_losses
from looplm.tuning.policy import Actions, exit_log_probability
from looplm.tuning.rl_recipe import DepthSettings
from looplm.tuning.rollouts import Rows


@dataclass(frozen=True)
class Replay:
    """What a policy says about recorded rows; (B, S), 0 where there is no action.

    Attributes:
        actions: log-probabilities of tokens and exits.
        entropy: of the next token, in nats, at temperature 1 of the policy; detached.
        gate_logits: (B, S, T) fp32, NaN beyond a position's exit.
    """

    actions: Actions
    entropy: Tensor
    gate_logits: Tensor


def replay(model: OuroForCausalLM, rows: Rows, *, temperature: float, min_loops: int, max_loops: int) -> Replay:
    """Run rows at their recorded depths, with gradients where they are enabled.

    Args:
        temperature: of the policy.
        min_loops, max_loops: within which exits were drawn.
    """
    first = int(rows.acts.any(0).nonzero()[0])  # no target before it
    out = model(
        input_ids=rows.ids,
        exit_depths=rows.depths,
        num_loop_steps=max_loops,
        min_loops=min_loops,
        logits_to_keep=rows.ids.shape[1] - first,
        use_cache=False,
    )
    assert out.logits is not None and out.gate_logits is not None
    log_p = (out.logits.float() / temperature).log_softmax(-1)
    there = rows.acts[:, first:]
    tokens = log_p.gather(-1, rows.targets[:, first:, None])[..., 0].masked_fill(~there, 0)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~there, 0)
    drawn = exit_log_probability(out.gate_logits, rows.depths * rows.exits, min_loops, max_loops)
    left = (first, 0)
    pad = torch.nn.functional.pad
    return Replay(Actions(pad(tokens, left), drawn), pad(entropy, left), out.gate_logits)


def ratio_free_loss(
    model: OuroForCausalLM,
    rows: Rows,
    weights: Tensor,
    depth: DepthSettings,
    *,
    temperature: float,
    max_loops: int,
) -> tuple[Tensor, Tensor]:
    """-sum_i weight_i sum_t w_t log P_t(y_i) over full-depth passes (RLTT), without ratios.

    `per-loop` weighs the loops as `depth.credit` says; `paper-off-policy` adds up the losses of loops 1 .. e, as one
    mean, e being the loop that supplied the token.

    Args:
        weights: (B, S), the advantage of each target over what the step's loss is divided by.

    Returns:
        The loss, and the log-probability (B, S) of each target at its own depth, detached.
    """
    core = model.model
    embedded = core.embed(rows.ids, None)
    context = PassContext.build(core, embedded, None, None, None, False, max_loops)
    states, gates = core.run(embedded, context, max_loops)
    read = [core.finish(state, context) / temperature for state in states]
    goal = rows.targets.masked_fill(~rows.acts, IGNORED)
    assert gates is not None  # nothing is cached
    share = _loop_weights(gates.detach(), rows.depths, depth)
    total, losses = weighted_token_losses(read, model.lm_head.weight, goal, share * weights)
    own = losses.gather(0, (rows.depths - 1).clamp(min=0)[None])[0]
    return total, -own.masked_fill(~rows.acts, 0)


def _loop_weights(gates: Tensor, depths: Tensor, depth: DepthSettings) -> Tensor:
    """w_t of every position, (T, B, S), which sum to 1 over the loops."""
    loops = torch.arange(1, gates.shape[-1] + 1, device=gates.device, dtype=torch.float32)
    if depth.mode == "paper-off-policy":
        share = (loops <= depths[..., None]).float() / depths[..., None].clamp(min=1)
    elif depth.credit == "exit":
        share = exit_probabilities(gates)
    elif depth.credit == "progressive":
        share = (loops / loops.sum()).expand(gates.shape)
    else:
        share = torch.full_like(gates, 1 / len(loops))
    return share.movedim(-1, 0)

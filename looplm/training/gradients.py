"""The gradients of one optimizer step, accumulated over micro-batches, and what can be read off them on the way.

Every mean is over the step's valid targets (all micro-batches together), so how a batch is cut changes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from looplm.exits import entropy, exit_log_probabilities, expected_depth
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.loop_regulariser import loop_regulariser
from looplm.objectives.token_losses import IGNORED
from looplm.training.recipe import Stage

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepValues:
    """What a step's batch gave, detached, on the CPU.

    Attributes:
        loss: the objective in nats a token, the regulariser included.
        loop_losses: (T,) nats a token after every loop.
        exit_probabilities: (T,) mean p_t.
        expected_depth: mean of sum_t t p_t, in loops.
        gate_entropy: mean entropy of a token's exit distribution, in nats; ln T where it is uniform, 0 where the gate
            always stops at the same loop.
        loop_grad_norms: (T,) norm of the loss's gradient with respect to the states after every loop. The gradient
            of the weights by loop would cost T backward passes; this shows the same growth from loop to loop.
        regulariser: the loop regulariser's part of the loss.
    """

    loss: float
    loop_losses: list[float]
    exit_probabilities: list[float]
    expected_depth: float
    gate_entropy: float
    loop_grad_norms: list[float]
    regulariser: float


def accumulate(
    model: OuroForCausalLM, batches: Iterable[Batch], stage: Stage, beta: float, loops: int, autocast: bool
) -> StepValues:
    """Add the gradients of one step to the model's, from micro-batches of input_ids, labels and position_ids.

    Args:
        stage: its objective and loop regulariser count here.
        beta: of equation 4.
        loops: T of this step.
        autocast: whether to multiply in bf16.
    """
    batches, device = list(batches), model.device
    items = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    loss, squares, means = 0.0, torch.zeros(loops, device=device), torch.zeros(2 * loops + 1, device=device)
    model.train()
    for batch in batches:
        ids, labels, places = (batch[name].to(device) for name in ("input_ids", "labels", "position_ids"))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            out = model(
                ids,
                position_ids=places,
                shift_labels=labels,
                objective=stage.objective,
                exit_beta=beta,
                num_items_in_batch=max(items, 1),
                num_loop_steps=loops,
                output_hidden_states=True,
            )
        _watch(out.hidden_states[1:], squares)
        out.loss.backward()
        loss += out.loss.item()
        means += _means(out.loop_losses, out.gate_logits.detach(), labels != IGNORED) / max(items, 1)
    regulariser = _regularise(model, stage)
    losses, probabilities, (uncertainty,) = means.cpu().split((loops, loops, 1))
    return StepValues(
        loss=loss + regulariser,
        loop_losses=losses.tolist(),
        exit_probabilities=probabilities.tolist(),
        expected_depth=expected_depth(probabilities).item(),
        gate_entropy=float(uncertainty),
        loop_grad_norms=squares.sqrt().tolist(),
        regulariser=regulariser,
    )


def _watch(states: Iterable[Tensor], squares: Tensor) -> None:
    """Add the squared norm of every state's gradient to `squares`, as backward passes through it."""

    def add(gradient: Tensor, loop: int) -> None:
        squares[loop] += gradient.float().square().sum()

    for loop, state in enumerate(states):
        if state.requires_grad:
            state.register_hook(partial(add, loop=loop))


def _means(loop_losses: Tensor, gate_logits: Tensor, valid: Tensor) -> Tensor:
    """Sums over valid targets: losses (T,), exit probabilities (T,) and entropy (1,), in one tensor."""
    log_p = exit_log_probabilities(gate_logits[valid])
    sums = (loop_losses * valid.sum(), log_p.exp().sum(0), entropy(log_p).sum()[None])
    return torch.cat([part.float() for part in sums])


def _regularise(model: OuroForCausalLM, stage: Stage) -> float:
    """Add the gradients of the loop regulariser, once a step; its value."""
    if stage.loop_regulariser is None:
        return 0.0
    term = loop_regulariser(model.model.layers, stage.loop_regulariser)
    term.backward()
    return term.item()

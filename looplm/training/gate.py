"""Stage II: the language model stays frozen and only its gate is fitted (Ouro section 3.4).

A frozen model gives the same states and losses however often it runs, so it runs once: `collect_states` keeps, of
every target token, the state after each loop and the loss there, and `fit_gate` goes over them for as many epochs as
asked. The gate is a logistic regression on them (`looplm.objectives.adaptive_gate`), so the fit is convex.

Memory: N tokens take N * T * (D * b + 4) bytes, b bytes an element in the model's own dtype, which is what the gate
reads: 65,536 tokens of 4 loops are 0.27 GB at D = 256 in fp32 and 1.1 GB at D = 2048 in bf16.

The states are those of a full-depth pass, as the paper's; in generation earlier positions may have stopped, so the
gate then reads states it was not fitted on. How many tokens, epochs and what learning rate the paper does not say.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from looplm.exits import exit_probabilities, expected_depth
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.adaptive_gate import adaptive_gate_loss, continuation_targets
from looplm.objectives.settings import GateSettings, GateTarget
from looplm.objectives.token_losses import IGNORED
from looplm.training.tracking import Progress

_CHUNK = 4096
"""Tokens whose gates are computed at a time."""


@dataclass(frozen=True)
class FrozenStates:
    """What a frozen model knows of N target tokens.

    Attributes:
        states: (N, T, D) after every loop, what the gate reads, in the model's dtype, on the CPU.
        losses: (N, T) nats, fp32 (fp64 for an fp64 model), on the CPU.
    """

    states: Tensor
    losses: Tensor


@dataclass(frozen=True)
class GateFit:
    """What a fit did; hazards, losses and targets are means over all its tokens.

    Attributes:
        target: see `GateSettings`.
        tokens: N.
        continuation: (T - 1) w of the steps from loop 1 to 2, 2 to 3, ...; below 0.438 it cannot be.
        hazards_before, hazards_after: (T) sigmoid of the gate after every loop, before and after the fit.
        loss_before, loss_after: equation 6.
        history: one record a step: step, and of its batch before the update loss, hazards (T) and expected_depth.
    """

    target: GateTarget
    tokens: int
    continuation: list[float]
    hazards_before: list[float]
    hazards_after: list[float]
    loss_before: float
    loss_after: float
    history: list[dict[str, Any]]


@torch.no_grad()
def collect_states(model: OuroForCausalLM, batches: Iterable[Mapping[str, Tensor]], tokens: int) -> FrozenStates:
    """Run a model over batches until `tokens` target tokens are together, or the batches end.

    Args:
        model: run in eval mode over its `total_ut_steps` loops, under the caller's autocast; given back as it was.
        batches: `input_ids`, `labels` (already shifted, -100 is ignored) and `position_ids`, each (B, S).
        tokens: the most to keep; the first ones are kept.

    Raises:
        ValueError: no target token, or a gate that pools over positions (no adaptive decoding reads it).
    """
    if model.config.exit_gate_pooling != "token":
        raise ValueError("exit_gate_pooling is 'causal_mean'; Stage II fits a gate that reads one token: use 'token'")
    kept: FrozenStates | None = None
    found, was_training = 0, model.training
    model.eval()
    try:
        with Progress(tokens, "frozen states") as bar:
            for batch in batches:
                states, losses = _states(model, batch)
                if kept is None:
                    kept = FrozenStates(
                        states.new_empty(tokens, *states.shape[1:]), losses.new_empty(tokens, losses.shape[1])
                    )
                number = min(len(losses), tokens - found)
                kept.states[found : found + number] = states[:number]
                kept.losses[found : found + number] = losses[:number]
                found += number
                bar.update(found, found, float(losses[:number, -1].mean()), losses.shape[1])
                if found == tokens:
                    break
    finally:
        model.train(was_training)
    if kept is None or not found:
        raise ValueError("the batches hold no target token; the gate has nothing to learn from")
    return FrozenStates(kept.states[:found], kept.losses[:found])


def _states(model: OuroForCausalLM, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States (n, T, D) and losses (n, T) of the n target tokens of a batch."""
    ids, places, labels = (batch[name].to(model.device) for name in ("input_ids", "position_ids", "labels"))
    out = model(ids, position_ids=places, shift_labels=labels, skip_logits=True, output_hidden_states=True)
    targets = labels != IGNORED
    states = torch.stack([state[targets] for state in out.hidden_states[1:]], dim=1)
    return states.cpu(), out.token_losses[targets].cpu()


def fit_gate(
    model: OuroForCausalLM,
    frozen: FrozenStates,
    settings: GateSettings,
    seed: int,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> GateFit:
    """Fit the gate of `model` to equation 6, starting from where it is; no other parameter is touched.

    The hazard after loop 1 has no target under `published` and yet moves, because the loops share one gate; the
    records of `history` show it step by step.

    Args:
        model: the one that `frozen` was collected from; its gate is replaced at the end, in its own dtype.
        frozen: see `collect_states`; may serve several fits.
        settings: see `GateSettings`.
        seed: of the order of the tokens.
        log: called with the record of every step, e.g. `MetricsLog.write`.

    Raises:
        ValueError: fewer than two loops.
        FloatingPointError: the loss is not finite; the gate is left as it was.
    """
    gate = model.model.early_exit_gate
    wide = torch.promote_types(frozen.states.dtype, torch.float32)
    weight, bias = (p.detach().to("cpu", wide).clone().requires_grad_() for p in (gate.weight[0], gate.bias))
    loss_before, hazards_before = _means(frozen, weight, bias, settings)
    history = []
    with Progress(settings.epochs * len(frozen.losses), "gate") as bar:
        for done, record in _train(frozen, weight, bias, settings, seed):
            history.append(record)
            bar.update(done, done, record["loss"], record["expected_depth"], lambda_1=record["hazards"][0])
            if log is not None:
                log(record)
    loss_after, hazards_after = _means(frozen, weight, bias, settings)
    with torch.no_grad():
        gate.weight.copy_(weight[None])
        gate.bias.copy_(bias)
    continuation = continuation_targets(frozen.losses, settings.k, settings.gamma).mean(0).tolist()
    return GateFit(
        target=settings.target,
        tokens=len(frozen.losses),
        continuation=continuation,
        hazards_before=hazards_before,
        hazards_after=hazards_after,
        loss_before=loss_before,
        loss_after=loss_after,
        history=history,
    )


def _train(
    frozen: FrozenStates, weight: Tensor, bias: Tensor, settings: GateSettings, seed: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Adam over shuffled epochs; gives the tokens done and the record of every step."""
    optimizer = torch.optim.Adam([weight, bias], lr=settings.learning_rate)
    order, number, size = torch.Generator().manual_seed(seed), len(frozen.losses), settings.batch_size
    steps = settings.epochs * math.ceil(number / size)
    parts = (part for _ in range(settings.epochs) for part in torch.randperm(number, generator=order).split(size))
    done = 0
    for step, part in enumerate(parts):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - step / steps)
        logits = _gate_logits(frozen.states[part], weight, bias)
        loss = adaptive_gate_loss(
            logits, frozen.losses[part], target=settings.target, k=settings.k, gamma=settings.gamma
        )
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {step}: the gate's loss is {loss.item()}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done += len(part)
        logits = logits.detach()
        yield (
            done,
            {
                "step": step,
                "loss": loss.item(),
                "hazards": logits.sigmoid().mean(0).tolist(),
                "expected_depth": expected_depth(exit_probabilities(logits)).mean().item(),
            },
        )


def _gate_logits(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gate logits (n, T) of states (n, T, D), as `OuroModel.gate` computes them; autocast does not touch them."""
    return (states.to(weight.dtype) * weight).sum(-1) + bias


@torch.no_grad()
def _means(frozen: FrozenStates, weight: Tensor, bias: Tensor, settings: GateSettings) -> tuple[float, list[float]]:
    """The loss, and the hazard after every loop, over all tokens."""
    logits = torch.cat([_gate_logits(states, weight, bias) for states in frozen.states.split(_CHUNK)])
    loss = adaptive_gate_loss(logits, frozen.losses, target=settings.target, k=settings.k, gamma=settings.gamma)
    return loss.item(), logits.sigmoid().mean(0).tolist()

"""The gate after tuning: Stage II on the tuned model (Ouro section 3.4), and what it bought.

Tuning moves the states that the gate reads and the loss of every loop, so a gate that was right before stops too early
or too late afterwards. It is fitted anew on the conversations that were tuned on; the language model stays as it is.
The frontier scores the gates, static depths and a confidence rule on held-out conversations.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from looplm.exits import exit_probabilities
from looplm.model.configuration import OuroConfig
from looplm.model.measuring import TextMeasurement
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.settings import GateSettings
from looplm.objectives.token_losses import IGNORED
from looplm.training.frontier import Frontier, Gate, compare_gates, gate_of
from looplm.training.gate import collect_states, fit_gate
from looplm.tuning.conversations import Batch

BEFORE_TUNING, TUNED, RECALIBRATED = "gate before tuning", "tuned gate", "recalibrated gate"
"""The frontier's names of the gates: the base model's, that which tuning left, and the fitted one."""


@dataclass(frozen=True)
class Recalibration:
    """What fitting the gate did.

    Attributes:
        fit: as plain JSON, see `looplm.training.gate.GateFit`; without its history.
        frontier: of all gates, on the tuned model.
    """

    fit: dict[str, Any]
    frontier: Frontier


def check_gate(config: OuroConfig) -> None:
    """Refuse a model whose gate cannot be fitted, before anything is written.

    Raises:
        ValueError: a gate that pools over positions, or a model of one loop.
    """
    if config.exit_gate_pooling != "token":
        raise ValueError("recalibrate_gate is true, but the model's gate pools over positions; it must read one token")
    if config.total_ut_steps < 2:
        raise ValueError("recalibrate_gate is true, but the model has 1 loop; there is nothing to exit from")


def recalibrate(
    model: OuroForCausalLM,
    train: Iterable[Batch],
    validation: Sequence[Batch],
    before_tuning: Gate,
    settings: GateSettings,
    seed: int,
    log: Callable[[dict[str, Any]], None],
) -> Recalibration:
    """Fit the gate of a tuned model to its training conversations, and compare it with those before.

    Args:
        train, validation: `input_ids`, `labels` (already shifted) and `position_ids`, each (B, S).
        before_tuning: the base model's gate, see `gate_of`.
        log: takes the record of every step of the fit.

    Raises:
        ValueError: no target token, or fewer than two rows to measure on.
        FloatingPointError: the gate's loss is not finite.
    """
    tuned = gate_of(model)
    frozen = collect_states(model, train, settings.tokens)
    fit = fit_gate(model, frozen, settings, seed, log)
    gates: dict[str, Gate] = {BEFORE_TUNING: before_tuning, TUNED: tuned, RECALIBRATED: dict(gate_of(model))}
    if all(torch.equal(before_tuning[name].to(tensor), tensor) for name, tensor in tuned.items()):
        del gates[TUNED]  # tuning left the gate as it was
    frontier = compare_gates(model, validation, gates, seed=seed)
    return Recalibration({name: value for name, value in asdict(fit).items() if name != "history"}, frontier)


@torch.no_grad()
def measure_rows(model: OuroForCausalLM, batches: Iterable[Batch], loops: int) -> TextMeasurement:
    """Losses of loops 1..`loops` and the mean exit distribution (equation 3) over the target tokens of some rows.

    Args:
        batches: as in `recalibrate`; the model is run in eval mode and given back as it was.
        loops: more than the trained T to look beyond it.
    """
    trained, was_training = model.config.total_ut_steps, model.training
    nats, mass, tokens = torch.zeros(loops, dtype=torch.float64), torch.zeros(trained, dtype=torch.float64), 0
    model.eval()
    for batch in batches:
        ids, places, labels = (batch[name].to(model.device) for name in ("input_ids", "position_ids", "labels"))
        with warnings.catch_warnings(action="ignore"):  # running beyond the trained depth is the point here
            out = model(
                ids, position_ids=places, shift_labels=labels, num_loop_steps=max(loops, trained), skip_logits=True
            )
        targets = labels != IGNORED
        nats += out.token_losses[targets][:, :loops].double().sum(0).cpu()
        mass += exit_probabilities(out.gate_logits[..., :trained])[targets].double().sum(0).cpu()
        tokens += int(targets.sum())
    model.train(was_training)
    return TextMeasurement(tokens, (nats / max(tokens, 1)).tolist(), (mass / max(tokens, 1)).tolist())

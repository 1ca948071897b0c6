"""Exit rules on one trained model: score and loss at equal mean loops (Ouro section 3.4, figure 5).

Both Stage II gates are fitted to fresh training items, from the gate that training left. Every rule then answers the
held-out items in freezing passes (a position past its exit is frozen for later ones, as in generation), at several
thresholds of its own. At a budget of mean loops it is read by linear interpolation between two neighbouring passes,
which choosing between them by a coin for each item attains (as in `looplm.training.frontier`). The ends of a curve are
fixed depths: all loops, and one loop, or two for a rule that compares a loop with the one before.

Mean loops are counted over the graded positions, where the answers are read, and over all positions up to the last
target, which are what a row costs: earlier positions stop as well, and show later ones less.

Oracles know what no rule can. Their depths are found on a plain pass and replayed under freezing, so what they answer
need not be what they were chosen for:

    agreement    the earliest loop from which on the answer is that of the last loop
    hindsight    the earliest loop whose answer is right; all loops where none is; agreement where nothing is asked
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from looplm.exits import Confidence, ExitRule, FixedDepth, QExit, RecordedDepth, StateDifference, exit_cdf
from looplm.lab.settings import COMPARING, Over, RunSettings
from looplm.lab.tasks import Batch, Task
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.settings import GateSettings, GateTarget
from looplm.objectives.token_losses import IGNORED
from looplm.training.acceleration import compile_layers
from looplm.training.frontier import STATIC, Gate, gate_of, loss_at
from looplm.training.gate import collect_states, fit_gate

STAGE_ONE = "Stage I gate"
FIT = GateSettings(tokens=32_768, epochs=50, learning_rate=0.02)
"""Of both targets: 400 steps of Adam."""
SPACING = 0.5
"""Mean loops between the thresholds of a rule."""

RULES: dict[str, tuple[int, Callable[[float], ExitRule]]] = {
    "max probability": (1, lambda x: Confidence("max_probability", min(x, 1.0))),
    "entropy": (-1, lambda x: Confidence("entropy", x)),
    "KL divergence": (-1, lambda x: Confidence("kl", x)),
    "state difference": (-1, lambda x: StateDifference(float(np.nextafter(np.float32(x), np.float32(math.inf))))),
}
"""Rules without a gate: 1 where they stop above a threshold, -1 where below; and the rule of a threshold."""

Inputs = Mapping[str, Tensor]
Items = Sequence[tuple[Batch, Inputs]]
Row = dict[str, Any]


class Point(NamedTuple):
    """What passes of one rule came to."""

    graded: float
    """Mean loops at graded positions."""
    all: float
    """Mean loops at all positions up to the last target of their row."""
    score: float
    """Share of exact matches."""
    loss: float
    """Nats a graded target."""


def frontier_rows(
    model: OuroForCausalLM, settings: RunSettings, task: Task, fitting: Iterable[Inputs], items: Items
) -> Iterator[Row]:
    """A row for every rule, budget and way of counting, and one for every oracle and way of counting.

    Args:
        model: trained; its layers are not compiled any more afterwards.
        settings: of the run; `frontier` has the budgets.
        task: what it was trained on.
        fitting: training batches for the gates, as many as they take.
        items: held-out batches, and the same as the model takes them.
    """
    compile_layers(model, "off")  # freezing passes have shapes of their own, each of which would be compiled
    model.eval()
    gates = fitted(model, fitting, settings.seed)
    count = sum(len(batch["tokens"]) for batch, _ in items)
    with torch.no_grad():
        lines = curves(model, settings.loops, task, gates, items)
        bounds = {name: answered(model, task, items, rules) for name, rules in oracles(model, items).items()}
    for name, points in lines.items():
        for budget in settings.frontier or ():
            yield from ({"rule": name, "items": count, **row} for row in at_budget(points, budget))
    for name, point in bounds.items():
        same = {"rule": name, "items": count, "score": point.score, "loss": point.loss}
        yield from ({**same, "over": over, "mean_loops": getattr(point, over)} for over in get_args(Over))


def fitted(model: OuroForCausalLM, batches: Iterable[Inputs], seed: int) -> dict[str, Gate]:
    """The gate of a model and those that Stage II makes of it, by name; the model keeps its own."""
    gates = {STAGE_ONE: gate_of(model)}
    with redirect_stderr(io.StringIO()):  # the only progress shown is that of all runs together
        frozen = collect_states(model, batches, FIT.tokens)
        for target in get_args(GateTarget):
            fit_gate(model, frozen, FIT.model_copy(update={"target": target}), seed)
            gates[f"Stage II {target}"] = gate_of(model)
            model.model.early_exit_gate.load_state_dict(gates[STAGE_ONE])
    return gates


def curves(
    model: OuroForCausalLM, loops: int, task: Task, gates: Mapping[str, Gate], items: Items
) -> dict[str, list[Point]]:
    """The points of every rule; the model keeps its gate."""
    own, depths = gate_of(model), np.arange(1 + SPACING, loops, SPACING).tolist()
    fixed = [answered(model, task, items, [FixedDepth(loop)] * len(items)) for loop in range(1, loops + 1)]
    found = {STATIC: fixed}
    for name, signal in signals(model, gates, items).items():
        sign, rule_of = (1, QExit) if name in gates else RULES[name]
        values = [sign * threshold for threshold in thresholds(signal, depths)]
        model.model.early_exit_gate.load_state_dict(gates.get(name, own))
        between = [answered(model, task, items, [rule_of(value)] * len(items)) for value in values if value > 0]
        found[name] = [fixed[1 if name in COMPARING else 0], *between, fixed[-1]]
    model.model.early_exit_gate.load_state_dict(own)
    return found


def signals(model: OuroForCausalLM, gates: Mapping[str, Gate], items: Items) -> dict[str, Tensor]:
    """How ready every rule is to stop at graded positions (N, T - 1), from plain passes.

    It never falls from loop to loop: a rule with threshold x stops after the first loop where it is x or more.
    """
    own, parts = gate_of(model), dict[str, list[Tensor]]()
    for batch, inputs in items:
        states = _states(model, inputs)[:, torch.from_numpy(batch["answer"])]  # (T, N, D)
        log_p = model.log_probabilities(states)
        before = log_p.roll(1, 0)
        measures = {
            "max probability": log_p.amax(-1).exp(),
            "entropy": (log_p.exp() * log_p).sum(-1),
            "KL divergence": -(log_p.exp() * (log_p - before)).sum(-1),
            "state difference": -(states - states.roll(1, 0)).norm(dim=-1),
        }
        for name, measure in measures.items():
            if name in COMPARING:
                measure[0] = -math.inf
            parts.setdefault(name, []).append(measure.cummax(0).values)
        for name, gate in gates.items():
            model.model.early_exit_gate.load_state_dict(gate)
            logits = model.model.early_exit_gate(states)[..., 0]
            parts.setdefault(name, []).append(exit_cdf(logits.T).T)
    model.model.early_exit_gate.load_state_dict(own)
    return {name: torch.cat(parts[name], dim=1)[:-1].T for name in (*gates, *RULES)}


def thresholds(signal: Tensor, depths: Sequence[float]) -> list[float]:
    """Thresholds at which the mean depth is about each of `depths`, without repetition.

    A position goes on after every loop whose signal is below x, so the mean depth is 1 + (number of those) / positions.

    Args:
        signal: (N, T - 1), not falling along T.
        depths: mean loops in 1..T.
    """
    levels = signal.flatten().sort().values
    below = [min(round((depth - 1) * len(signal)), len(levels) - 1) for depth in depths]
    return sorted({float(levels[count]) for count in below})


def answered(model: OuroForCausalLM, task: Task, items: Items, rules: Sequence[ExitRule]) -> Point:
    """What comes of freezing passes over the items, a rule for each batch."""
    right, losses, sums = [], [], np.zeros(4)
    for (batch, inputs), rule in zip(items, rules, strict=True):
        out = model(
            inputs["input_ids"],
            shift_labels=inputs["labels"],
            position_ids=inputs["position_ids"],
            exit_mode="freeze",
            exit_rule=rule,
        )
        graded, depths = batch["answer"], out.exit_depths.numpy()
        counted = np.logical_or.accumulate((batch["targets"] != IGNORED)[:, ::-1], axis=1)[:, ::-1]
        right.append(task.score(out.logits.argmax(-1).numpy(), batch))
        losses.append((out.token_losses.numpy() * graded).sum(1) / graded.sum(1))
        sums += depths[graded].sum(), graded.sum(), depths[counted].sum(), counted.sum()
    score, loss = float(np.concatenate(right).mean()), float(np.concatenate(losses).mean())
    return Point(float(sums[0] / sums[1]), float(sums[2] / sums[3]), score, loss)


def at_budget(points: Sequence[Point], budget: float) -> Iterator[Row]:
    """A curve at a budget of mean loops, counted either way; nothing where the curve does not reach it."""
    for over in get_args(Over):
        depths = np.array([getattr(point, over) for point in points])
        if depths.min() <= budget <= depths.max():
            score, loss = (np.array([getattr(point, name) for point in points]) for name in ("score", "loss"))
            read = {"score": loss_at(budget, depths, score), "loss": loss_at(budget, depths, loss)}
            yield {"over": over, "mean_loops": budget, **read}


def oracles(model: OuroForCausalLM, items: Items) -> dict[str, list[ExitRule]]:
    """Recorded depths of both oracles, a rule for each batch."""
    found: dict[str, list[ExitRule]] = {"agreement oracle": [], "hindsight oracle": []}
    for _, inputs in items:
        answers = model.lm_head(_states(model, inputs)).argmax(-1).movedim(0, -1)
        found["agreement oracle"].append(RecordedDepth(agreement(answers)))
        found["hindsight oracle"].append(RecordedDepth(hindsight(answers, inputs["labels"])))
    return found


def agreement(answers: Tensor) -> Tensor:
    """The earliest loop from which on the answer is that of the last loop, from 1.

    Args:
        answers: (..., T) after every loop.
    """
    same = (answers == answers[..., -1:]).long()
    return answers.shape[-1] + 1 - same.flip(-1).cumprod(-1).sum(-1)


def hindsight(answers: Tensor, targets: Tensor) -> Tensor:
    """The earliest loop whose answer is right, from 1; T where none is, `agreement` where the target is -100.

    Args:
        answers: (..., T) after every loop.
        targets: (...).
    """
    right = (answers == targets[..., None]).long()
    first = (right.cumsum(-1) == 0).sum(-1).clamp(max=answers.shape[-1] - 1) + 1
    return torch.where(targets == IGNORED, agreement(answers), first)


def _states(model: OuroForCausalLM, inputs: Inputs) -> Tensor:
    """The states after every loop of a plain pass, (T, B, S, D)."""
    out = model(inputs["input_ids"], position_ids=inputs["position_ids"], skip_logits=True, output_hidden_states=True)
    return torch.stack(out.hidden_states[1:])

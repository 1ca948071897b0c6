"""Stage II as a stage of a recipe: fit the gate, keep the target asked for, and measure what it bought (section 3.4).

Both targets are fitted from the gate that Stage I left, on the same frozen states; the second costs little and shows
what the choice was worth. The frontier (`looplm.training.frontier`) then compares the three gates, static depths and
a confidence rule on validation text.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from looplm.data.mixture import Mixture, batch
from looplm.data.pipeline import Windows, validation_batches
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.settings import GateTarget
from looplm.training.acceleration import compile_layers
from looplm.training.evaluation import LoopEvaluation, evaluate_loops
from looplm.training.frontier import Frontier, compare_gates, gate_of
from looplm.training.gate import FrozenStates, GateFit, collect_states, fit_gate
from looplm.training.gradients import Batch
from looplm.training.planning import PlannedStage
from looplm.training.tracking import Tracker

STAGE_ONE = "Stage I gate"
"""The frontier's name of the gate before the fit."""


@dataclass(frozen=True)
class GateStageResult:
    """What the fit and the measurement gave.

    Attributes:
        fits: of both targets, by name; the stage keeps its own.
        frontier: loss against mean loops of the gates and the rules.
        final: the usual evaluation, of the kept gate.
        minutes: spent.
    """

    fits: dict[str, GateFit]
    frontier: Frontier
    final: LoopEvaluation
    minutes: float

    def plain(self) -> dict[str, Any]:
        """For JSON: the fits without their steps, which are in metrics.jsonl."""
        fits = {name: {k: v for k, v in asdict(fit).items() if k != "history"} for name, fit in self.fits.items()}
        return {"fits": fits, "frontier": asdict(self.frontier)}


def run_gate_stage(
    model: OuroForCausalLM,
    stage: PlannedStage,
    mixture: Mixture,
    validation: Mapping[str, Windows],
    seed: int,
    tracker: Tracker,
    *,
    first_sample: int = 0,
    autocast: bool = False,
) -> GateStageResult:
    """Fit and measure the gate of a model; nothing else of the model changes.

    Args:
        stage: its `gate` has the settings; `micro_batch_size` and `evaluation_windows` bound the passes.
        mixture, first_sample: training samples, and the first of them to read.
        validation: windows by source, made with `keep_remainder=True`.
        seed: of the order of tokens and of the bootstrap.
        tracker: takes a record of every step of both fits.
        autocast: whether to multiply in bf16.

    Raises:
        ValueError: a gate that pools over positions, or fewer than two loops.
        FloatingPointError: the gate's loss is not finite.
    """
    settings, began = stage.settings.gate, time.monotonic()
    assert settings is not None
    compile_layers(model, "off")  # freezing passes have shapes of their own, each of which would be compiled
    size = stage.settings.micro_batch_size
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        frozen = collect_states(model, _training_batches(mixture, first_sample, size), settings.tokens)
        gates, fits = _fit_both(model, frozen, stage, seed, tracker)
        batches = _windows(validation, size, stage.settings.evaluation_windows)
        measured = compare_gates(model, batches, gates, seed=seed)
        loops = stage.settings.evaluation_loops or stage.loops + 2
        final = evaluate_loops(model, validation, loops, size)
    return GateStageResult(fits, measured, final, (time.monotonic() - began) / 60)


def _fit_both(
    model: OuroForCausalLM, frozen: FrozenStates, stage: PlannedStage, seed: int, tracker: Tracker
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, GateFit]]:
    """Every target's gate, fitted from the present one; the model keeps that of the stage's own target."""
    settings = stage.settings.gate
    assert settings is not None
    gates, fits = {STAGE_ONE: dict(gate_of(model))}, {}
    targets = sorted(get_args(GateTarget), key=lambda target: target == settings.target)  # its own last
    for target in targets:
        model.model.early_exit_gate.load_state_dict(gates[STAGE_ONE])

        def log(record: dict[str, Any], target: str = target) -> None:
            tracker.gate({"stage": stage.settings.name, "target": target, **record})

        fits[target] = fit_gate(model, frozen, settings.model_copy(update={"target": target}), seed, log)
        gates[f"Stage II {target}"] = dict(gate_of(model))
    return gates, fits


def _training_batches(mixture: Mixture, first: int, size: int) -> Iterator[Batch]:
    while True:
        yield batch(mixture, first, size)
        first += size


def _windows(validation: Mapping[str, Windows], size: int, limit: int) -> list[Batch]:
    """About `limit` validation windows, shared evenly by the sources."""
    batches = -(-limit // (size * len(validation)))
    return [part for windows in validation.values() for part in validation_batches(windows, size, batches)]

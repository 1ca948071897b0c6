"""Stage II as a stage of a recipe: fit the gate, keep the target asked for, and measure what it bought (section 3.4).

Both targets are fitted from the gate that Stage I left, on the same frozen states; the second costs little and shows
what the choice was worth. The frontier (`looplm.training.frontier`) then compares the three gates, static depths and
a confidence rule on validation text.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import torch

from looplm.data.mixture import Mixture, batch
from looplm.data.pipeline import Windows
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.settings import GateTarget
from looplm.training.acceleration import compile_layers
from looplm.training.evaluation import evaluate_loops
from looplm.training.frontier import compare_gates, gate_of
from looplm.training.gate import FrozenStates, GateFit, collect_states, fit_gate
from looplm.training.gradients import Batch
from looplm.training.planning import PlannedStage
from looplm.training.state import TrainingState
from looplm.training.tracking import Tracker
from looplm.training.trainer import StageResult

STAGE_ONE = "Stage I gate"
"""The frontier's name of the gate before the fit."""


def run_gate_stage(
    state: TrainingState,
    stage: PlannedStage,
    mixture: Mixture,
    validation: Mapping[str, Windows],
    seed: int,
    tracker: Tracker,
) -> StageResult:
    """Fit and measure the gate of a state's model; nothing else of the model changes, the optimizer nothing at all.

    It is done anew where a run was interrupted in it: the same state gives the same gate.

    Args:
        state: at the start of the stage.
        stage: its `gate` has the settings; `micro_batch_size` and `evaluation_windows` bound the passes.
        mixture: training samples of the stage's view, read from the state's first one on.
        validation: windows by source, made with `keep_remainder=True`.
        seed: of the order of tokens and of the bootstrap.
        tracker: takes a record of every step of both fits.

    Returns:
        The stage's result; its `gate` has `fits` by target (their steps are in metrics.jsonl) and the `frontier`.

    Raises:
        ValueError: a gate that pools over positions.
        FloatingPointError: the gate's loss is not finite.
    """
    settings, model, began = stage.settings.gate, state.model, time.monotonic()
    assert settings is not None
    compile_layers(model, "off")  # freezing passes have shapes of their own, each of which would be compiled
    size = stage.settings.micro_batch_size
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(state.autocast)):
        frozen = collect_states(model, _training_batches(mixture, state.first_sample, size), settings.tokens)
        gates, fits = _fit_both(model, frozen, stage, seed, tracker)
        batches = _windows(validation, size, stage.settings.evaluation_windows)
        measured = compare_gates(model, batches, gates, seed=seed)
        final = evaluate_loops(model, validation, stage.settings.evaluation_loops or stage.loops + 2, size)
    return StageResult(
        stage=stage.number,
        name=stage.settings.name,
        layers=stage.layers,
        loops=stage.loops,
        sequence_length=stage.settings.sequence_length,
        parameters=stage.parameters,
        steps=len(fits[settings.target].history),
        tokens=len(frozen.losses),
        minutes=(time.monotonic() - began) / 60,
        compiled=False,
        autocast="bfloat16" if state.autocast else None,
        final=final,
        gate={"fits": {name: _plain(fit) for name, fit in fits.items()}, "frontier": asdict(measured)},
    )


def _plain(fit: GateFit) -> dict[str, Any]:
    return {name: value for name, value in asdict(fit).items() if name != "history"}


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
    """About `limit` validation windows, shared evenly by the sources and spread over each: of many documents."""
    batches, share = [], -(-limit // len(validation))
    for windows in validation.values():
        count = min(share, len(windows))
        chosen = [windows[k * len(windows) // count] for k in range(count)]
        for first in range(0, count, size):
            part = chosen[first : first + size]
            batches.append({name: torch.from_numpy(np.stack([w[name] for w in part])) for name in part[0]})
    return batches

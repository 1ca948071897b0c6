"""The trainer: one loop over steps that reads top to bottom (Ouro sections 3.3 and 4.3, Table 1).

AdamW on the Stage I objective, warmup-stable-decay, clipping, gradient accumulation, evaluation by loop, JSONL
metrics, and a model folder saved by `save_pretrained` at every evaluation. A batch is a pure function of (seed, step).
Not here yet: stages, exact resume and several processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from looplm.data.pipeline import TrainingBatches, Windows
from looplm.model.modeling import OuroForCausalLM
from looplm.training.acceleration import choose_autocast, compile_layers
from looplm.training.evaluation import LoopEvaluation, evaluate_loops
from looplm.training.recipe import TrainingSettings
from looplm.training.schedule import Budget, exit_beta, learning_rate_factor
from looplm.training.tracking import MetricsLog, Progress

LOG_EVERY = 10
"""Steps between records of metrics.jsonl."""

REMEDY = "lower training.learning_rate or raise training.warmup_steps"
"""What helps against divergence."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run did: its logged records and evaluations, and how it ran."""

    history: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    final: LoopEvaluation
    steps: int
    tokens: int
    minutes: float
    compiled: bool
    autocast: str | None


class Trainer:
    """Trains a model on batches within a budget.

    Args:
        model: trained in place; its device and dtype decide where and how.
        batches: training batches by number.
        validation: windows for evaluation, made with `keep_remainder=True`.
        characters: of the validation text, for bits per character.
        settings: the recipe's training section.
        folder: where metrics.jsonl goes.
        save: writes the model folder; called at every evaluation.

    Raises:
        ValueError: compile is `on`, but no compiler works.
    """

    def __init__(
        self,
        model: OuroForCausalLM,
        batches: TrainingBatches,
        validation: Windows,
        characters: int,
        settings: TrainingSettings,
        folder: Path,
        save: Callable[[], None],
    ) -> None:
        self.model, self.batches, self.validation = model, batches, validation
        self.characters, self.settings, self.folder, self.save = characters, settings, folder, save
        self.optimizer = build_optimizer(model, settings)
        self.autocast = choose_autocast(settings.autocast, model.device, model.config.hidden_size)
        self.not_compiled = compile_layers(model, settings.compile)
        self.history: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.tokens = 0

    def run(self) -> TrainingResult:
        """Train until the budget is spent, then evaluate on the whole validation text.

        Raises:
            FloatingPointError: a loss or the gradient is not finite; names the step.
        """
        settings, step, evaluated = self.settings, 0, 0
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        with Progress(1.0, "training") as bar, MetricsLog(self.folder / "metrics.jsonl") as log:
            if self.not_compiled is not None:
                bar.note(f"layers are not compiled: {self.not_compiled}")
            budget = Budget(settings.steps, settings.minutes)
            while (progress := budget.progress(step)) < 1:
                record = self.step(step, progress)
                record["minutes"] = budget.elapsed_minutes
                bar.update(progress, self.tokens, record["loop_losses"][-1], record["expected_depth"])
                if step % LOG_EVERY == 0:
                    self.history.append(record)
                    log.write(record)
                step += 1
                due = math.floor(budget.progress(step) * settings.evaluations)
                if evaluated < due < settings.evaluations:
                    evaluated = due
                    self._evaluate(step, settings.evaluation_windows, bar, log)
            final = self._evaluate(step, None, bar, log)
        return TrainingResult(
            self.history,
            self.evaluations,
            final,
            step,
            self.tokens,
            budget.elapsed_minutes,
            self.not_compiled is None,
            "bfloat16" if self.autocast else None,
        )

    def step(self, step: int, progress: float) -> dict[str, Any]:
        """One optimizer step: accumulate, check, clip, update; returns its record."""
        settings = self.settings
        rate = settings.learning_rate * learning_rate_factor(
            step, progress, settings.warmup_steps, settings.decay_fraction, settings.final_learning_rate
        )
        beta = exit_beta(progress, settings.exit_beta_start, settings.exit_beta_hold, settings.exit_beta)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, loop_losses, probabilities = self._gradients(step, beta)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {step}: the loss is {loss} and the gradient norm {norm}; {REMEDY}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step,
            "tokens": self.tokens,
            "learning_rate": rate,
            "exit_beta": beta,
            "loss": loss,
            "loop_losses": loop_losses.tolist(),
            "exit_probabilities": probabilities.tolist(),
            "expected_depth": sum(t * p for t, p in enumerate(probabilities.tolist(), start=1)),
            "grad_norm": norm,
        }

    def _gradients(self, step: int, beta: float) -> tuple[float, Tensor, Tensor]:
        """Accumulate the gradients of a step; its loss, loss by loop (T,) and mean exit probabilities (T,)."""
        count, device = self.settings.accumulation, self.model.device
        micro = [self.batches[step * count + k] for k in range(count)]
        items = sum(int((batch["labels"] != -100).sum()) for batch in micro)
        loss, parts = 0.0, []
        self.model.train()
        for batch in micro:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                out = self.model(
                    batch["input_ids"],
                    position_ids=batch["position_ids"],
                    shift_labels=batch["labels"],
                    exit_beta=beta,
                    num_items_in_batch=items,
                )
            out.loss.backward()
            loss += out.loss.item()
            parts.append(torch.stack((out.loop_losses, out.exit_probabilities.detach().mean((0, 1)))))
            self.tokens += batch["input_ids"].numel()
        loop_losses, probabilities = torch.stack(parts).mean(0).unbind(0)
        return loss, loop_losses, probabilities

    def evaluate(self, windows: int | None) -> LoopEvaluation:
        """Loss of every loop on the validation text, or on its first `windows` windows."""
        loops = self.settings.evaluation_loops or self.model.config.total_ut_steps + 2
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.autocast):
            return evaluate_loops(
                self.model, self.validation, loops, self.settings.batch_size, self.characters, windows
            )

    def _evaluate(self, step: int, windows: int | None, bar: Progress, log: MetricsLog) -> LoopEvaluation:
        """Evaluate, write it down and save the model; a diverged model does not replace the saved one."""
        result = self.evaluate(windows)
        if not all(map(math.isfinite, result.losses[: self.model.config.total_ut_steps])):
            raise FloatingPointError(f"step {step}: the validation loss by loop is {result.losses}; {REMEDY}")
        record = {"step": step, "tokens": self.tokens, "loop_losses": result.losses}
        self.evaluations.append(record)
        log.write({"evaluation": record})
        by_loop = "  ".join(f"{loss:.3f}" for loss in result.losses)
        bar.note(f"step {step}: validation loss by loop  {by_loop}")
        self.save()
        return result


def build_optimizer(model: OuroForCausalLM, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of the layers only."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "_proj." in n]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)

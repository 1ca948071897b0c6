"""One stage of training: a loop over steps that reads top to bottom (Ouro sections 3.3 and 4.3, Table 1).

AdamW on the stage's objective, its schedules, clipping, gradient accumulation, evaluation by loop, JSONL metrics, and
a model folder saved by `save_pretrained` at every evaluation. What has to survive an interruption is in one object
(`looplm.training.state`); everything else is a pure function of the recipe and the state. Several processes come later.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from looplm.data.mixture import Mixture, batch
from looplm.data.pipeline import Windows
from looplm.model.modeling import OuroForCausalLM
from looplm.training.acceleration import choose_autocast, compile_layers
from looplm.training.evaluation import LoopEvaluation, evaluate_loops
from looplm.training.gradients import Batch, accumulate
from looplm.training.loop_counts import sampled_loop_count
from looplm.training.planning import PlannedStage
from looplm.training.recipe import StageDefaults
from looplm.training.resume import Keeper
from looplm.training.schedule import Budget, exit_beta, learning_rate
from looplm.training.spikes import spike_limit
from looplm.training.state import TrainingState
from looplm.training.tracking import Progress, Tracker

REMEDY = "lower learning_rate or raise warmup_steps"
"""What helps against divergence."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did: plain numbers, written to metrics.jsonl at its end.

    Attributes:
        stage, name: its number and name.
        layers, loops, sequence_length, parameters: of the model and the samples during it.
        steps, tokens, minutes: spent on it.
        compiled, autocast: how it ran.
        final: the evaluation at its end on the whole validation text.
        gate: of a stage that fitted the gate, the fits and the frontier (`looplm.training.gate_stage`).
    """

    stage: int
    name: str
    layers: int
    loops: int
    sequence_length: int
    parameters: int
    steps: int
    tokens: int
    minutes: float
    compiled: bool
    autocast: str | None
    final: LoopEvaluation
    gate: dict[str, Any] | None = None


class Trainer:
    """Trains a state through one stage, from wherever the state is in it.

    Args:
        state: at some step of the stage; its model has the stage's shape (`looplm.training.run.begin_stage`).
        stage: as planned.
        mixture: the samples of the stage's view.
        validation: windows by source, made with `keep_remainder=True`.
        seed: the recipe's.
        tracker: takes the records.
        save: writes the model folder; called with every evaluation.
        keeper: writes checkpoints, and goes back to them where the loss spikes; without one nothing is kept.

    Raises:
        ValueError: compile is `on`, but no compiler works.
    """

    def __init__(
        self,
        state: TrainingState,
        stage: PlannedStage,
        mixture: Mixture,
        validation: Mapping[str, Windows],
        seed: int,
        tracker: Tracker,
        save: Callable[[LoopEvaluation], None],
        keeper: Keeper | None = None,
    ) -> None:
        self.state, self.stage, self.settings = state, stage, stage.settings
        self.mixture, self.validation, self.seed = mixture, validation, seed
        self.tracker, self.save, self.batches = tracker, save, stage.batches
        self.keeper = keeper
        if state.autocast is None or self.settings.autocast != "auto":
            width = state.model.config.hidden_size
            state.autocast = choose_autocast(self.settings.autocast, state.model.device, width)
        self.not_compiled = compile_layers(state.model, self.settings.compile)

    def run(self) -> StageResult:
        """Train until the stage's budget is spent, then evaluate on the whole validation text.

        Raises:
            FloatingPointError: a loss or the gradient is not finite, or spiked more often than the stage allows.
            Stopped, OSError: see `Keeper.after_step`.
        """
        state, settings = self.state, self.settings
        before = state.tokens - self._seen()
        with Progress(1.0, self.stage.name) as bar:
            if self.not_compiled is not None:
                bar.note(f"layers are not compiled: {self.not_compiled}")
            budget = Budget(self.stage.steps, settings.minutes, before=state.minutes)
            while (progress := budget.progress(state.step)) < 1:
                if state.step in state.skipped:
                    state.step += 1
                    continue
                try:
                    record = self.step(progress)
                except FloatingPointError as error:
                    self._go_back(error, bar)
                    continue
                state.minutes = record["minutes"] = budget.elapsed_minutes
                self.tracker.step(record)
                bar.update(progress, state.tokens - before, record["loop_losses"][-1], record["expected_depth"])
                for warning in [*state.health.after_step(record), *self._new_epochs(state.step - 1)]:
                    self._warn(warning, bar)
                due = math.floor(budget.progress(state.step) * settings.evaluations)
                if state.evaluated < due < settings.evaluations:
                    state.evaluated = due
                    self._evaluate(settings.evaluation_windows, bar)
                    state.minutes = budget.elapsed_minutes
                if self.keeper is not None:
                    self.keeper.after_step()
            final = self._evaluate(None, bar)
            state.minutes = budget.elapsed_minutes
        return self._result(final)

    def step(self, progress: float) -> dict[str, Any]:
        """One optimizer step: accumulate, check, clip, update, count; returns its record."""
        state, settings = self.state, self.settings
        rate = learning_rate(settings, state.step, progress)
        beta = exit_beta(progress, settings.exit_beta_start, settings.exit_beta_hold, settings.exit_beta)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loops = self.loops(state.step)
        values = accumulate(state.model, self._micro_batches(), settings, beta, loops, bool(state.autocast))
        norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip).item()
        self._check(values.loss, norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        record = {"stage": self.stage.settings.name, "step": state.step}
        self._count_tokens()
        state.step += 1
        counts = {"tokens": state.tokens, "source_tokens": dict(state.source_tokens)}
        return {**record, **counts, "learning_rate": rate, "exit_beta": beta, **asdict(values), "grad_norm": norm}

    def _check(self, loss: float, norm: float) -> None:
        """Refuse a loss or gradient that is not finite, or a spike where the stage watches for them."""
        state, rollback = self.state, self.settings.rollback
        where = f"{self.stage.name}, step {state.step}"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"{where}: the loss is {loss} and the gradient norm {norm}; {REMEDY}")
        if rollback is None:
            return
        limit = spike_limit(state.recent_losses, rollback)
        if loss > limit:
            raise FloatingPointError(f"{where}: the loss spikes to {loss:.3f}, above {limit:.3f}")
        state.recent_losses = [*state.recent_losses, loss][-rollback.window :]

    def _go_back(self, error: FloatingPointError, bar: Progress) -> None:
        """Put everything back to the last checkpoint, and pass over the batch of the present step from then on.

        A kill after this loses the list of what to pass over, but not what is on it: the same losses find it again.

        Raises:
            FloatingPointError: the one given, where the stage does not ask for this or it has been done too often.
        """
        rollback, skipped = self.settings.rollback, [*self.state.skipped, self.state.step]
        if rollback is None or self.keeper is None:
            raise error
        if len(skipped) > rollback.most:
            raise FloatingPointError(f"{error}; {rollback.most} batches were passed over already; {REMEDY}") from error
        self.state.optimizer.zero_grad(set_to_none=True)
        self.keeper.go_back()
        self.state.skipped = skipped
        self._warn(f"{error}: back to step {self.state.step}, to pass over the batch of step {skipped[-1]}", bar)

    def loops(self, step: int) -> int:
        """T of a step: the stage's, or drawn."""
        counts = self.settings.loop_counts
        return self.stage.loops if counts is None else sampled_loop_count(counts, self.seed + self.stage.number, step)

    def _micro_batches(self) -> Iterator[Batch]:
        first, last = self._samples(self.state.step)
        size = self.settings.micro_batch_size
        for start in range(first, last, size):
            yield batch(self.mixture, start, min(size, last - start))

    def _samples(self, step: int) -> tuple[int, int]:
        """The samples of a step: from the first to before the last."""
        origin = self.state.first_sample
        return origin + self.batches.first(step), origin + self.batches.first(step + 1)

    def _tokens(self, steps: int) -> int:
        return self.batches.first(steps) * self.settings.sequence_length

    def _seen(self) -> int:
        """Tokens of the stage's steps so far, without the batches that were passed over."""
        state = self.state
        passed = sum(self._tokens(step + 1) - self._tokens(step) for step in state.skipped if step < state.step)
        return self._tokens(state.step) - passed

    def _count_tokens(self) -> None:
        """Add the tokens of the present step to the state's counts."""
        counts = self.mixture.tokens_by_source(*self._samples(self.state.step))
        for name, tokens in counts.items():
            self.state.source_tokens[name] = self.state.source_tokens.get(name, 0) + tokens
        self.state.tokens += sum(counts.values())

    def _new_epochs(self, step: int) -> list[str]:
        """What there is to say of sources that ran dry in a step and began anew."""
        begun = self.mixture.epochs_begun(*self._samples(step))
        return [f"source {name} begins epoch {epoch}" for name, epoch in begun]

    def evaluate(self, windows: int | None) -> LoopEvaluation:
        """Loss of every loop on the validation text, or on about `windows` windows of it."""
        model = self.state.model
        loops = self.settings.evaluation_loops or model.config.total_ut_steps + 2
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(self.state.autocast)):
            return evaluate_loops(model, self.validation, loops, self.settings.micro_batch_size, windows)

    def _evaluate(self, windows: int | None, bar: Progress) -> LoopEvaluation:
        """Evaluate, write it down and save the model; a diverged model does not replace the saved one."""
        state, result = self.state, self.evaluate(windows)
        where = f"{self.stage.name}, step {state.step}"
        if not all(map(math.isfinite, result.losses[: state.model.config.total_ut_steps])):
            raise FloatingPointError(f"{where}: the validation loss by loop is {result.losses}; {REMEDY}")
        self.tracker.evaluation(
            {
                "stage": self.stage.settings.name,
                "step": state.step,
                "tokens": state.tokens,
                "loop_losses": result.losses,
                "source_losses": result.source_losses,
            }
        )
        bar.note(f"{where}: validation loss by loop  " + "  ".join(f"{loss:.3f}" for loss in result.losses))
        for warning in state.health.after_evaluation(result, state.model.config.total_ut_steps):
            self._warn(warning, bar)
        self.save(result)
        return result

    def _warn(self, warning: str, bar: Progress) -> None:
        bar.note(warning)
        self.tracker.warning({"stage": self.stage.settings.name, "step": self.state.step, "text": warning})

    def _result(self, final: LoopEvaluation) -> StageResult:
        state = self.state
        return StageResult(
            stage=self.stage.number,
            name=self.stage.settings.name,
            layers=self.stage.layers,
            loops=self.stage.loops,
            sequence_length=self.settings.sequence_length,
            parameters=self.stage.parameters,
            steps=state.step,
            tokens=self._seen(),
            minutes=state.minutes,
            compiled=self.not_compiled is None,
            autocast="bfloat16" if state.autocast else None,
            final=final,
        )


def build_optimizer(model: OuroForCausalLM, settings: StageDefaults) -> torch.optim.AdamW:
    """AdamW with decay on the matrices of the layers only."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "_proj." in n]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)

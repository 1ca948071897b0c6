"""TRL's trainer with the looped model's own objective: Stage I's expected loss, or the last loop's (Ouro section 3.3).

TRL and transformers bring the loop over the data, accumulation, schedule, adapters and checkpoints. What differs: the
loss is the model's (`OuroForCausalLM.forward`), every step is recorded with the loss of every loop and the mean depth,
and a loss that is not finite ends the run.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from looplm.objectives.expected_loss import Objective
from looplm.objectives.token_losses import IGNORED
from looplm.training.tracking import MetricsLog, Progress
from looplm.tuning.recipe import SFTRecipe
from looplm.tuning.resuming import Resumable
from looplm.tuning.rl_recipe import GRPORecipe

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "none": "constant_with_warmup"}


def shared_arguments(recipe: SFTRecipe | GRPORecipe, folder: Path) -> dict[str, Any]:
    """What both kinds of recipe mean to transformers; checkpoints go below `folder`."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.micro_batch_size,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": recipe.warmup_steps,
        "lr_scheduler_type": _SCHEDULES[recipe.decay],
        "optim": "adamw_torch",
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "use_cpu": not torch.accelerator.is_available(),
        "activation_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_total_limit": recipe.checkpoints.keep,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def training_arguments(recipe: SFTRecipe, folder: Path, bf16: bool) -> SFTConfig:
    """What a recipe means to TRL; checkpoints go below `folder`."""
    return SFTConfig(
        **shared_arguments(recipe, folder),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps or -1,
        gradient_accumulation_steps=recipe.batch_rows // recipe.micro_batch_size,
        bf16=bf16,
        save_steps=recipe.checkpoints.every_steps,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class LoopSFTTrainer(Resumable, SFTTrainer):
    """`SFTTrainer` on rows that are encoded and collated already (`looplm.tuning.conversations`).

    Args:
        objective, exit_beta: as in `OuroForCausalLM.forward`.
    """

    def __init__(self, *args: Any, objective: Objective, exit_beta: float | None, **options: Any) -> None:
        self.objective: Objective = objective
        self.exit_beta: float | None = exit_beta
        self._sums: Tensor | None = None
        super().__init__(*args, **options)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss over this part of a step, in nats a token of the whole step.

        Raises:
            FloatingPointError: it is not finite.
        """
        out = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            objective=self.objective,
            exit_beta=self.exit_beta,
            num_items_in_batch=num_items_in_batch,
            use_cache=False,
        )
        if not out.loss.isfinite():
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {out.loss.item()}; lower learning_rate "
                "and begin in another output folder"
            )
        count = (inputs["labels"][:, 1:] != IGNORED).sum()
        means = torch.cat((out.loop_losses.double(), out.expected_depth.double()[None], count.new_ones(1)))
        self._sums = means * count + (0 if self._sums is None else self._sums)
        loss = out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over processes
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """A step's record: also the loss of every loop, the mean depth and the number of its target tokens."""
        if self._sums is not None and "loss" in logs:
            *sums, tokens = self.accelerator.reduce(self._sums, "sum").tolist()
            *losses, depth = (each / max(tokens, 1) for each in sums)
            logs.update(losses=losses, expected_depth=depth, target_tokens=int(tokens))
            self._sums = None
        super().log(logs, start_time)


class Reporter(TrainerCallback):
    """Shows and writes every step."""

    def __init__(self, log: MetricsLog, bar: Progress) -> None:
        self.metrics, self.bar, self.tokens = log, bar, 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """A step is over."""
        if logs is None or "losses" not in logs:
            return
        self.tokens += logs["target_tokens"]
        self.metrics.write({"step": state.global_step, **logs})
        self.bar.update(state.global_step / state.max_steps, self.tokens, logs["losses"][-1], logs["expected_depth"])

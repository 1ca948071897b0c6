"""Reinforcement learning with verifiable rewards from a recipe (after Ouro section 4.5): a tuned model folder out.

The output folder holds `model/` (for an adapter: merged), `adapter/` where one was trained, report.json with the
held-out outcomes before and after, metrics.jsonl with every step, recipe.yaml and checkpoints. Started again, a run
goes on from its last whole checkpoint, and draws what it would have drawn.

Everything runs in the model's own dtype, fp32 for all weights: rollout and learner are to have the same arithmetic.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from looplm.files import public_name, save_folder, write_json, write_text
from looplm.model.loading import load_config, load_model
from looplm.model.modeling import OuroForCausalLM
from looplm.model.saving import Provenance, write_model
from looplm.training.resume import RunLock, StopSignal
from looplm.training.tracking import MetricsLog, Progress
from looplm.tuning.environments import Environment, open_environment
from looplm.tuning.grpo_trainer import LoopGRPOTrainer
from looplm.tuning.held_out import HeldOut, measure_held_out, prompt_ids
from looplm.tuning.lora import adapter_config, keep_adapter, weights_digest
from looplm.tuning.resuming import Keeper, check_folder, finished, resume_point
from looplm.tuning.rewards import Rewards
from looplm.tuning.rl_recipe import GRPORecipe
from looplm.tuning.rollouts import Drawing

DULL = 5
"""Rollouts in a row without any signal, after which a run says what could be done."""


@dataclass
class Work:
    """A run while it goes on."""

    recipe: GRPORecipe
    folder: Path
    model: OuroForCausalLM
    tokenizer: PreTrainedTokenizerBase
    environment: Environment
    prompts: list[list[int]]
    adapter: LoraConfig | None
    base_digest: str
    dtype: torch.dtype
    drawing: Drawing

    def held_out(self, rewards: Rewards, loops: int | None = None) -> HeldOut:
        """With the mode's own depths, or all positions at `loops`."""
        drawing = replace(self.drawing, temperature=0.0)
        drawing = drawing if loops is None else replace(drawing, depth=None, loops=loops)
        problems = self.environment.test[: self.recipe.held_out.problems]
        return measure_held_out(self.model, self.tokenizer, problems, rewards, drawing)


def reinforce(recipe: GRPORecipe) -> dict[str, Any]:
    """Carry a recipe out, or go on with it.

    Returns:
        The report, which is report.json: `before` and `after` on held-out problems (and `by_loops`, with
        `held_out.loops`), `agreement`, the largest difference of learner and rollout, `rollouts`, `problems`.

    Raises:
        ValueError: a recipe that does not fit the model or the environment, or a folder with another recipe's run.
        FloatingPointError: a loss that is not finite.
        Stopped: that was asked for (SIGTERM); the state is saved.
    """
    folder = Path(recipe.output)
    with RunLock(folder) as lock, StopSignal() as stop:
        check_folder(recipe, folder)
        if (report := finished(folder)) is not None:
            return report
        work = _begin(recipe, folder)
        with Rewards(recipe.rewards, work.environment) as rewards, MetricsLog(folder / "metrics.jsonl") as log:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take()
            write_text(folder / "recipe.yaml", recipe.to_yaml())
            before = _before(work, rewards)
            _train(work, rewards, log, stop)
            return _finish(work, rewards, before)


def _begin(recipe: GRPORecipe, folder: Path) -> Work:
    """Load everything and refuse what cannot work, before anything is written."""
    config = load_config(recipe.model)
    if config.exit_gate_pooling != "token":
        raise ValueError(f"exit_gate_pooling of {recipe.model} is {config.exit_gate_pooling!r}; rollouts need 'token'")
    loops = recipe.depth.loops or config.total_ut_steps
    if recipe.depth.min_loops > loops:
        raise ValueError(f"depth.min_loops is {recipe.depth.min_loops}; the model goes to {loops}: give at most that")
    environment = open_environment(recipe.environment)
    adapter = None if recipe.lora is None else adapter_config(recipe.lora, config)
    model, tokenizer = load_model(recipe.model, None if adapter else torch.float32)
    prompts = [prompt_ids(problem, tokenizer) for problem in environment.train]
    longest, room = max(map(len, prompts)), config.max_position_embeddings - recipe.max_new_tokens
    if longest > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens and max_new_tokens is {recipe.max_new_tokens}, but the context "
            f"of {recipe.model} holds {config.max_position_embeddings}: lower max_new_tokens, or drop long prompts"
        )
    cast("Any", model).to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return Work(
        recipe=recipe,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        environment=environment,
        prompts=prompts,
        adapter=adapter,
        base_digest="" if adapter is None else weights_digest(model),
        dtype=cast("torch.dtype", config.dtype or torch.float32),
        drawing=Drawing(
            recipe.depth, loops, recipe.temperature, recipe.max_new_tokens, int(recipe.kv_gigabytes * 2**30)
        ),
    )


def _before(work: Work, rewards: Rewards) -> dict[str, Any]:
    """Measured once, and read again where a run goes on."""
    file = work.folder / "before.json"
    if not file.is_file():
        write_json(file, _measure(work, rewards))
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def _measure(work: Work, rewards: Rewards) -> dict[str, Any]:
    by_loops = {str(loops): asdict(work.held_out(rewards, loops)) for loops in work.recipe.held_out.loops}
    return {**asdict(work.held_out(rewards)), "by_loops": by_loops}


def _train(work: Work, rewards: Rewards, log: MetricsLog, stop: StopSignal) -> None:
    """Tune the model of `work` from the last whole checkpoint on; an adapter is saved and merged."""
    recipe, checkpoints = work.recipe, work.folder / "checkpoints"
    found, each = resume_point(checkpoints, log), recipe.updates * recipe.epochs
    reference = None
    if recipe.kl and work.adapter is None:
        reference = load_model(recipe.model, torch.float32)[0].eval()
        cast("Any", reference).to(work.model.device)

    def before_rollout(number: int) -> None:
        every = recipe.held_out.every_steps
        if every and number and number % every == 0:
            now = work.held_out(rewards)
            log.write({"held_out": {"rollout": number, "outcome": now.outcome, "mean_depth": now.mean_depth}})

    with Progress(1.0, "learning") as bar:
        trainer = LoopGRPOTrainer(
            work.model,
            recipe,
            checkpoints,
            tokenizer=work.tokenizer,
            problems=work.environment.train,
            prompts=work.prompts,
            rewards=rewards,
            drawing=work.drawing,
            reference=reference,
            before_rollout=before_rollout,
            callbacks=[Teller(log, bar), Keeper(log, stop, each)],
            peft_config=work.adapter,
        )
        trainer.go_on(found, bar)
    if work.adapter is not None:
        keep_adapter(work.folder / "adapter", cast("PeftModel", trainer.model), recipe.model, work.base_digest)
    cast("Any", work.model).eval()


class Teller(TrainerCallback):
    """Shows and writes every step, and says what could be done where nothing can be learnt."""

    def __init__(self, log: MetricsLog, bar: Progress) -> None:
        self.metrics, self.bar, self.tokens, self.dull = log, bar, 0.0, 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        """A step is over; only the first one of a rollout has its rewards."""
        if logs is None or "loss" not in logs:
            return
        self.metrics.write({"step": state.global_step, **logs})
        if "reward" not in logs:
            return
        self.tokens += logs["tokens"]
        self.dull = self.dull + 1 if logs["groups_without_signal"] == 1 else 0
        if self.dull == DULL:
            self.bar.note(
                f"no group of the last {DULL} rollouts has both better and worse samples, so nothing is learnt: "
                "take easier (or harder) problems, more samples, a higher temperature, or more supervised tuning first"
            )
        for fault in logs.get("faults", ()):
            self.bar.note(fault)
        done = state.global_step / state.max_steps
        self.bar.update(done, int(self.tokens), depth=logs["mean_depth"], reward=logs["reward"])


def _finish(work: Work, rewards: Rewards, before: dict[str, Any]) -> dict[str, Any]:
    """Measure, save the model and write the report."""
    recipe, after = work.recipe, _measure(work, rewards)
    lines = (work.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "step" in record]
    agreement = {
        name: max((step[name] for step in steps if name in step), default=None)
        for name in ("token_difference", "exit_difference")
    }
    report = {
        "model": recipe.model,
        "mode": recipe.depth.mode,
        "loops": work.drawing.loops,
        "rollouts": recipe.steps,
        "problems": {"train": len(work.environment.train), "held_out": len(before["outcomes"])},
        "agreement": agreement,
        "before": before,
        "after": after,
    }
    base = public_name(recipe.model)
    what = "all weights" if work.adapter is None else f"an adapter of rank {work.adapter.r}, merged"
    origin = (
        f"Reinforcement learning by looplm of {base}: {recipe.algorithm.upper()} with depths of mode "
        f"{recipe.depth.mode}, {what}, {recipe.steps} rollouts on {work.environment.name}."
    )

    def write(path: Path) -> None:
        write_model(path, cast("Any", work.model).to(work.dtype), work.tokenizer, Provenance(origin))
        write_text(path / "recipe.yaml", recipe.to_yaml())

    save_folder(work.folder / "model", write)
    write_json(work.folder / "report.json", report)
    found: dict[str, Any] = json.loads((work.folder / "report.json").read_text("utf-8"))
    return found

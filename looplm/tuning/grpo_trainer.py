"""TRL's GRPO trainer with depths: rollouts by the engine, a learner that replays them (after Ouro section 4.5).

TRL and transformers bring prompts in groups, the reuse of a rollout over several updates, accumulation, optimizer,
schedule, adapters and checkpoints. What differs is what a rollout is and what the loss of its rows is: both are this
package's (`rollouts`, `replay`, `policy`), because a sample has depths, and its exits have probabilities.
One process only: the groups of a rollout are not shared out.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from looplm.model.modeling import OuroForCausalLM
from looplm.tuning.policy import (
    Actions,
    changed_depths,
    depth_penalty,
    k3,
    normalised,
    overlong_penalty,
    surrogate,
    visited_gate_entropy,
    with_signal,
)
from looplm.tuning.problems import Problem
from looplm.tuning.replay import Replay, ratio_free_loss, replay
from looplm.tuning.resuming import Resumable
from looplm.tuning.rewards import Rewards
from looplm.tuning.rl_recipe import GRPORecipe
from looplm.tuning.rollouts import Drawing, Rows, Sample, roll_out
from looplm.tuning.trainer import shared_arguments

RATIO_FREE = ("per-loop", "paper-off-policy")
"""Modes whose loss has no ratios."""


def grpo_arguments(recipe: GRPORecipe, folder: Path) -> GRPOConfig:
    """What a recipe means to TRL; checkpoints go below `folder`."""
    rows, each = recipe.prompts * recipe.samples, recipe.updates * recipe.epochs
    return GRPOConfig(
        **shared_arguments(recipe, folder),
        max_steps=recipe.steps * each,
        gradient_accumulation_steps=rows // (recipe.micro_batch_size * recipe.updates),
        steps_per_generation=rows // recipe.micro_batch_size,
        num_iterations=recipe.epochs,
        num_generations=recipe.samples,
        max_completion_length=recipe.max_new_tokens,
        beta=0.0,  # the reference is ours, as it has depths too
        bf16=False,
        save_steps=recipe.checkpoints.every_steps * each,  # never between the updates of one rollout
    )


class LoopGRPOTrainer(Resumable, GRPOTrainer):
    """GRPO and DAPO in the depth modes of `looplm.tuning.rl_recipe.DepthSettings`.

    Args:
        model: tuned in place.
        problems, prompts: what is asked, and the ids of each prompt.
        rewards: scores samples.
        drawing: how samples are drawn.
        reference: what the KL is taken to; None where an adapter is left off instead, or no KL is asked for.
        before_rollout: called with the number of each rollout, counted from 0.
    """

    def __init__(
        self,
        model: OuroForCausalLM,
        recipe: GRPORecipe,
        folder: Path,
        *,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Problem],
        prompts: Sequence[list[int]],
        rewards: Rewards,
        drawing: Drawing,
        reference: OuroForCausalLM | None,
        before_rollout: Callable[[int], None],
        **options: Any,
    ) -> None:
        self.recipe, self.base, self.drawing = recipe, model, drawing
        self.problems, self.prompts, self.rewards = problems, prompts, rewards
        self.reference, self.before_rollout = reference, before_rollout
        self.record: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []
        self._fresh = -1
        numbers = range(len(problems))
        super().__init__(
            model,
            reward_funcs=[_unused],
            args=grpo_arguments(recipe, folder),
            train_dataset=Dataset.from_dict({"prompt": [str(n) for n in numbers], "number": list(numbers)}),
            processing_class=tokenizer,
            **options,
        )
        if self.accelerator.num_processes > 1:
            raise ValueError("looplm grpo runs in one process; start it without a launcher")
        model.__dict__.pop("forward", None)  # TRL's own way through the head, which nothing here takes
        model.model.detached_gate = recipe.depth.exit_gradients == "gate"

    @property
    def rollout(self) -> int:
        """The number of the rollout that is drawn or learnt from, counted from 0."""
        return self.state.global_step // (self.recipe.updates * self.recipe.epochs)

    # --- rollouts ---

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Samples for a whole rollout, as tensors with one row a sample (TRL shuffles and splits them)."""
        self.before_rollout(self.rollout)
        numbers = [int(row["number"]) for row in inputs[:: self.recipe.samples]]
        groups, tried = self._groups(numbers, 0), len(numbers)
        for attempt in range(1, 1 + self.recipe.redraws if self.recipe.dynamic_sampling else 1):
            dull = [n for n, group in enumerate(groups) if not group.signal]
            if not dull:
                break
            others = random.Random(f"{self.recipe.seed}/{self.rollout}/{attempt}").choices(
                range(len(self.problems)), k=len(dull)
            )
            tried += len(dull)
            for place, group in zip(dull, self._groups(others, attempt), strict=True):
                groups[place] = group
        self._note_groups(groups, tried)
        return self._batch(groups)

    def _groups(self, numbers: list[int], attempt: int) -> list["Group"]:
        """`samples` answers to each of some problems, scored."""
        count = self.recipe.samples
        asked = [number for number in numbers for _ in range(count)]
        draw = random.Random(f"{self.recipe.seed}/{self.rollout}/{attempt}/seeds")
        seeds = [draw.randrange(2**62) for _ in asked]
        samples = roll_out(self.base, [self.prompts[n] for n in asked], seeds, self.drawing)
        texts = self._tokenizer.batch_decode([s.tokens for s in samples], skip_special_tokens=True)
        scores = self.rewards([self.problems[n] for n in asked], texts, [s.tokens for s in samples])
        self.faults += scores.faults
        parts = [slice(start, start + count) for start in range(0, len(asked), count)]
        return [Group(samples[part], scores.totals[part], scores.outcomes[part]) for part in parts]

    def _batch(self, groups: list["Group"]) -> dict[str, Tensor]:
        """Rows, advantages and the share of each target in the loss of its update."""
        recipe, samples = self.recipe, [sample for group in groups for sample in group.samples]
        rows = Rows.of(samples)
        totals = torch.tensor([group.totals for group in groups], dtype=torch.float64)
        lengths = rows.acts.sum(1)
        late = overlong_penalty(lengths, recipe.max_new_tokens, recipe.overlong_buffer).view(totals.shape)
        worth = normalised(totals + late).float().flatten()[:, None].expand(rows.ids.shape)
        if recipe.depth.cost:
            penalty = depth_penalty(rows.depths * rows.exits, rows.acts, recipe.samples, recipe.depth.cost)
            worth = worth - penalty * totals.isfinite().flatten()[:, None]
        if recipe.token_level:
            share = rows.acts / (rows.acts.sum() / recipe.updates)
        else:
            share = rows.acts / (lengths[:, None] * (len(samples) / recipe.updates))
        self._fresh = self.state.global_step
        named = {field.name: getattr(rows, field.name) for field in fields(rows)}
        batch = {**named, "advantages": worth * rows.acts, "share": share.float()}
        return {name: value.to(self.accelerator.device) for name, value in batch.items()}

    def _note_groups(self, groups: list["Group"], tried: int) -> None:
        """What a rollout is recorded with."""
        samples = [sample for group in groups for sample in group.samples]
        outcomes = torch.tensor([group.outcomes for group in groups]).flatten()
        totals = torch.tensor([group.totals for group in groups]).flatten()
        depths = torch.tensor([sum(s.loops) / len(s.loops) for s in samples])
        lengths = torch.tensor([float(len(s.tokens)) for s in samples])
        note, right = self.record, outcomes >= 0.5
        note["reward"].append(totals.nanmean().item())
        note["outcome"].append(outcomes.nanmean().item())
        note["mean_depth"].append((depths * lengths).sum().item() / lengths.sum().item())
        for name, chosen in (("right", right), ("wrong", ~right)):
            if bool(chosen.any()):
                note[f"depth_{name}"].append(depths[chosen].mean().item())
        note["length"].append(lengths.mean().item())
        note["cut_short"].append(1 - sum(s.ended for s in samples) / len(samples))
        note["groups_without_signal"].append(sum(not group.signal for group in groups) / len(groups))
        note["groups_tried"].append(float(tried))
        note["not_scored"].append((~totals.isfinite()).float().mean().item())
        note["tokens"].append(lengths.sum().item())

    # --- the learner ---

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of some rows; the shares of all rows of an update sum to 1."""
        rows = Rows(**{field.name: inputs[field.name] for field in fields(Rows)})
        advantages, share = inputs["advantages"], inputs["share"]
        if self.recipe.depth.mode in RATIO_FREE:
            loss, tokens = ratio_free_loss(
                self.base,
                rows,
                advantages * share,
                self.recipe.depth,
                temperature=self.recipe.temperature,
                max_loops=self.drawing.loops,
            )
            self._note_agreement(Actions(tokens, torch.zeros_like(tokens)), rows)
        else:
            now = self._replay(self.base, rows)
            self._note_agreement(now.actions, rows)
            loss = self._ratio_loss(now, rows, advantages, share)
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"rollout {self.rollout + 1}: the loss is {loss.item()}; lower learning_rate "
                "and begin in another output folder"
            )
        return loss

    def _ratio_loss(self, now: Replay, rows: Rows, advantages: Tensor, share: Tensor) -> Tensor:
        recipe, old = self.recipe, Actions(rows.old_tokens, rows.old_exits)
        actions = now.actions
        if recipe.depth.mode != "sampled":  # exits follow from a rule, and no gradient reaches the gate
            actions = Actions(actions.tokens, old.exits)
        assert recipe.clip_high is not None
        value = surrogate(actions, old, advantages, recipe.clip_low, recipe.clip_high, recipe.depth.ratio)
        loss = -(share * value).sum()
        self._note_policy(now, actions, old, rows)
        if recipe.kl:
            divergence = k3(actions.joint, self._reference(rows, old))
            self.record["kl"].append((share * divergence).sum().item())
            loss = loss + recipe.kl * (share * divergence).sum()
        if recipe.depth.mode in ("sampled", "adaptive"):
            entropy = self._gate_entropy(now, rows)
            self.record["gate_entropy"].append(entropy.sum().item() / max(rows.exits.sum().item(), 1))
            if recipe.depth.gate_entropy:
                loss = loss - recipe.depth.gate_entropy * (share * entropy).sum()
        return loss

    def _replay(self, model: OuroForCausalLM, rows: Rows) -> Replay:
        limits = {"min_loops": self.recipe.depth.min_loops, "max_loops": self.drawing.loops}
        return replay(model, rows, temperature=self.recipe.temperature, **limits)

    @torch.no_grad()
    def _reference(self, rows: Rows, old: Actions) -> Tensor:
        """Log-probabilities by the model that the run began with, at the same depths."""
        bare = self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        with bare:
            found = self._replay(self.reference or self.base, rows).actions
        return found.joint if self.recipe.depth.mode == "sampled" else Actions(found.tokens, old.exits).joint

    def _gate_entropy(self, now: Replay, rows: Rows) -> Tensor:
        least = self.recipe.depth.min_loops
        return visited_gate_entropy(now.gate_logits, rows.depths * rows.exits, least, self.drawing.loops)

    # --- records ---

    @torch.no_grad()
    def _note_agreement(self, now: Actions, rows: Rows) -> None:
        """How far the learner is from the rollout, while both have the same weights."""
        if self.state.global_step != self._fresh:
            return
        self.record["max:token_difference"].append((now.tokens - rows.old_tokens).abs().max().item())
        if self.recipe.depth.mode == "sampled":
            self.record["max:exit_difference"].append((now.exits - rows.old_exits).abs().max().item())

    @torch.no_grad()
    def _note_policy(self, now: Replay, actions: Actions, old: Actions, rows: Rows) -> None:
        depth, targets, exits = self.recipe.depth, rows.acts.sum().item(), max(rows.exits.sum().item(), 1)
        self.record["entropy"].append(now.entropy.sum().item() / targets)
        moved = (actions.joint - old.joint).exp()
        outside = (moved < 1 - self.recipe.clip_low) | (moved > 1 + cast(float, self.recipe.clip_high))
        self.record["outside_clip"].append((outside & rows.acts).sum().item() / targets)
        if depth.exit_threshold is not None:
            recorded, limits = rows.depths * rows.exits, (depth.min_loops, self.drawing.loops)
            changed = changed_depths(now.gate_logits, recorded, depth.exit_threshold, *limits)
            self.record["depths_changed"].append(changed.sum().item() / exits)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """A step's record: means, but for what is named by its largest."""
        for name, values in self.record.items():
            largest, mean = max(values), sum(values) / len(values)
            logs[name.removeprefix("max:")] = largest if name.startswith("max:") else mean
        if self.record and self.faults:
            logs["faults"], self.faults = self.faults[:3], []
        self.record.clear()
        self._metrics["train"].clear()
        super().log(logs, start_time)


class Group:
    """The samples of a prompt and what they are worth."""

    def __init__(self, samples: list[Sample], totals: list[float], outcomes: list[float]) -> None:
        self.samples, self.totals, self.outcomes = samples, totals, outcomes
        self.signal = bool(with_signal(torch.tensor([outcomes]))[0])


def _unused(**_: Any) -> list[float | None]:
    raise RuntimeError("rewards are not TRL's")

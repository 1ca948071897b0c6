"""One run: the package's own model and training step over a task's batches, scored after every loop.

Item counts, not tokens, are what arms are paired by: runs with the same task and seed see the same items in the same
order, whatever their shape, and those of more steps only see more. Scores are exact matches on held-out items, greedy.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.init import constant_, normal_

from looplm.exits import exit_probabilities
from looplm.lab.frontier import frontier_rows
from looplm.lab.settings import RunSettings, flops
from looplm.lab.tasks import Batch, Task
from looplm.lab.tasks.capo import Capo
from looplm.model.modeling import OuroForCausalLM
from looplm.training.acceleration import compile_layers
from looplm.training.gradients import accumulate
from looplm.training.loop_counts import sampled_loop_count
from looplm.training.planning import new_config
from looplm.training.schedule import exit_beta, learning_rate
from looplm.training.trainer import build_optimizer

Row = dict[str, Any]
Report = Callable[[int], None]
LOOKED_AT = 256
"""Validation items, of all levels let in, by which the hardest counts as solved."""


def build_model(settings: RunSettings, task: Task) -> OuroForCausalLM:
    """The model as it begins: matrices at 1 / sqrt(D), small gains after the sublayers, embeddings as asked for."""
    shape = settings.model(task)
    torch.manual_seed(settings.seed)
    config = new_config(
        shape,
        len(task.vocabulary),
        exit_prior=settings.exit_prior,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = OuroForCausalLM(config)
    normal_(model.model.embed_tokens.weight, std=settings.embedding_std)
    constant_(model.model.early_exit_gate.bias, shape.gate_bias)
    for name, gain in model.named_parameters():
        if name.endswith("layernorm_2.weight"):
            constant_(gain, shape.post_norm_gain)
    return model


def run(
    settings: RunSettings,
    report: Report = lambda steps: None,
    trained: Callable[[OuroForCausalLM], None] = lambda model: None,
) -> list[Row]:
    """Train and score; a loss that is not finite ends the training, and the weights before it are scored.

    Args:
        settings: of the run.
        report: told the number of steps done, now and then.
        trained: given the model at the end, to keep it.

    Returns: rows as in `looplm.lab.results`, without what is the same for all rows of a run and known to the caller.
    Raises ValueError where the task or its settings cannot be.
    """
    began, cpu = int(time.time()), time.process_time()
    task = settings.make_task()
    stage, model = settings.stage(task), build_model(settings, task)
    optimizer = build_optimizer(model, stage)
    compile_layers(model, "auto")
    due = {round(settings.steps * (n + 1) / settings.evaluations) for n in range(settings.evaluations)}
    step_flops = cache(lambda loops: 3 * flops(settings, loops) * settings.batch * task.length)
    rows, spent, diverged, curriculum = [], 0.0, False, Curriculum(settings, task)
    for step in range(settings.steps):
        progress, loops = step / settings.steps, settings.loops
        if settings.loop_counts is not None:
            loops = sampled_loop_count(settings.loop_counts, settings.seed, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step, progress)
        beta = exit_beta(progress, stage.exit_beta_start, stage.exit_beta_hold, stage.exit_beta)
        hardest = curriculum.hardest(step, lambda level: level_score(model, settings, task, level))
        batch = tensors(task.batch(settings.seed, step, settings.batch, "train", hardest))
        values = accumulate(model, [batch], stage, beta, loops, autocast=False)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip).item()
        diverged = not (math.isfinite(values.loss) and math.isfinite(norm))
        spent += step_flops(loops)
        if not diverged:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if diverged or step + 1 in due:
            rows += [{"step": step + 1, "flops": spent, **row} for row in evaluate(model, settings, task)]
        if diverged:
            break
        if step % 10 == 9:
            report(step + 1)
    if settings.frontier is not None and not diverged:
        fitting = (tensors(task.batch(settings.seed, n, settings.batch)) for n in itertools.count(settings.steps))
        found = frontier_rows(model, settings, task, fitting, list(held_out(settings, task)))
        rows += [{"step": step + 1, "flops": spent, **row} for row in found]
    trained(model)
    whole = {
        "diverged": diverged,
        "parameters": sum(p.numel() for p in model.parameters()),
        "began": began,
        "cpu_seconds": time.process_time() - cpu,
    }
    return [{**row, **whole} for row in rows]


class Curriculum:
    """Lets in one level after the other: after so many steps each, or as soon as the hardest one is seen to be solved.

    In the second case arms see the same items only as long as they are at the same level.
    """

    def __init__(self, settings: RunSettings, task: Task) -> None:
        self.every, self.least = settings.curriculum, settings.curriculum_score
        self.levels = sorted(task.levels("train"))
        self.open = 1

    def hardest(self, step: int, score: Callable[[int], float]) -> int | None:
        """The highest level of a step's items; None without a curriculum. To be asked at every step.

        Args:
            step: from 0.
            score: the share of right answers at a level as things stand.
        """
        if self.every is None:
            return None
        if step and step % self.every == 0 and self.open < len(self.levels):
            self.open += self.least is None or score(self.levels[self.open - 1]) >= self.least
        return self.levels[self.open - 1]


def level_score(model: OuroForCausalLM, settings: RunSettings, task: Task, level: int) -> float:
    """The share of right answers after the last loop on validation items of one level."""
    right = []
    for index in range(math.ceil(LOOKED_AT / settings.batch)):
        batch = task.batch(settings.seed, index, settings.batch, "validation", level)
        found = _answers(model, settings, task, batch, tensors(batch))["score"][:, settings.loops - 1]
        right.append(found[batch["difficulty"] == level])
    return float(np.concatenate(right).mean())


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as the training step takes it; the task's targets stand where they are predicted, as its labels do."""
    places = np.broadcast_to(np.arange(batch["tokens"].shape[1]), batch["tokens"].shape).copy()
    named = {"input_ids": batch["tokens"], "labels": batch["targets"], "position_ids": places}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def evaluate(model: OuroForCausalLM, settings: RunSettings, task: Task) -> Iterator[Row]:
    """Score, loss and exit probability of held-out items by loop and difficulty; of Capo, bits a parameter.

    The exit distribution is that of the loops trained, whatever is scored (equation 3), so it is missing beyond.
    """
    found: list[dict[str, np.ndarray]] = []
    for batch, inputs in held_out(settings, task):
        found.append({"difficulty": batch["difficulty"], **_answers(model, settings, task, batch, inputs)})
    whole = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    parameters = sum(p.numel() for p in model.parameters())
    for level in np.unique(whole["difficulty"]):
        here = whole["difficulty"] == level
        mean = {name: array[here].mean(axis=0) for name, array in whole.items()}
        for loop in range(1, (settings.evaluation_loops or settings.loops) + 1):
            row: Row = {"loop": loop, "difficulty": int(level), "items": int(here.sum())}
            row |= {name: float(mean[name][loop - 1]) for name in ("score", "loss")}
            row["exit_probability"] = float(mean["mass"][loop - 1]) if loop <= settings.loops else None
            if isinstance(task, Capo):
                bits = task.bits(float(mean["name_nats"][loop - 1]), float(mean["nats"][loop - 1]))
                row["bits_per_parameter"] = bits / parameters
            yield row


def held_out(settings: RunSettings, task: Task) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
    """The batches that are scored, and the same as the model takes them."""
    for index in range(math.ceil(settings.evaluation_items / settings.batch)):
        batch = task.batch(settings.seed, index, settings.batch, settings.split)
        yield batch, tensors(batch)


def _answers(
    model: OuroForCausalLM, settings: RunSettings, task: Task, batch: Batch, inputs: dict[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Of each row and loop (B, loops): exact match, mean and sum of the losses of graded targets; exit mass (B, T).

    Gradients stay on: the compiled layers of training serve as they are. Nothing is kept of the graph.
    """
    trained = settings.loops
    out = model(
        inputs["input_ids"],
        shift_labels=inputs["labels"],
        position_ids=inputs["position_ids"],
        num_loop_steps=max(settings.evaluation_loops or trained, trained),
        skip_logits=True,
        output_hidden_states=True,
    )
    graded = torch.from_numpy(batch["answer"])[..., None]
    count = graded.sum(1).clamp(min=1)
    with torch.no_grad():
        right = [task.score(model.lm_head(state).argmax(-1).numpy(), batch) for state in out.hidden_states[1:]]
        nats = (out.token_losses * graded).sum(1)
        mass = (exit_probabilities(out.gate_logits[..., :trained]) * graded).sum(1) / count
        found = {"score": np.stack(right, axis=1), "loss": (nats / count).numpy(), "mass": mass.numpy()}
        if "names" in batch:
            names = torch.from_numpy(batch["names"])[..., None]
            found |= {"nats": nats.numpy(), "name_nats": (out.token_losses * names).sum(1).numpy()}
    return found

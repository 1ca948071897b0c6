"""`looplm data prepare`: the sources of a recipe to token files, once."""

from typing import Annotated, Literal

from tyro.conf import Positional, arg


def data(
    action: Annotated[Positional[Literal["prepare"]], arg(help="tokenise every source into the recipe's data folder")],
    recipe: Annotated[Positional[str], arg(help="a YAML recipe (looplm/recipes has examples)")],
    output: Annotated[str | None, arg(help="output folder of the run, instead of the recipe's")] = None,
    workers: Annotated[int | None, arg(help="processes that encode (default: one a core)")] = None,
    anew: Annotated[bool, arg(help="replace prepared sources that no longer match the recipe")] = False,
) -> None:
    """Tokenise the sources of a recipe, once; stopped at any moment, it goes on where it was.

    `looplm train` does the same for what is not prepared yet. What is held out for validation is part of it.
    """
    from looplm.training.recipe import load_recipe

    settings = load_recipe(recipe)
    if output is not None:
        settings = settings.model_copy(update={"output": output})

    from rich.console import Console

    from looplm.training.preparation import source_table
    from looplm.training.run import data_folder, prepare_data, recipe_tokenizer

    tokenizer = recipe_tokenizer(settings)
    prepared = prepare_data(settings, tokenizer, workers=workers, anew=anew)
    console = Console()
    console.print(source_table(prepared.sources))
    console.print(f"data    {data_folder(settings)}", markup=False, highlight=False, soft_wrap=True)

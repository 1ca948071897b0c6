"""`looplm sft`, `looplm grpo`, `looplm merge`: tuning by example and by reward, and an adapter put into its model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from looplm.files import public_name

if TYPE_CHECKING:
    from rich.table import Table


def sft(
    recipe: Annotated[Positional[str], arg(help="a YAML recipe (looplm/recipes/sft-cpu.yaml is an example)")],
    output: Annotated[str | None, arg(help="folder to write to, instead of the recipe's")] = None,
) -> None:
    """Tune a model on conversations; started again, it goes on from its last checkpoint."""
    from looplm.tuning.recipe import load_sft_recipe

    settings = load_sft_recipe(recipe)
    if output is not None:
        settings = settings.model_copy(update={"output": output})
    _need_libraries()

    from rich.console import Console

    from looplm.training.resume import Stopped
    from looplm.tuning.sft import tune

    try:
        report = tune(settings)
    except Stopped as stopped:
        print(stopped)
        return
    console = Console()
    console.print(_before_after(report))
    if report["gate"] is not None:
        from looplm.training.summary import comparison_table

        console.print(comparison_table("recalibration", report["gate"]))
    counts = ", ".join(f"{name} {count}" for name, count in report["conversations"].items() if count)
    folder = Path(settings.output)
    lines = [f"conversations  {counts}", f"model    {folder / 'model'}"]
    lines += [f"adapter  {folder / 'adapter'}"] if settings.lora is not None else []
    lines.append(f"report   {folder / 'report.json'}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def grpo(
    recipe: Annotated[Positional[str], arg(help="a YAML recipe (looplm/recipes/grpo-cpu.yaml is an example)")],
    output: Annotated[str | None, arg(help="folder to write to, instead of the recipe's")] = None,
) -> None:
    """Tune a model by verifiable rewards, at fixed, adaptive or sampled depths; started again, it goes on."""
    _need_libraries()

    from looplm.tuning.rl_recipe import load_grpo_recipe

    settings = load_grpo_recipe(recipe)
    if output is not None:
        settings = settings.model_copy(update={"output": output})

    from rich.console import Console

    from looplm.training.resume import Stopped
    from looplm.tuning.grpo import reinforce

    try:
        report = reinforce(settings)
    except Stopped as stopped:
        print(stopped)
        return
    console = Console()
    console.print(_rewarded(report))
    folder = Path(settings.output)
    lines = [f"largest difference of learner and rollout: {_agreement(report)}", f"model    {folder / 'model'}"]
    lines += [f"adapter  {folder / 'adapter'}"] if settings.lora is not None else []
    lines.append(f"report   {folder / 'report.json'}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def merge(
    adapter: Annotated[
        Positional[str], arg(metavar="ADAPTER", help="an adapter folder, as `looplm sft` or PEFT saved it")
    ],
    output: Annotated[str, arg(help="folder for the merged model")],
    model: Annotated[str | None, arg(help="the model it was trained on; without: the one the adapter names")] = None,
) -> None:
    """Add an adapter's weights to its model's, and save a model folder of its own."""
    _need_libraries()

    from looplm.model.loading import load_model
    from looplm.model.saving import Provenance, require_new_folder, save_model
    from looplm.tuning.lora import base_of, merge_adapter

    require_new_folder(output)
    base = model or base_of(adapter)
    looped, tokenizer = load_model(base)
    merged = merge_adapter(adapter, looped)
    origin = f"The adapter {public_name(adapter)} merged by looplm into {public_name(base)}."
    save_model(output, merged, tokenizer, Provenance(origin))
    print(f"model   {output}")


def _need_libraries() -> None:
    """Raises ValueError where the libraries of tuning are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("peft", "trl") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed, which tuning needs: pip install 'looplm[tuning]'")


def _before_after(report: dict[str, Any]) -> "Table":
    """Loss of every loop before and after, and the mean depth of the exit distribution."""
    from rich.table import Table

    trained = report["trained_loops"]
    table = Table(title=f"nats a token of the assistant, {report['measured_tokens']:,} held-out tokens")
    for heading in ("loop", "before", "after"):
        table.add_column(heading, justify="right")
    for loop, losses in enumerate(zip(report["before"]["losses"], report["after"]["losses"], strict=True), start=1):
        name = str(loop) if loop <= trained else f"{loop} (beyond training)"
        table.add_row(name, *(f"{loss:.4f}" for loss in losses), end_section=loop == len(report["after"]["losses"]))
    sides = (report["before"]["exit_probabilities"], report["after"]["exit_probabilities"])
    depths = [sum(loop * p for loop, p in enumerate(side, start=1)) for side in sides]
    table.add_row("expected depth", *(f"{depth:.2f}" for depth in depths))
    return table


def _rewarded(report: dict[str, Any]) -> "Table":
    """Outcome, depth and length on held-out problems, before and after."""
    from rich.table import Table

    table = Table(title=f"{report['problems']['held_out']:,} held-out problems, mode {report['mode']}")
    for heading in ("loops", "outcome before", "after", "mean loops before", "after", "tokens before", "after"):
        table.add_column(heading, justify="right")
    before, after = report["before"], report["after"]
    rows = [("the mode's", before, after)]
    rows += [(loops, found, after["by_loops"][loops]) for loops, found in before["by_loops"].items()]
    for name, *sides in rows:
        cells = [f"{side[key]:{form}}" for key, form in _SHOWN for side in sides]
        table.add_row(name, *cells)
    return table


_SHOWN = (("outcome", ".3f"), ("mean_depth", ".2f"), ("length", ".1f"))


def _agreement(report: dict[str, Any]) -> str:
    found = {name.removesuffix("_difference"): value for name, value in report["agreement"].items()}
    return ", ".join(f"{name} {value:.1e}" for name, value in found.items() if value is not None) or "not measured"

"""`looplm study ...`: the paper's studies on a model of one's own; each writes JSON, a figure and a table."""

from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from looplm.commands.behaviour import faithfulness, safety
from looplm.commands.depth_studies import exit_frontier, kv_sharing, perplexity


def depth_sweep(
    model: Annotated[Positional[str], arg(metavar="MODEL", help="a model folder or hub name")],
    tasks: Annotated[tuple[str, ...], arg(help="as in `looplm eval`; also separated by commas")],
    loops: Annotated[str, arg(help="1..8, or 1,2,4: beyond the trained depth too")] = "1..8",
    limit: Annotated[int | None, arg(help="items of each task at most")] = None,
    num_fewshot: Annotated[int | None, arg(help="examples before each question (default: the task's)")] = None,
    chat_template: Annotated[bool, arg(help="wrap questions in the model's chat template")] = False,
    batch_size: Annotated[int | None, arg(help="rows in one pass (default: by memory)")] = None,
    seed: Annotated[int, arg(help="of few-shot examples and samples")] = 0,
    beside_paper: Annotated[bool, arg(help="set the paper's numbers of the same tasks beside")] = False,
    output: Annotated[str, arg(help="folder; a run started again goes on")] = "runs/study/depth-sweep",
) -> None:
    """Score by loop, below and beyond the trained depth (Tables 10 to 13 and 15)."""
    from pathlib import Path

    from rich.console import Console

    from looplm.commands import command_line
    from looplm.commands.evaluating import need_harness, split_names
    from looplm.evaluation.depths import Depth, parse_loops

    depths = tuple(Depth(loop) for loop in parse_loops(loops))
    names = split_names(tasks)
    need_harness()
    from looplm.evaluation.running import Settings
    from looplm.evaluation.sweep import run_sweep

    settings = Settings(
        names,
        depths,
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        batch_size=batch_size,
        seed=seed,
        command=command_line(),
    )
    console = Console()
    for table in run_sweep(model, settings, Path(output), beside_paper):
        console.print(table.rich())
    console.print(f"results {output}/depth-sweep.json and .md, with figures beside", markup=False, soft_wrap=True)


DEPTH_SWEEP = Annotated[Any, subcommand("depth-sweep", constructor=depth_sweep)]
SAFETY = Annotated[Any, subcommand("safety", constructor=safety)]
FAITHFULNESS = Annotated[Any, subcommand("faithfulness", constructor=faithfulness)]
EXIT_FRONTIER = Annotated[Any, subcommand("exit-frontier", constructor=exit_frontier)]
KV_SHARING = Annotated[Any, subcommand("kv-sharing", constructor=kv_sharing)]
PERPLEXITY = Annotated[Any, subcommand("perplexity", constructor=perplexity)]
ENTRIES = DEPTH_SWEEP | EXIT_FRONTIER | KV_SHARING | PERPLEXITY | SAFETY | FAITHFULNESS


def study(command: OmitArgPrefixes[OmitSubcommandPrefixes[ENTRIES]]) -> None:
    """The paper's studies on a model of one's own: tables, figures and JSON."""

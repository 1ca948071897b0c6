"""`looplm lab ...`: the papers' controlled experiments."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

if TYPE_CHECKING:
    from rich.console import RenderableType

    from looplm.lab.tasks import Task


def list_tasks(
    task: Annotated[Positional[str | None], arg(metavar="TASK", help="show this task only, with its settings")] = None,
    scale: Annotated[Literal["laptop", "paper"], arg(help="the size of the examples and settings")] = "laptop",
) -> None:
    """Describe each task: what it asks, what is claimed of it, and a real example."""
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from looplm.lab.tasks import TASKS, make_task

    table = Table.grid(padding=(0, 2, 1, 0))
    for name in TASKS if task is None else [task]:
        made = make_task(name, scale)
        more = [] if task is None else [_settings(made)]
        table.add_row(Text(made.name, style="bold"), Group(_description(made), *more))
    Console().print(table)


def _description(task: "Task") -> "RenderableType":
    """What a task asks, how difficult it is, and an example."""
    from rich.text import Text

    levels, tested = (", ".join(map(str, task.levels(split))) for split in ("train", "test"))
    unlike = "" if levels == tested else f"; tested at {tested}"
    return Text(f"{task.shows}\nDifficulty ({task.unit}): {levels}{unlike}\nExample: {task.example()}")


def _settings(task: "Task") -> "RenderableType":
    """The size of a task, and its settings with what they mean."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "meaning", box=None, pad_edge=False)
    for name, field in type(task.settings).model_fields.items():
        table.add_row(name, Text(str(getattr(task.settings, name))), Text(" ".join((field.description or "").split())))
    return Group(f"Rows of {task.length} tokens, a vocabulary of {len(task.vocabulary)}\n", table)


def run_task(
    task: Annotated[Positional[str], arg(metavar="TASK", help="a task of `looplm lab list`, or a YAML grid of runs")],
    layers: Annotated[int | None, arg(help="k, layers of the stack (default 1)")] = None,
    loops: Annotated[int | None, arg(help="L, loops (default 1)")] = None,
    width: Annotated[int | None, arg(help="D, a multiple of 32 (default 64)")] = None,
    steps: Annotated[int | None, arg(help="optimizer steps (default 1000)")] = None,
    batch: Annotated[int | None, arg(help="items a step (default 64)")] = None,
    learning_rate: Annotated[float | None, arg(help="at its peak (default 3e-3)")] = None,
    objective: Annotated[Literal["last", "mean", "expected"] | None, arg(help="loss (default last)")] = None,
    evaluation_loops: Annotated[int | None, arg(help="loops to score (default: those trained)")] = None,
    scale: Annotated[Literal["laptop", "paper"] | None, arg(help="of the task (default laptop)")] = None,
    seeds: Annotated[int | None, arg(help="runs of each kind (default 5)")] = None,
    matched: Annotated[bool, arg(help="also train what a looped model is compared with at equal FLOPs")] = False,
    workers: Annotated[int, arg(help="runs side by side, one thread each")] = 2,
    output: Annotated[str | None, arg(help="folder (default runs/lab/TASK)")] = None,
) -> None:
    """Train on a task with several seeds and score after every loop; started again, it goes on."""
    from pathlib import Path

    from rich.console import Console

    from looplm.lab.study import study_of

    options = {
        "layers": layers,
        "loops": loops,
        "width": width,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "objective": objective,
        "evaluation_loops": evaluation_loops,
        "scale": scale,
    }
    study = study_of(task, {name: value for name, value in options.items() if value is not None}, seeds, matched)
    folder = Path(output or f"runs/lab/{Path(task).stem}")
    Console().print(study.run(folder, workers))
    print(f"results {folder}/results.parquet, with charts beside it")


def claims(
    only: Annotated[tuple[str, ...], arg(help="names of claims to run; the ledger has all")] = (),
    quick: Annotated[bool, arg(help="the reduced ledger: fewer claims and seeds, nothing swept; exploratory")] = False,
    report: Annotated[bool, arg(help="run nothing, only judge the runs there are")] = False,
    workers: Annotated[int, arg(help="runs side by side, one thread each")] = 2,
    output: Annotated[str | None, arg(help="folder (default runs/claims, or runs/claims-quick)")] = None,
) -> None:
    """Test the papers' claims by rules fixed before the runs, and write the ledger; started again, it goes on."""
    from pathlib import Path

    from rich.console import Console

    from looplm.commands import command_line
    from looplm.lab.campaign import run_claims
    from looplm.lab.report import ledger_table

    folder = Path(output or ("runs/claims-quick" if quick else "runs/claims"))
    entries = run_claims(folder, list(only), quick, 0 if report else workers, command_line())
    Console().print(ledger_table(entries))
    print(f"ledger {folder}/claims.md and claims.json")


LIST = Annotated[Any, subcommand("list", constructor=list_tasks)]
RUN = Annotated[Any, subcommand("run", constructor=run_task)]
CLAIMS = Annotated[Any, subcommand("claims", constructor=claims)]


def lab(command: OmitArgPrefixes[OmitSubcommandPrefixes[LIST | RUN | CLAIMS]]) -> None:
    """The papers' controlled experiments: synthetic tasks with exact answers."""

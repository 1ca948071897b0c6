"""`looplm lab ...`: the papers' controlled experiments."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, Suppress, arg, subcommand

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


LIST = Annotated[Any, subcommand("list", constructor=list_tasks)]


def lab(command: OmitArgPrefixes[OmitSubcommandPrefixes[LIST | Annotated[None, Suppress]]]) -> None:
    """The papers' controlled experiments: synthetic tasks with exact answers."""

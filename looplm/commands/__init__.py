"""The subcommands: functions whose signature is the command line; they import a wing only when they run."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def command_line() -> str:
    """The command as it was typed, for reports."""
    return shlex.join(["looplm", *sys.argv[1:]])


@contextmanager
def share_done(description: str) -> Iterator[Callable[[float], None]]:
    """A function that is told the share of some work that is done: a bar in a terminal, a line on other errors."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description} ...", markup=False, highlight=False, soft_wrap=True)
        yield lambda share: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda share: bar.update(task, completed=share)

"""What tokenising sources shows: a bar, or plain lines, for each that is not prepared yet, and a table of them all."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from looplm.data.preparing import Preparation
from looplm.data.shards import PreparedSource
from looplm.training.tracking import Progress, short


class PreparationProgress:
    """Call it with each report of `looplm.data.preparing.prepare`; a context manager.

    A data set streamed without a limit has no known end: its share stays at 0 %, only tokens and their rate tell.

    Args:
        console: standard error where None.
        every: seconds between plain lines.
    """

    def __init__(self, console: Console | None = None, every: float = 10.0) -> None:
        self._console, self._every = console, every
        self._source: str | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def __call__(self, done: Preparation) -> None:
        """Show how far a source is; the first report of another one ends the bar before."""
        if self._bar is None or done.source != self._source:
            self.__exit__(None, None, None)
            self._source = done.source
            self._bar = Progress(1.0, f"preparing {done.source}", self._console, self._every).__enter__()
        self._bar.update(done.fraction, done.tokens, million_tokens=done.tokens / 1e6)


def source_table(sources: Mapping[str, PreparedSource]) -> Table:
    """Documents, tokens and characters of each source, with what is held out of them."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("source")
    for heading in ("documents", "tokens", "learnt", "characters / token", "held out"):
        table.add_column(heading, justify="right")
    for name, source in sources.items():
        train, held_out = source.train, source.validation
        learnt = train.text_tokens + train.documents if train.learnt is None else train.text_tokens
        table.add_row(
            name,
            short(train.documents + held_out.documents),
            short(len(train.tokens) + len(held_out.tokens)),
            f"{learnt / len(train.tokens):.0%}",
            f"{train.characters / max(train.text_tokens, 1):.2f}",
            f"{len(held_out.tokens) / (len(train.tokens) + len(held_out.tokens)):.1%}",
        )
    return table

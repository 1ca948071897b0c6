"""A table of a study, once: for the screen, for Markdown beside the JSON, for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells as people read them.

    Attributes:
        title: above it.
        header: the names of the columns; the first one names the rows.
        rows: as many cells each as the header has.
        notes: sentences below it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells for {len(self.header)} columns")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def markdown(self) -> str:
        """The table in Markdown, with its title in bold; `|` in cells is escaped."""
        lines = [_line(self.header), _line(["---"] + ["---:"] * (len(self.header) - 1))]
        lines += [_line(row) for row in self.rows]
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n" + notes

    def rich(self) -> RichTable:
        """The table for a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        notes = Text("\n".join(self.notes)) if self.notes else None
        shown = RichTable(title=Text(self.title), title_justify="left", caption=notes, caption_justify="left")
        for place, name in enumerate(self.header):
            shown.add_column(Text(name), justify="right" if place else "left")
        for row in self.rows:
            shown.add_row(*(Text(cell) for cell in row))
        return shown


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

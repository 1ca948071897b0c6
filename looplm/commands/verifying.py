"""`looplm verify`: checks a checkpoint on the user's own machine."""

import sys
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from looplm.commands import share_done

if TYPE_CHECKING:
    from rich.table import Table

    from looplm.model.verifying import Verification


def verify(
    model: Annotated[Positional[str], arg(help="a model folder or hub name, such as ByteDance/Ouro-1.4B")],
    text: Annotated[str | None, arg(help="text to measure the loss on; without: the shipped one")] = None,
    json: Annotated[str | None, arg(help="file for all findings, to attach to a report of a fault")] = None,
) -> None:
    """Check a checkpoint: files, numbers, the loss of every loop, exits; exit code 1 where a check fails."""
    from rich.console import Console

    from looplm.data.texts import read_text
    from looplm.files import write_json
    from looplm.model.verifying import verify_model

    words = read_text(text)
    with share_done(f"verifying {model}") as progress:
        report = verify_model(model, words, progress=progress)
    console = Console()
    console.print(_checks(report))
    if report.measurement is not None:
        console.print(_loops(report))
    console.print(f"verdict: {report.verdict}", markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        write_json(json, report.record())
        console.print(f"json     {json}", markup=False, highlight=False, soft_wrap=True)
    if not report.passed:
        sys.exit(1)


def _checks(report: "Verification") -> "Table":
    from rich.table import Table
    from rich.text import Text

    colours = {"pass": "green", "FAIL": "bold red", "note": "default"}
    table = Table()
    for heading in ("check", "result", "finding"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, Text(check.result, colours[check.result]), Text(check.finding))
    return table


def _loops(report: "Verification") -> "Table":
    from rich.table import Table

    measured, trained = report.measurement, report.config["total_ut_steps"]
    assert measured is not None
    table = Table(title=f"{measured.tokens} tokens, expected depth {measured.expected_depth:.2f} of {trained} loops")
    for heading in ("loop", "nats a token", "mean exit probability"):
        table.add_column(heading, justify="right")
    for loop, loss in enumerate(measured.losses, start=1):
        inside = loop <= trained
        share = f"{measured.exit_probabilities[loop - 1]:.3f}" if inside else ""
        table.add_row(f"{loop}" if inside else f"{loop} (beyond training)", f"{loss:.4f}", share)
    return table

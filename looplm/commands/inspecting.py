"""`looplm trace`: what every loop makes of every token of a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from warnings import catch_warnings, filterwarnings

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from rich.table import Table

    from looplm.model.tracing import Trace


def trace(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    prompt: Annotated[str, arg(help="the text to trace")],
    html: Annotated[str | None, arg(help="write a page to read it in")] = None,
    json: Annotated[str | None, arg(help="write every number as JSON")] = None,
    loops: Annotated[int | None, arg(help="loops to run; without: as many as trained")] = None,
    top_k: Annotated[int, arg(help="best tokens kept of every read-out")] = 5,
    exit_threshold: Annotated[float, arg(help="colour the text by the exits at this CDF, in (0, 1]")] = 0.5,
) -> None:
    """Show what every loop reads, decides and changes, token by token."""
    _check(html, json, loops, top_k, exit_threshold)
    from looplm.files import write_text
    from looplm.model.loading import load_model
    from looplm.model.trace_page import trace_page
    from looplm.model.tracing import trace as run

    looped, tokenizer = load_model(model)
    with catch_warnings():  # the table says it
        filterwarnings("ignore", message="running .* loops, but the model was trained with")
        found = run(looped, tokenizer, prompt, loops=loops, top_k=top_k)
    page = trace_page(found, model, exit_threshold)
    if json is not None:
        found.save(json)
    if html is not None:
        write_text(html, page)
    _show(found, exit_threshold, [("json", json), ("page", html)])


def _check(html: str | None, json: str | None, loops: int | None, top_k: int, exit_threshold: float) -> None:
    if loops is not None and loops < 1:
        raise ValueError(f"--loops is {loops}; it must be at least 1")
    if top_k < 1:
        raise ValueError(f"--top-k is {top_k}; it must be at least 1")
    if not 0 < exit_threshold <= 1:
        raise ValueError(f"--exit-threshold is {exit_threshold}; it must lie in (0, 1]")
    for flag, path in (("--html", html), ("--json", json)):
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{flag} is {path}, which is a folder; give the name of a file")
    if html is not None and json is not None and Path(html).resolve() == Path(json).resolve():
        raise ValueError(f"--html and --json are both {html}; give them two names")


def _show(trace: "Trace", threshold: float, written: list[tuple[str, str | None]]) -> None:
    from rich.console import Console

    from looplm.display import depth_legend, depth_plain, depth_text

    console, depths = Console(), trace.exit_depths(threshold)
    tokens = [(token.text, depth) for token, depth in zip(trace.tokens, depths, strict=True)]
    if console.color_system is None:
        print(depth_plain(tokens))
    else:
        console.print(depth_legend(trace.loops))
        console.print(depth_text(tokens, trace.loops), soft_wrap=True)
    mean = sum(depths) / len(depths)
    console.print(f"{mean:.2f} loops a token at threshold {threshold:g}", highlight=False)
    console.print(_table(trace, depths))
    if trace.loops > trace.trained_loops:
        console.print(f"* beyond the {trace.trained_loops} loops of training", highlight=False)
    for name, path in written:
        if path is not None:
            console.print(f"{name}   {path}", markup=False, highlight=False, soft_wrap=True)


def _table(trace: "Trace", depths: list[int]) -> "Table":
    """Means over the text by loop; Exits is the share of tokens that stop there at the threshold."""
    from rich.table import Table

    from looplm.model.tracing import MEASURES

    table = Table("Loop", "Exits", *MEASURES.values())
    for column in table.columns:
        column.justify = "right"
    means = [trace.mean(name) for name in MEASURES]
    for loop in range(1, trace.loops + 1):
        numbers = [column[loop - 1] for column in means]
        share = f"{depths.count(loop) / len(depths):.0%}"
        table.add_row(
            f"{loop}{'*' * (loop > trace.trained_loops)}",
            share,
            *("–" if number is None else f"{number:.3f}" for number in numbers),
        )
    return table

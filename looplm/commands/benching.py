"""`looplm bench`: what a model gives on this machine, early exit against full depth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from looplm.commands import share_done

if TYPE_CHECKING:
    from rich.table import Table

    from looplm.engine.benching import Bench


def bench(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    batches: Annotated[tuple[int, ...], arg(help="requests at once")] = (1, 8, 16),
    exit_threshold: Annotated[float, arg(help="leave the loop at this CDF, in (0, 1]; beside full depth")] = 0.5,
    prompt_tokens: Annotated[int, arg(help="length of each prompt")] = 64,
    max_tokens: Annotated[int, arg(help="new tokens of each request")] = 32,
    kv_policy: Annotated[Literal["per_loop", "last"], arg(help="keys kept after the prompt")] = "per_loop",
    text: Annotated[str | None, arg(help="a text file that prompts are cut from; without: random tokens")] = None,
    json: Annotated[str | None, arg(help="write every number as JSON")] = None,
) -> None:
    """Measure throughput, waiting times, depth and memory at several batch sizes."""
    _check(batches, exit_threshold, prompt_tokens, max_tokens, text, json)
    from rich.console import Console

    from looplm.engine.benching import run_bench
    from looplm.files import write_json
    from looplm.model.loading import load_model

    looped, tokenizer = load_model(model)
    given = None if text is None else Path(text).read_text(encoding="utf-8")
    with share_done("measuring") as done:
        found = run_bench(
            looped,
            tokenizer,
            batches,
            exit_threshold=exit_threshold,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            kv_policy=kv_policy,
            text=given,
            done=done,
        )
    if json is not None:
        write_json(json, found.as_dict())
    console = Console()
    console.print(_table(found))
    if json is not None:
        console.print(f"json   {json}", markup=False, highlight=False, soft_wrap=True)


def _check(
    batches: tuple[int, ...],
    exit_threshold: float,
    prompt_tokens: int,
    max_tokens: int,
    text: str | None,
    json: str | None,
) -> None:
    if not batches or min(batches) < 1:
        raise ValueError(f"--batches is {' '.join(map(str, batches)) or 'empty'}; give numbers of at least 1")
    if not 0 < exit_threshold <= 1:
        raise ValueError(f"--exit-threshold is {exit_threshold}; it must lie in (0, 1]")
    if prompt_tokens < 1:
        raise ValueError(f"--prompt-tokens is {prompt_tokens}; it must be at least 1")
    if max_tokens < 2:
        raise ValueError(f"--max-tokens is {max_tokens}; it must be at least 2 (the first is the prompt's)")
    if text is not None and not Path(text).is_file():
        raise ValueError(f"--text is {text}, which is no file")
    if json is not None and Path(json).is_dir():
        raise ValueError(f"--json is {json}, which is a folder; give the name of a file")


def _table(found: "Bench") -> "Table":
    """A row for each batch size and depth."""
    from rich.table import Table

    table = Table(
        "Requests", "Depth", "Mean loops", "Tokens/s", "Speed-up", "First token", "A token", "KV a token", "KV most"
    )
    for column in table.columns:
        column.justify = "right"
    for row in found.rows:
        table.add_row(
            str(row.requests),
            "full" if row.exit_threshold is None else f"q {row.exit_threshold:g}",
            f"{row.mean_depth:.2f}",
            f"{row.tokens_per_second:.1f}",
            f"{row.speed_up:.2f}x",
            f"{row.first_token_seconds:.3f} s",
            f"{row.token_seconds * 1e3:.1f} ms",
            f"{row.kv_bytes_per_token / 1024:.1f} KiB",
            f"{row.kv_bytes / 2**20:.1f} MiB",
        )
    return table

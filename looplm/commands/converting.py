"""`looplm retrofit`: a looped model out of a dense one."""

import re
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from looplm.commands import command_line, share_done
from looplm.files import public_name

if TYPE_CHECKING:
    from rich.table import Table


def retrofit(
    source: Annotated[Positional[str], arg(help="a dense model: a folder, a hub name, a .gguf file or smollm2")],
    output: Annotated[str, arg(help="folder for the looped model")],
    loops: Annotated[int, arg(help="T, how often the core runs")] = 3,
    core: Annotated[
        str | None, arg(metavar="FIRST:END", help="layers that loop, counted from 0, the end not included")
    ] = None,
    choose: Annotated[int | None, arg(help="choose a core of this many layers by block influence instead")] = None,
    text: Annotated[str | None, arg(help="text to measure on: a file; a short shipped one without")] = None,
) -> None:
    """Make a dense Llama, Mistral, SmolLM2, Qwen2 or Qwen3 model looped; untrained, it is the dense model in loop 1."""
    given = _check(loops, core, choose)

    from rich.console import Console

    from looplm.data.texts import read_text
    from looplm.model.dense import load_dense
    from looplm.model.measuring import encode_text, measure_text
    from looplm.model.retrofitting import block_influence, check_core, choose_core
    from looplm.model.retrofitting import retrofit as convert
    from looplm.model.saving import require_new_folder

    folder, words, console = require_new_folder(output), read_text(text), Console()
    dense, tokenizer = load_dense(source)
    if given is not None:
        check_core(given, dense.config.num_hidden_layers)
    influence = block_influence(dense, encode_text(dense, tokenizer, words))
    chosen = choose_core(influence, choose or 0) if given is None else given
    console.print(_influence_table(influence, chosen))
    looped = convert(dense, chosen, loops)
    with share_done("measuring the looped model") as progress:
        losses = measure_text(looped, tokenizer, words, progress=progress).losses
    console.print(_loss_table(losses))
    record = {
        "command": command_line(),
        "source": public_name(source),
        "layers": dense.config.num_hidden_layers,
        "core": [chosen.start, chosen.stop],
        "loops": loops,
        "measured_on": "the text that ships with looplm" if text is None else Path(text).name,
        "block_influence": influence,
        "losses_before_training": losses,
    }
    _save(folder, looped, tokenizer, record)
    console.print(f"model   {output}", markup=False, highlight=False, soft_wrap=True)


def _save(folder: Path, looped: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """The model folder with its card and what was measured."""
    from looplm.files import save_folder, write_json
    from looplm.model.saving import Provenance, write_model

    first, end = record["core"]
    origin = (
        f"Retrofitted from {record['source']}: of its {record['layers']} layers those from {first} to {end - 1} "
        f"(counted from 0) loop {record['loops']} times. Not trained since."
    )
    losses, measured_on = record["losses_before_training"], record["measured_on"]

    def write(path: Path) -> None:
        write_model(path, looped, tokenizer, Provenance(origin, losses=losses, measured_on=measured_on))
        write_json(path / "retrofit.json", record)

    save_folder(folder, write)


def _check(loops: int, core: str | None, choose: int | None) -> range | None:
    """The core given by hand, if one was."""
    if (core is None) == (choose is None):
        raise ValueError("give exactly one of --core FIRST:END and --choose LAYERS")
    if loops < 1:
        raise ValueError(f"--loops is {loops}; it must be at least 1")
    if choose is not None and choose < 1:
        raise ValueError(f"--choose is {choose}; it must be at least 1")
    if core is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", core)
    if found is None:
        raise ValueError(f"--core is {core!r}; it must have the form FIRST:END, such as 10:20")
    return range(int(found[1]), int(found[2]))


def _influence_table(influence: list[float], core: range) -> "Table":
    """Each layer's part and its influence, as a number and a bar that ends at four times the median."""
    from rich.table import Table

    table = Table(title="block influence: how far each layer turns the state")
    table.add_column("layer", justify="right")
    table.add_column("part")
    table.add_column("1 - cosine", justify="right")
    table.add_column("")
    full = 4 * median(influence) or 1.0
    for index, value in enumerate(influence):
        part = "prelude" if index < core.start else "core" if index < core.stop else "coda"
        table.add_row(f"{index}", part, f"{value:.4f}", "█" * round(24 * min(value / full, 1)) + "▸" * (value > full))
    return table


def _loss_table(losses: list[float]) -> "Table":
    from rich.table import Table

    table = Table(title="before any training")
    for heading in ("loop", "nats a token"):
        table.add_column(heading, justify="right")
    for loop, loss in enumerate(losses, start=1):
        table.add_row("1 (the dense model)" if loop == 1 else f"{loop}", f"{loss:.4f}")
    return table

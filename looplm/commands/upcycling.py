"""`looplm upcycle` and `looplm convert`: a new model folder out of an old one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from looplm.commands import share_done
from looplm.files import public_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def upcycle(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    output: Annotated[str, arg(help="folder for the new model")],
    layers: Annotated[int | None, arg(help="layers of the new core: a multiple of the old number")] = None,
    arrangement: Annotated[Literal["ABAB", "AABB"], arg(help="the stack repeated, or each layer repeated")] = "ABAB",
    loops: Annotated[int | None, arg(help="loops of the new model; without: as many as before")] = None,
    text: Annotated[str | None, arg(help="text to measure the loss on; without: the shipped one")] = None,
) -> None:
    """Make a deeper looped model by duplicating layers; shows the loss of every loop before and after."""
    if layers is None and loops is None:
        raise ValueError("nothing to change: give --layers, --loops or both")
    for flag, value in (("--layers", layers), ("--loops", loops)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")

    from rich.console import Console

    from looplm.data.texts import read_text
    from looplm.model.loading import load_model
    from looplm.model.measuring import measure_text
    from looplm.model.saving import Provenance, require_new_folder, save_model
    from looplm.model.upcycling import upcycle as make

    require_new_folder(output)
    words = read_text(text)
    old, tokenizer = load_model(model)
    new = make(old, num_hidden_layers=layers, arrangement=arrangement, total_ut_steps=loops)
    deepest = max(old.config.total_ut_steps, new.config.total_ut_steps)
    with share_done("measuring the old model") as progress:
        before = measure_text(old, tokenizer, words, deepest, progress)
    with share_done("measuring the new model") as progress:
        after = measure_text(new, tokenizer, words, deepest, progress)
    shapes = [f"{each.config.num_hidden_layers} layers x {each.config.total_ut_steps} loops" for each in (old, new)]
    origin = f"Upcycled from {public_name(model)}: {shapes[0]} became {shapes[1]}"
    origin += f", {arrangement}." if layers else "."
    measured_on = "the text that ships with looplm" if text is None else Path(text).name
    save_model(
        output, new, tokenizer, Provenance(f"{origin} Not trained since.", losses=after.losses, measured_on=measured_on)
    )
    console = Console()
    trained = (old.config.total_ut_steps, new.config.total_ut_steps)
    console.print(_before_after(shapes, trained, before.losses, after.losses))
    console.print(f"model   {output}", markup=False, highlight=False, soft_wrap=True)


def convert(
    model: Annotated[Positional[str], arg(help="a model folder or hub name, such as ByteDance/Ouro-1.4B-Thinking")],
    output: Annotated[str, arg(help="folder for the converted model")],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, arg(help="of the weights; without: unchanged")] = None,
) -> None:
    """Set the tokens (bos 1, eos 2, pad 0) and the ChatML template that a released folder lacks."""
    import torch
    from rich.console import Console

    from looplm.model.conversion import convert as change
    from looplm.model.loading import load_model
    from looplm.model.saving import Provenance, require_new_folder, save_model

    require_new_folder(output)
    looped, tokenizer = load_model(model)
    before = [getattr(looped.config, name) for name in TOKENS]
    change(looped, tokenizer, None if dtype is None else getattr(torch, DTYPES[dtype]))
    origin = f"Converted by looplm from {public_name(model)}: ChatML tokens and template; the weights are unchanged"
    save_model(output, looped, tokenizer, Provenance(f"{origin} but for their dtype." if dtype else f"{origin}."))
    changes = zip(TOKENS, before, (getattr(looped.config, name) for name in TOKENS), strict=True)
    tokens = ", ".join(f"{name.removesuffix('_token_id')} {old} -> {new}" for name, old, new in changes)
    console = Console()
    console.print(f"tokens   {tokens}", highlight=False)
    console.print("template ChatML; enable_thinking=True opens the answer with <think>", highlight=False, markup=False)
    console.print(f"dtype    {str(looped.dtype).removeprefix('torch.')}", highlight=False)
    console.print(f"model    {output}", markup=False, highlight=False, soft_wrap=True)


def _before_after(
    shapes: "Sequence[str]", trained: tuple[int, int], before: "Sequence[float]", after: "Sequence[float]"
) -> "Table":
    """Loss by loop of both models; what lies beyond the loops of one is in brackets."""
    from rich.table import Table

    table = Table(title="nats a token, before any training")
    table.add_column("loop", justify="right")
    for shape in shapes:
        table.add_column(shape, justify="right")
    for loop, losses in enumerate(zip(before, after, strict=True), start=1):
        cells = [f"{loss:.4f}" if loop <= most else f"({loss:.4f})" for loss, most in zip(losses, trained, strict=True)]
        table.add_row(str(loop), *cells)
    return table

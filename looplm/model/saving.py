"""Model folders: weights, tokenizer and a card that says what the model is, how it came to be and how to load it.

The files are those of transformers, with the released weight names and no remote code (see `configuration`). The card
is the README.md that hubs show; it is written from what is known and leaves out what is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from looplm.files import save_folder, write_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from looplm.model.modeling import OuroForCausalLM


@dataclass(frozen=True)
class Provenance:
    """How a model came to be.

    Attributes:
        origin: sentences: the recipe, or what was made of which model.
        data: the sources that it was trained on, where known.
        losses: nats a token after loops 1..n, where measured.
        measured_on: the text of those losses.
    """

    origin: str
    data: Sequence[str] = ()
    losses: Sequence[float] = ()
    measured_on: str = ""


def require_new_folder(output: str) -> Path:
    """The path of a folder to be made.

    Raises:
        ValueError: there is something at `output` already, other than an empty folder.
    """
    folder = Path(output)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give a new one")
    return folder


def save_model(output: str, model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, provenance: Provenance) -> None:
    """Write a new model folder, whole or not at all.

    Raises:
        ValueError: there is something at `output` already.
        OSError: it cannot be written.
    """
    save_folder(require_new_folder(output), lambda path: write_model(path, model, tokenizer, provenance))


def write_model(path: Path, model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, provenance: Provenance) -> None:
    """Write the files of a model folder to `path`."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_text(path / "README.md", model_card(model, provenance))


def model_card(model: OuroForCausalLM, provenance: Provenance | None = None) -> str:
    """The card of a model, Markdown with the header that hubs read."""
    parts = [_HEADER, "# A looped language model", _description(model)]
    if provenance is not None:
        parts += ["## Origin", provenance.origin]
        if provenance.data:
            parts += ["Trained on:", "\n".join(f"- {source}" for source in provenance.data)]
        if provenance.losses:
            parts += ["## Loss by loop", _loss_table(provenance.losses, model.config.total_ut_steps)]
            parts += [f"Nats a token, on {provenance.measured_on}."]
    return "\n\n".join([*parts, "## How to load", _LOADING]) + "\n"


def _description(model: OuroForCausalLM) -> str:
    config = model.config
    outside = [(config.num_prelude_layers, "before"), (config.num_coda_layers, "after")]
    around = [f", {_layers(count)} {where} the loop" for count, where in outside if count]
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{_layers(config.num_hidden_layers)}, applied {config.total_ut_steps} times to every token"
        f"{''.join(around)}; a learned gate says after which loop a token may stop.\n\n"
        f"- parameters: {sum(p.numel() for p in model.parameters()):,} ({dtype})\n"
        f"- width {config.hidden_size}, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} key-value heads\n"
        f"- vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}"
    )


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _loss_table(losses: Sequence[float], trained: int) -> str:
    rows = [f"| {t}{'' if t <= trained else ' (beyond training)'} | {loss:.4f} |" for t, loss in enumerate(losses, 1)]
    return "\n".join(["| loop | loss |", "|---|---|", *rows])


_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- looped-language-model
- ouro
- looplm
---"""

_LOADING = """```python
import looplm  # makes transformers know looped models; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "this folder, or its name on the hub"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, exit_threshold=0.9, max_new_tokens=40)[0]))
```

`looplm verify FOLDER` checks the files and measures the loss after every loop."""

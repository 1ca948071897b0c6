"""Conversations as rows of tokens: what the assistant says is learnt, several conversations share a row, apart.

The format is the model's own chat template, in which `{% generation %}` marks what the assistant says; ChatML as this
package sets it gets the markers here (`MARKED_CHATML`). What is marked is encoded apart from what stands around it, as
it is when a model generates after its prompt. The template's markers are read as special tokens, so a conversation in
whose text one is written is left out: data cannot end a turn. TRL packs (best fit, no conversation is cut in two); the
positions of a row restart with every conversation, which is what the model keeps packed documents apart by.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl import pack_dataset

from looplm.data.chat import CHAT_TEMPLATE, Conversation
from looplm.data.encoding import Encoder
from looplm.data.fingerprint import fingerprint
from looplm.data.sources import Source, open_source
from looplm.data.splitting import split_source
from looplm.files import save_folder, write_json
from looplm.model.request import shifted
from looplm.objectives.token_losses import IGNORED
from looplm.tuning.recipe import SFTRecipe

FORMAT = 1
"""Raised when conversations are encoded or packed in another way than before."""

MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)
"""`CHAT_TEMPLATE` with its markers: it writes the same text (a bare new line behind a tag would be dropped)."""

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "held_out": Value("bool")})

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Conversations:
    """Rows of `input_ids` and `labels` (-100 where nothing is learnt), and `seq_lengths` where they are packed.

    Attributes:
        train, validation: rows of at most `sequence_length` tokens.
        counts: conversations read, held out, cut at their end, and left out, by reason.
    """

    train: Dataset
    validation: Dataset
    counts: dict[str, int]


def marked_template(tokenizer: PreTrainedTokenizerBase, model: str) -> str:
    """The chat template of a tokenizer, with what the assistant says marked.

    Args:
        model: what an error calls the model.

    Raises:
        ValueError: it has no template, or one without markers that is not this package's ChatML.
    """
    template = tokenizer.chat_template
    if template == CHAT_TEMPLATE:
        return MARKED_CHATML
    if isinstance(template, str) and _MARKER.search(template):
        return template
    found = "no chat template" if template is None else "a chat template without {% generation %} markers"
    raise ValueError(
        f"{model} has {found}, so what the assistant says cannot be told from the rest; set ChatML with "
        "`looplm convert`, or put {% generation %} ... {% endgeneration %} around it in the template"
    )


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and its labels: the tokens themselves where they are learnt, else -100.

    Raises:
        ValueError: the template refuses the conversation, or marks nothing in it.
    """
    render, chat, names = cast("Any", render_jinja_template), conversation, tokenizer.special_tokens_map
    try:
        texts, marks = render([chat], chat_template=template, return_assistant_tokens_mask=True, **names)
    except Exception as error:  # whatever a template raises, jinja's errors among them
        raise ValueError(f"the chat template refuses a conversation: {' '.join(str(error).split())}") from None
    pieces, end = [], 0
    for start, stop in marks[0]:
        pieces += [(texts[0][end:start], False), (texts[0][start:stop], True)]
        end = stop
    if not pieces:
        raise ValueError("the chat template marks nothing of a conversation; put {% generation %} around the answers")
    pieces = [piece for piece in [*pieces, (texts[0][end:], False)] if piece[0]]
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = []
    labels: list[int] = []
    for (_, learnt), tokens in zip(pieces, encoded, strict=True):
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return ids, labels


def prepare_conversations(recipe: SFTRecipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Conversations:
    """Encode and pack the conversations of a recipe, or open what an earlier start left in `folder`, if it still fits.

    Raises:
        ValueError: a source that cannot be read, or nothing left to learn on one of the two sides.
    """
    template = marked_template(tokenizer, recipe.model)
    sources = [open_source(name, settings) for name, settings in recipe.data.sources.items()]
    record = folder / "conversations.json"
    known = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    encoder, every, before = Encoder.of(tokenizer), recipe.data.validation_every, known.get("sources", {})
    identity = {
        "format": FORMAT,
        "template": template,
        "sequence_length": recipe.sequence_length,
        "packing": recipe.packing,
        "sources": {each.name: fingerprint(each, encoder, every, before.get(each.name)) for each in sources},
    }
    if {key: known.get(key) for key in identity} != identity:

        def write(path: Path) -> None:
            counts: Counter[str] = Counter()
            for side, rows in _build(recipe, sources, tokenizer, template, path / "cache", counts).items():
                rows.save_to_disk(path / side)
            write_json(path / "conversations.json", {**identity, "counts": counts})

        folder.parent.mkdir(parents=True, exist_ok=True)
        save_folder(folder, write)
        known = json.loads(record.read_text("utf-8"))
    train, validation = (load_from_disk(str(folder / side)) for side in ("train", "validation"))
    return Conversations(train, validation, known["counts"])


def _build(
    recipe: SFTRecipe,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    cache: Path,
    counts: Counter[str],
) -> dict[str, Dataset]:
    """Both sides, in files below `cache`."""
    rows = Dataset.from_generator(
        lambda: _encoded(recipe, sources, tokenizer, template, counts),
        features=_FEATURES,
        cache_dir=str(cache),
        fingerprint="conversations",  # the folder is new, so nothing else is in the cache
    )
    held_out, sides = rows["held_out"][:], {}
    for side, wanted in (("train", False), ("validation", True)):
        chosen = [number for number, found in enumerate(held_out) if found == wanted]
        if not chosen:
            raise ValueError(f"no conversation is left for {side}; give more, or a longer sequence_length")
        sides[side] = rows.select(chosen).select_columns(["input_ids", "labels"])
        if recipe.packing:
            sides[side] = pack_dataset(sides[side], recipe.sequence_length, "bfd")
    return sides


def _encoded(
    recipe: SFTRecipe,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    counts: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Every conversation that can be learnt from, encoded; `counts` says what became of all."""
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelt = re.compile("|".join(special) or r"(?!)")
    for source in sources:
        for document, held_out in split_source(source, recipe.data.validation_every):
            assert not isinstance(document, str)  # the recipe has checked it
            counts["read"] += 1
            if any(spelt.search(message["content"]) for message in document):
                counts["left out: a special token is written in them"] += 1
                continue
            ids, labels = encode_conversation(tokenizer, template, document)
            counts["cut at their end"] += len(ids) > recipe.sequence_length
            ids, labels = ids[: recipe.sequence_length], labels[: recipe.sequence_length]
            if all(label == IGNORED for label in labels[1:]):
                counts["left out: no answer before they are cut"] += 1
                continue
            counts["held out"] += held_out
            yield {"input_ids": ids, "labels": labels, "held_out": held_out}


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows as one batch: `input_ids`, `labels` (not shifted) and restarting `position_ids`, each (B, S) int64.

    S is the longest row's. Padding stands behind, a document of its own without labels. No first token of a
    conversation is a label, so shifting never asks one conversation for the beginning of the next.
    """
    size = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        short = size - len(row["input_ids"])
        lengths = [*(row.get("seq_lengths") or [len(row["input_ids"])]), short]
        places = [place for length in lengths for place in range(length)]
        labels = [*row["labels"], *[IGNORED] * short]
        batch["input_ids"].append([*row["input_ids"], *[0] * short])
        batch["position_ids"].append(places)
        batch["labels"].append([label if place else IGNORED for label, place in zip(labels, places, strict=True)])
    return {name: torch.tensor(values) for name, values in batch.items()}


def windows(rows: Dataset, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Batches for measuring, labels shifted: all rows in order, or about `limit` of them spread over all."""
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = [number * len(rows) // count for number in range(count)]
    for first in range(0, count, batch_size):
        batch = collate([rows[number] for number in chosen[first : first + batch_size]])
        labels = shifted(batch["labels"], None)
        assert labels is not None
        yield {**batch, "labels": labels}

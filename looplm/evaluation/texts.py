"""Text to measure on, as windows: a UTF-8 file, or data prepared for training (its validation side).

A window is S + 1 tokens of the stream: the first is only context, each of the others a target. Neighbours share one
token, so every token but the first of a source is a target once; what does not fill a window is left out, so that all
windows weigh the same. Begin tokens between prepared documents are targets too: the end of a document, as in training.

Conversations are left out: much of theirs is not to be learnt. Windows of one document are alike, which makes intervals
over them too narrow. Halves are cut within each source, the first from the second, so that at most the document at the
cut is in both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from looplm.data.shards import open_corpus, read_index
from looplm.data.texts import read_text
from looplm.evaluation.scoring import Request
from looplm.model.measuring import encode_text
from looplm.model.modeling import OuroForCausalLM

Tokens = NDArray[Any]


@dataclass(frozen=True)
class TextWindows:
    """Windows of S targets each, by source, in the order of the text.

    Attributes:
        name: what was read, without the folders around it.
        length: S, in tokens.
        sources: the windows of each source.
    """

    name: str
    length: int
    sources: dict[str, list[Request]]

    @property
    def requests(self) -> list[Request]:
        """All windows."""
        return [window for windows in self.sources.values() for window in windows]

    def halves(self) -> "tuple[TextWindows, TextWindows]":
        """The first and the second half of every source.

        Raises:
            ValueError: fewer than four windows in all, or a source with one.
        """
        for name, windows in self.sources.items():
            if len(windows) < 2:
                raise ValueError(f"source {name} has {len(windows)} window of {self.length} tokens; two halves need 2")
        if len(self.requests) < 4:
            raise ValueError(f"{len(self.requests)} windows of {self.length} tokens; two halves need 4 or more")
        parts = [{name: (w[: len(w) // 2], w[len(w) // 2 :]) for name, w in self.sources.items()}] * 2
        first, second = ({name: both[side] for name, both in part.items()} for side, part in enumerate(parts))
        return TextWindows(self.name, self.length, first), TextWindows(self.name, self.length, second)


def load_windows(
    model: OuroForCausalLM, tokenizer: PreTrainedTokenizerBase, data: str | None, length: int, limit: int
) -> TextWindows:
    """Windows of a text file, of a folder of prepared data, or of the text that ships with the package (None).

    Args:
        length: S, in tokens; the model's context bounds it.
        limit: windows at most, shared evenly by the sources and spread over each.

    Raises:
        ValueError: no such text or data, less than one window, tokens that the model does not have, or a length or
            limit out of range.
    """
    context = model.config.max_position_embeddings
    if not 2 <= length <= context:
        raise ValueError(f"window is {length}; it must lie in 2..{context}, the context of the model")
    if limit < 2:
        raise ValueError(f"limit is {limit}; intervals need 2 windows or more")
    folder = Path(data) if data is not None and Path(data).is_dir() else None
    if folder is None:
        streams: dict[str, Tokens] = {"text": encode_text(model, tokenizer, read_text(data)).numpy()}
    else:
        streams = _prepared(folder, model.config.vocab_size)
    share = max(limit // len(streams), 1)
    sources = {name: _cut(name, ids, length, share) for name, ids in streams.items()}
    return TextWindows("the shipped text" if data is None else Path(data).resolve().name, length, sources)


def _prepared(folder: Path, vocabulary: int) -> dict[str, Tokens]:
    """The validation tokens of a prepared source, or of every source of running text in a folder of them."""
    places = [folder] if read_index(folder) else sorted(p for p in folder.iterdir() if p.is_dir() and read_index(p))
    if not places:
        raise ValueError(f"{folder} holds no prepared data; give a text file, or what `looplm data prepare` wrote")
    streams: dict[str, Tokens] = {}
    for place in places:
        corpus = open_corpus(place.parent, place.name).validation
        tokens = corpus.tokens
        if corpus.learnt is not None:  # conversations
            continue
        if len(tokens) and int(tokens.max()) >= vocabulary:
            raise ValueError(f"{place} has token {int(tokens.max())}; the model's vocabulary ends at {vocabulary - 1}")
        streams[place.name] = tokens
    if not streams:
        raise ValueError(f"{folder} holds conversations only, of which much was never to be learnt; give running text")
    return streams


def _cut(name: str, ids: Tokens, length: int, most: int) -> list[Request]:
    whole = (len(ids) - 1) // length
    if whole < 1:
        raise ValueError(f"{name} has {len(ids)} tokens, fewer than one window of {length + 1}: shorten the window")
    count = min(whole, most)
    starts = [k * whole // count * length for k in range(count)]
    return [([int(ids[start])], ids[start + 1 : start + length + 1].tolist()) for start in starts]

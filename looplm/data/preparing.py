"""Sources to token files, once: in several processes, and going on where a killed run stopped.

A source is read from its beginning by one process, encoded in chunks by several, and appended in order by the first
one (see `looplm.data.shards`). A killed preparation reads the source again, which takes a small part of the time that
encoding does (docs/log.md), and encodes what is missing. What has been prepared before is left as it is, if its
fingerprint still fits.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from looplm.data.chat import Document, document_text
from looplm.data.encoding import Encoder
from looplm.data.fingerprint import Fingerprint, changes, fingerprint
from looplm.data.settings import SourceSettings
from looplm.data.shards import (
    SIDES,
    Index,
    PreparedSource,
    ShardWriter,
    damage,
    open_corpus,
    read_index,
    remove_prepared,
)
from looplm.data.sources import Source, open_source
from looplm.data.splitting import split_source
from looplm.data.workers import Chunk, available_cores, encode_chunks
from looplm.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 2**21
"""Characters encoded between two records of progress; about half a second of one core's work."""
_FINGERPRINT = "fingerprint.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Preparation:
    """How far the preparation of a source is: `fraction` of it read (0 where its size is unknown), tokens written."""

    source: str
    fraction: float
    tokens: int


Report = Callable[[Preparation], object]


@dataclass(frozen=True)
class _Plan:
    """A source that has been looked at, and where it goes."""

    source: Source
    encoder: Encoder
    validation_every: int
    folder: Path
    fingerprint: Fingerprint


def prepare(
    sources: Mapping[str, SourceSettings],
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    validation_every: int,
    *,
    workers: int | None = None,
    anew: bool = False,
    report: Report | None = None,
) -> dict[str, PreparedSource]:
    """Tokenise every source that is not in `folder` yet; give all of them, mapped into memory.

    Several processes may call this for the same folder: one works, the others wait for it.

    Args:
        sources: by name; each gets a folder of that name.
        tokenizer: of the `tokenizers` library.
        folder: where the prepared sources live.
        validation_every: one document in so many is held out (see `looplm.data.splitting`).
        workers: processes that encode; None takes one for each core.
        anew: replace prepared sources whose fingerprint no longer fits, or that are damaged, instead of refusing.
        report: called after each chunk.

    Raises:
        ValueError: before anything is written: a name that cannot be a folder's, a source that is missing, empty, or
            whose first record has no text; a tokenizer without the markers that chat data needs; prepared data that
            does not fit any more (the message says what changed). Later: a record that cannot be read.
        OSError: the disk is full or failed, or a worker was killed; what has been recorded stays.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1")
    if not sources:
        raise ValueError("data.sources is empty: name at least one source")
    encoder, folder = Encoder.of(tokenizer), Path(folder)
    plans = [_plan(name, settings, encoder, validation_every, folder, anew) for name, settings in sources.items()]
    missing = [plan for plan in plans if not _is_prepared(plan)]
    for plan in plans:
        if plan not in missing and plan.fingerprint != _known(plan.folder):
            with suppress(OSError):  # new times of modification: a record that only spares reading
                write_json(plan.folder / _FINGERPRINT, plan.fingerprint)
    for plan in missing:
        next(split_source(plan.source, validation_every))
    for plan in missing:
        plan.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(plan.folder / ".lock"):
            if not _is_prepared(plan):  # another process may have done it while this one waited
                _write(plan, workers or available_cores(), report)
    return {name: open_corpus(folder, name) for name in sources}


def _plan(
    name: str, settings: SourceSettings, encoder: Encoder, validation_every: int, folder: Path, anew: bool
) -> _Plan:
    if not _NAME.fullmatch(name):
        raise ValueError(f"source name {name!r}: use letters, digits, '_', '-' and '.', it names a folder")
    source, place = open_source(name, settings), folder / name
    if settings.messages_field is not None:
        encoder.check_markers()
    known = _known(place)
    plan = _Plan(source, encoder, validation_every, place, fingerprint(source, encoder, validation_every, known))
    index = read_index(place)
    if index is None or not index.complete or anew:
        return plan
    fault = damage(place, index)
    changed = [f"{fault}"] if fault else changes(known, plan.fingerprint) if known else ["its fingerprint is gone"]
    if changed:
        raise ValueError(
            f"source {name} no longer matches what was prepared in {place}: {'; '.join(changed)}. "
            "Prepare it anew with `looplm data prepare RECIPE --anew`, or choose another data.folder"
        )
    return plan


def _known(folder: Path) -> Fingerprint | None:
    """The fingerprint on record."""
    try:
        found: Fingerprint = json.loads((folder / _FINGERPRINT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _is_prepared(plan: _Plan) -> bool:
    index = read_index(plan.folder)
    return index is not None and index.complete and _fits(plan, index)


def _fits(plan: _Plan, index: Index) -> bool:
    """Whether what is written is a beginning, or all, of what the plan asks for."""
    known = _known(plan.folder)
    return known is not None and not changes(known, plan.fingerprint) and damage(plan.folder, index) is None


def _write(plan: _Plan, workers: int, report: Report | None) -> None:
    """Encode what is not written yet; start over where what is written is of no use."""
    chat = plan.source.settings.messages_field is not None
    index = read_index(plan.folder)
    if index is None or not _fits(plan, index):
        index = Index(plan.encoder.dtype.name, chat)
        remove_prepared(plan.folder)
        write_json(plan.folder / _FINGERPRINT, plan.fingerprint)
    with ShardWriter(plan.folder, index) as writer:
        writer.record()
        for chunk, corpora in encode_chunks(plan.encoder, _chunks(plan, index.documents), workers):
            for side, corpus in zip(SIDES, corpora, strict=True):
                if corpus is not None:
                    writer.append(side, corpus)
            writer.record()
            if report is not None:
                fraction = chunk.read / plan.source.size if plan.source.size else 0.0
                report(Preparation(plan.source.name, fraction, index.tokens))
        writer.record(complete=True)


def _chunks(plan: _Plan, skip: int) -> Iterator[Chunk]:
    """The documents after the first `skip`, some at a time."""
    read = 0.0

    def on_read(done: float) -> None:
        nonlocal read
        read = done

    train: list[Document] = []
    validation: list[Document] = []
    characters = 0
    for document, held_out in islice(split_source(plan.source, plan.validation_every, on_read), skip, None):
        (validation if held_out else train).append(document)
        characters += len(document_text(document))
        if characters >= CHUNK_CHARACTERS:
            yield Chunk(train, validation, read)
            train, validation, characters = [], [], 0
    if train or validation:
        yield Chunk(train, validation, read)

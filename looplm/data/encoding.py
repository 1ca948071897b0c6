"""Documents to one flat token stream; imports neither torch nor transformers, so that worker processes start fast."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from looplm.data.chat import TURN_END, TURN_START, Document, chat_parts, learnt_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_PIECE = 2**17  # characters encoded at a time
_PIECES_PER_CALL = 64


@dataclass(frozen=True, eq=False)
class EncodedCorpus:
    """Documents as one flat token stream; each begins with a begin token.

    Attributes:
        tokens: (number of tokens,) uint16, or uint32 where the vocabulary needs it.
        offsets: (documents + 1,) int64; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        characters: characters (Unicode code points) of all that is learnt: the texts, or what the assistant says.
        learnt: (number of tokens,) bool, for conversations: whether a token is a target. None for plain text, where
            every token is.
    """

    tokens: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    characters: int
    learnt: NDArray[np.bool_] | None = None

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    @property
    def text_tokens(self) -> int:
        """Targets of validation windows: all tokens but the begin tokens, or what the assistant says.

        Bits per character = (mean nats per text token / ln 2) * text_tokens / characters. In conversations the
        `<|im_end|>` of a turn is counted as a token and has no characters.
        """
        return len(self.tokens) - self.documents if self.learnt is None else int(np.count_nonzero(self.learnt))


@dataclass(frozen=True)
class Encoder:
    """What is needed of a tokenizer to encode documents; plain values, so that it can be sent to other processes.

    Attributes:
        tokenizer_json: the tokenizer of the `tokenizers` library, as its `tokenizer.json`.
        begin: the token that begins each document.
        vocabulary: number of entries, which decides the dtype of the tokens.
        turn_start: the token `<|im_start|>`; None where the vocabulary has none.
        turn_end: the token `<|im_end|>`.
    """

    tokenizer_json: str
    begin: int
    vocabulary: int
    turn_start: int | None
    turn_end: int | None

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> Self:
        """The encoder of a tokenizer; documents begin with its bos token, or its eos token where it has none.

        Raises:
            ValueError: it has neither a bos nor an eos token, or is not of the `tokenizers` library.
        """
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError("the tokenizer has neither a bos nor an eos token: set one, it begins each document")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json, which encoding needs: convert it")
        backend: Any = tokenizer.backend_tokenizer
        markers = (backend.token_to_id(TURN_START), backend.token_to_id(TURN_END))
        return cls(_without_limits(backend), int(begin), len(tokenizer), *markers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which tokens a text becomes."""
        identity = [self.begin, self.vocabulary, self.turn_start, self.turn_end, self.tokenizer_json]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every token."""
        return np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.uint32)

    def check_markers(self) -> None:
        """Raises ValueError where the vocabulary lacks a marker of ChatML."""
        for marker, token in ((TURN_START, self.turn_start), (TURN_END, self.turn_end)):
            if token is None:
                raise ValueError(f"the tokenizer has no token {marker}, which chat data needs: add it as a special one")

    def encode(self, documents: Sequence[Document]) -> EncodedCorpus:
        """Encode documents (all texts, or all conversations) into one stream, each with the begin token in front.

        A conversation gets no begin token where that is `<|im_start|>` itself. Special tokens that occur in the text
        are encoded as the characters they are written with: data cannot end a document or a turn. A text longer than
        MAX_PIECE characters is encoded in pieces, to bound memory; the pieces meet at line ends.

        Raises:
            ValueError: no documents, or conversations and a vocabulary without the markers of ChatML.
        """
        if not documents:
            raise ValueError("corpus is empty: no documents to encode")
        chat = not isinstance(documents[0], str)
        if chat:
            self.check_markers()
        ids = self._token_ids(part for document in documents for part, _ in self._parts(document))
        arrays: list[NDArray[np.unsignedinteger]] = []
        learnt: list[NDArray[np.bool_]] = []
        offsets = [0]
        for document in documents:
            length = 0
            for _, target in self._parts(document):
                arrays.append(np.asarray(next(ids), dtype=self.dtype))
                length += len(arrays[-1])
                if chat:
                    learnt.append(np.full(len(arrays[-1]), target))
            offsets.append(offsets[-1] + length)
        characters = sum(map(learnt_characters, documents))
        mask = np.concatenate(learnt) if chat else None
        return EncodedCorpus(np.concatenate(arrays), np.asarray(offsets, dtype=np.int64), characters, mask)

    def _parts(self, document: Document) -> Iterator[tuple[str | int, bool]]:
        """The document as texts of bounded length and single tokens, each with whether it is a target."""
        if isinstance(document, str):
            yield self.begin, True
            yield from ((piece, True) for piece in _pieces(document))
            return
        if self.begin != self.turn_start:
            yield self.begin, False
        markers = {TURN_START: self.turn_start, TURN_END: self.turn_end}
        for text, is_marker, learnt in chat_parts(document):
            if is_marker:
                token = markers[text]
                assert token is not None
                yield token, learnt
            else:
                yield from ((piece, learnt) for piece in _pieces(text))

    def _token_ids(self, parts: Iterable[str | int]) -> Iterator[list[int]]:
        """The tokens of each part, encoded some texts at a time."""
        parts = iter(parts)
        while batch := list(islice(parts, _PIECES_PER_CALL)):
            texts = [part for part in batch if isinstance(part, str)]
            encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            for part in batch:
                yield next(encoded).ids if isinstance(part, str) else [part]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}


def encode_documents(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document]) -> EncodedCorpus:
    """Encode documents in memory; see `Encoder.encode` and `Encoder.of` for the errors."""
    return Encoder.of(tokenizer).encode(documents)


def _without_limits(backend: Tokenizer) -> str:
    """The tokenizer's JSON without truncation and padding, which calls leave behind in it."""
    values = json.loads(backend.to_str())
    return json.dumps({**values, "truncation": None, "padding": None}, ensure_ascii=False)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of bounded length, cut after a line end where there is one; an empty one is one piece.

    A tokenizer needs some 140 bytes of memory a character while it encodes a text.
    """
    first = 0
    while len(text) - first > MAX_PIECE:
        line_end = text.rfind("\n", first, first + MAX_PIECE)
        last = line_end + 1 if line_end >= 0 else first + MAX_PIECE
        yield text[first:last]
        first = last
    yield text[first:]

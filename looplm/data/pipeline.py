"""A token stream to windows: a fixed plan of sequences over it, and validation batches.

Packing is planned ahead: window i covers stream positions i*S to (i+1)*S, so consecutive windows share one token and
every token but the first of the stream is the target of exactly one position. `looplm.data.mixture` draws training
samples from windows. The paper's synthetic tasks are packed with attention kept inside each document
(`separate_documents`); for pretraining it does not say, so both ways are here.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from absl import logging as absl_logging
from numpy.typing import NDArray

from looplm.data.encoding import EncodedCorpus


def _is_not_jax_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load jax profiler")


# grain tells users of other frameworks that jax is missing; only that message, only while it is imported
absl_logging.get_absl_logger().addFilter(_is_not_jax_notice)
try:
    import grain
finally:
    absl_logging.get_absl_logger().removeFilter(_is_not_jax_notice)

IGNORED_LABEL = -100


class Windows:
    """All windows of S positions over a corpus, by number: a random-access source for grain.

    Item i is a dict of int64 arrays of shape (S,):
        input_ids: stream positions i*S ... i*S + S - 1.
        labels: ALREADY SHIFTED, stream positions i*S + 1 ... i*S + S; labels[k] is the target of input_ids[k].
        position_ids: 0 ... S-1; with `separate_documents` they begin again at 0 with each document, from which
            transformers builds a mask that keeps documents apart (when neither attention_mask nor cache is given).

    Training windows (the default): a last partial window is dropped; the begin token that follows a document is a
    target like any other, also under `separate_documents`: it is the end of that document, and only there does a model
    learn to stop.
    Validation windows (`keep_remainder`): the last window is padded with label -100, and so are the targets that
    are begin tokens. Each text token is then a target exactly once and nothing else is, which makes bits per
    character exact: summed nats / ln 2 / `corpus.characters`.
    Where a corpus says what is learnt (conversations), every other target is -100 in both.

    Args:
        corpus: the stream to cut.
        sequence_length: S, in tokens.
        separate_documents: restart positions at each document.
        keep_remainder: make validation windows.

    Raises:
        ValueError: S is below 1, or the corpus has fewer than S + 1 tokens (with `keep_remainder`: than 2).
    """

    def __init__(
        self,
        corpus: EncodedCorpus,
        sequence_length: int,
        *,
        separate_documents: bool = False,
        keep_remainder: bool = False,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length}: give at least 1")
        tokens = len(corpus.tokens)
        if tokens < (2 if keep_remainder else sequence_length + 1):
            raise ValueError(
                f"corpus has {tokens} tokens, fewer than one sequence of {sequence_length + 1}: "
                "use more text or a shorter sequence"
            )
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.separate_documents = separate_documents
        self.keep_remainder = keep_remainder
        targets = tokens - 1
        self._length = -(-targets // sequence_length) if keep_remainder else targets // sequence_length

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Windows({len(self)} windows of {self.sequence_length} tokens)"

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        """The window of that number, 0 ... len - 1; IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        size, offsets = self.sequence_length, self.corpus.offsets
        first = index * size
        positions = np.arange(first, first + size + 1)
        # padding counts as the continuation of the last document: no query of a real position ever sees it
        starts = offsets[np.searchsorted(offsets[:-1], positions, side="right") - 1]
        chunk = np.full(size + 1, self.corpus.tokens[0], dtype=np.int64)
        real = self.corpus.tokens[first : first + size + 1]
        chunk[: len(real)] = real
        labels = chunk[1:].copy()
        if self.keep_remainder:
            labels[len(real) - 1 :] = IGNORED_LABEL
            labels[starts[1:] == positions[1:]] = IGNORED_LABEL
        if self.corpus.learnt is not None:
            labels[: len(real) - 1][~self.corpus.learnt[first + 1 : first + size + 1]] = IGNORED_LABEL
        origins = np.maximum(starts, first) if self.separate_documents else first
        return {"input_ids": chunk[:-1], "labels": labels, "position_ids": (positions - origins)[:-1]}


def validation_batches(
    windows: Windows, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """All windows in order, (B, S) int64 each; the last batch may be smaller.

    Args:
        windows: made with `keep_remainder=True` where every text token has to be counted.
        batch_size: B, windows a batch.
        limit: stop after this many batches; None goes through all of them.

    Raises:
        ValueError: batch_size below 1, or limit below 1.
    """
    _check_batch_size(batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more batches, or None for all")
    batches = grain.MapDataset.source(windows).batch(batch_size, drop_remainder=False)
    # indexed within its length: a MapDataset wraps around beyond it
    return (_tensors(batches[i]) for i in range(min(len(batches), limit or len(batches))))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")


def _tensors(batch: dict[str, NDArray[np.int64]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}

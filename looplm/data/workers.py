"""Encoding in several processes; results come back in order.

A process each with one thread: the threads of `tokenizers` inside one process gain little on text that is handed over
and taken back in Python (docs/log.md has the numbers). Workers are spawned, not forked (a fork of a process that has
run torch may hang), import neither torch nor transformers, and end by themselves when their parent is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice

from looplm.data.chat import Document
from looplm.data.encoding import EncodedCorpus, Encoder


@dataclass(frozen=True)
class Chunk:
    """Some documents of a source, and how much of it has been read with them."""

    train: list[Document]
    validation: list[Document]
    read: float


Encoded = tuple[EncodedCorpus | None, EncodedCorpus | None]
"""The two sides of a chunk; None where it has no document there."""


def encode_chunks(encoder: Encoder, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with what it becomes, in order.

    With one worker, or where there is but one chunk, no process is started. Otherwise two chunks a worker are in
    flight at most, so memory does not grow with the source.

    Raises:
        ChildProcessError: a worker was killed, for instance because memory ran out.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, 2))
    if workers == 1 or len(first) < 2:
        yield from ((chunk, _encode(encoder, chunk)) for chunk in chain(first, chunks))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(encoder,))
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chain(first, chunks):
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) >= 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process that encodes was killed, probably for want of memory: give fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encode(encoder: Encoder, chunk: Chunk) -> Encoded:
    sides = (chunk.train, chunk.validation)
    train, validation = (encoder.encode(documents) if documents else None for documents in sides)
    return train, validation


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    """Once in each worker: one thread, leave Ctrl-C to the parent, and end with it."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = encoder


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Encoded:
    assert _encoder is not None
    return _encode(_encoder, chunk)

"""Encoding in processes: in order, bounded, and a clear word when a worker dies."""

import multiprocessing
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from looplm.data.encoding import Encoder
from looplm.data.tokenizers import train_bpe
from looplm.data.workers import Chunk, available_cores, encode_chunks

ENCODER = Encoder.of(train_bpe(["a loop of loops"] * 3, 262))


def chunks(count: int, drawn: list[int] | None = None) -> Iterator[Chunk]:
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        yield Chunk([f"loop {number}"] * (1 + number % 3), ["held out"] if number % 2 else [], number)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_with_their_chunks(workers):
    for number, (chunk, (train, validation)) in enumerate(encode_chunks(ENCODER, chunks(9), workers)):
        assert chunk.read == number
        assert train is not None and np.array_equal(train.tokens, ENCODER.encode(chunk.train).tokens)
        assert (validation is not None) == bool(number % 2)


def test_no_more_than_two_chunks_a_worker_are_in_flight():
    drawn: list[int] = []
    for number, _ in enumerate(encode_chunks(ENCODER, chunks(30, drawn), 2)):
        assert len(drawn) <= number + 4
    assert len(drawn) == 30


@pytest.mark.parametrize(("count", "workers"), [(0, 2), (1, 2), (5, 1)])
def test_little_work_starts_no_process(monkeypatch, count, workers):
    monkeypatch.setattr(multiprocessing, "get_context", None)
    assert len(list(encode_chunks(ENCODER, chunks(count), workers))) == count


def test_a_killed_worker_is_an_error_not_a_hang():
    results = encode_chunks(ENCODER, chunks(200), 2)
    next(results)
    (worker, *_) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="was killed, probably for want of memory: give fewer workers"):
        list(results)
    assert multiprocessing.active_children() == []


def test_stopping_early_ends_the_workers():
    results = encode_chunks(ENCODER, chunks(50), 2)
    next(results)
    results.close()
    assert multiprocessing.active_children() == []


def test_available_cores():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)

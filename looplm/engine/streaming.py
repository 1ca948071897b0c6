"""Tokens as they come, for asyncio: the engine ticks in a thread of its own, and each request is an async iterator.

Only that thread touches the engine's state; requests and cancellations reach it through a queue between two ticks. An
iterator that is closed before its end, or whose task is cancelled, cancels its request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from looplm.engine.engine import Engine, Prompt
from looplm.engine.sampling import SamplingParams
from looplm.engine.sequence import Completion, Sequence


@dataclass(frozen=True)
class Piece:
    """What is new of one sample.

    Attributes:
        index: which of the `n` samples.
        token_ids, exit_depths: of the new tokens (the last piece may have none); depths counted from 1.
        text: what is settled since the piece before: whole characters, and nothing that a stop string may take back.
        completion: everything, with the last piece of the sample; else None.
    """

    index: int
    token_ids: list[int]
    exit_depths: list[int]
    text: str
    completion: Completion | None


@dataclass
class _Listener:
    """Where the pieces of one request go, and what each of its samples has sent.

    `running` counts samples whose last piece is not sent yet, `unfinished` those whose last piece was not fetched.
    """

    loop: asyncio.AbstractEventLoop
    running: int
    unfinished: int
    queue: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)

    def put(self, item: Piece | Exception) -> None:
        """From the engine's thread; an event loop that is gone wants nothing any more."""
        try:
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:
            assert self.loop.is_closed()


class AsyncEngine:
    """An `Engine` for asyncio. Use it as an async context manager, or call `close`.

    Args:
        engine: not to be used by anybody else meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._jobs: list[Callable[[], None]] = []
        self._listeners: dict[int, _Listener] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="looplm-engine", daemon=True)
        self._thread.start()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> AsyncIterator[Piece]:
        """The pieces of one request, of all its samples as they come; the last of each carries its completion.

        Raises:
            ValueError: as `Engine.prepare`; RuntimeError: the engine is closed or broken.
        """
        sequences = self.engine.prepare(prompt, params, priority)
        request, listener = sequences[0].request, _Listener(asyncio.get_running_loop(), len(sequences), len(sequences))

        def begin() -> None:
            self._listeners[request] = listener
            self.engine.submit(sequences)

        if not self._post(begin):
            raise RuntimeError("the engine is closed") from self._broken
        try:
            while listener.unfinished:
                item = await listener.queue.get()
                if isinstance(item, Exception):
                    raise RuntimeError("the engine has stopped working") from item
                listener.unfinished -= item.completion is not None
                yield item
        finally:
            if listener.unfinished:
                self._post(lambda: self._cancel(request))

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> list[Completion]:
        """The completions of one prompt, `params.n` in order; raises as `stream`."""
        pieces = self.stream(prompt, params, priority)
        found = [piece.completion async for piece in pieces if piece.completion is not None]
        return sorted(found, key=lambda completion: completion.index)

    def close(self) -> None:
        """Cancel what is unfinished and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    # --- in the engine's thread, but for `_post` ---

    def _post(self, job: Callable[[], None]) -> bool:
        """Hand a job to the thread; False where it has ended."""
        with self._wake:
            if self._closed or self._broken is not None:
                return False
            self._jobs.append(job)
            self._wake.notify()
            return True

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._jobs or self._closed or self.engine.busy)
                    jobs, self._jobs, closed = self._jobs, [], self._closed
                for job in jobs:
                    job()
                if closed:
                    break
                for sequence in self.engine.step() if self.engine.busy else ():
                    self._publish(sequence)
            for request in list(self._listeners):
                self._cancel(request)
        except Exception as error:
            with self._wake:
                self._broken = error
            for listener in self._listeners.values():
                listener.put(error)

    def _cancel(self, request: int) -> None:
        for sequence in self.engine.cancel(request):
            self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        listener = self._listeners.get(sequence.request)
        if listener is None:
            return
        tokens, characters = listener.sent.get(sequence.index, (0, 0))
        text = sequence.stream.settled if sequence.stream is not None else ""
        done = sequence.completion() if sequence.finish_reason is not None else None
        listener.sent[sequence.index] = (len(sequence.new), max(len(text), characters))
        new, depths = sequence.new[tokens:], sequence.exit_depths[tokens:]
        listener.put(Piece(sequence.index, new, depths, text[characters:], done))
        if done is not None:
            listener.running -= 1
        if not listener.running:
            del self._listeners[sequence.request]

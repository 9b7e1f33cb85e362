"""What a request has given and its consumer has not taken: filled by the engine's thread, awaited in any event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from llama_fast.engine.outputs import FinishReason, RequestOutput, TokenChunk
from llama_fast.engine.request import Request
from llama_fast.errors import LlamaFastError


class Bell:
    """Wakes coroutines of any event loops, from any thread.

    Without a lock: a coroutine may be closed by the garbage collector, wherever the thread that it runs in stands.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    def ring(self) -> None:
        """Let all who wait look again."""
        for _ in range(len(self._waiting)):
            with suppress(IndexError):  # one was cancelled since
                future = self._waiting.popleft()
                with suppress(RuntimeError):  # its loop was closed
                    future.get_loop().call_soon_threadsafe(_wake, future)

    async def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for what another thread makes true, and then rings."""
        while not ready():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            try:
                if not ready():  # else it became true before the other thread could see the future
                    await future
            finally:
                with suppress(ValueError, IndexError):
                    self._waiting.remove(future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass
class _Given:
    """How much of a sample has been put in, taken or not."""

    num_ids: int = 0
    num_chars: int = 0
    ended: bool = False


@dataclass
class _Pending:
    """What of a sample nobody has taken."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Mailbox:
    """One request's chunks, and its end.

    Chunks of a sample that are not taken become one, so they take no more memory than the request's output, and the
    engine never waits for their consumer.

    Args:
        request_id: the caller's name for it.
        request: only the engine's thread touches it until `ended`.
        streams: whether chunks are wanted; else only the end is told.
    """

    def __init__(self, request_id: str, request: Request, *, streams: bool) -> None:
        self.request_id, self.request = request_id, request
        self.streams = streams
        self.abort_asked = False
        self.ended = False
        self.error: LlamaFastError | None = None
        self._lock = threading.Lock()
        # By sample, the one that has waited longest first.
        self._pending: dict[int, _Pending] = {}
        self._given = [_Given() for _ in request.samples]
        self._changed, self._over = Bell(), Bell()

    # --- the engine's side --------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Put in what the last step gave the request's samples; ignored once it has ended."""
        if not self.streams:
            return
        with self._lock:
            for index in range(0 if self.ended else len(self._given)):
                self._update_sample(index)
        self._changed.ring()

    def _update_sample(self, index: int) -> None:
        sample, given = self.request.samples[index], self._given[index]
        if given.ended:
            return
        token_ids = sample.token_ids[given.num_ids :]
        reason = sample.finish_reason
        if reason is None and not token_ids:
            return
        # At its end all that is missing: a step that ends a request tells nothing of its other samples' tokens.
        text = sample.text[given.num_chars :]
        given.num_ids += len(token_ids)
        given.num_chars += len(text)
        given.ended = reason is not None
        # An error is raised, behind what is here.
        reason = None if reason == "error" else reason
        if token_ids or text or reason:
            pending = self._pending.setdefault(index, _Pending())
            pending.texts.append(text)
            pending.token_ids += token_ids
            pending.finish_reason = reason

    def end(self, error: LlamaFastError | None = None) -> None:
        """Nothing follows, or `error` does. Only the first call counts."""
        with self._lock:
            if self.ended:
                return
            self.error = error
            self.ended = True
        self._changed.ring()
        self._over.ring()

    # --- the consumer's side ------------------------------------------------------------------------------------------

    def take(self) -> TokenChunk | None:
        """What one sample has given since its last chunk; None if there is nothing."""
        with self._lock:
            if not self._pending:
                return None
            index = next(iter(self._pending))
            pending = self._pending.pop(index)
        return TokenChunk(
            self.request.index, index, "".join(pending.texts), pending.token_ids, finish_reason=pending.finish_reason
        )

    async def wait_for_chunk(self) -> None:
        """Wait for a chunk or the end."""
        await self._changed.wait_until(lambda: bool(self._pending) or self.ended)

    async def wait_for_end(self) -> None:
        """Wait until the engine has done with the request."""
        await self._over.wait_until(lambda: self.ended)

    def output(self) -> RequestOutput:
        """The whole output of a request that has ended.

        Raises:
            LlamaFastError: what it ended with.
        """
        if self.error is not None:
            raise self.error
        return self.request.output()

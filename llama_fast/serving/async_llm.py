"""AsyncLLM: one engine for many callers at once, from any event loop."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from llama_fast.engine.inputs import Prompt
from llama_fast.engine.llm import LLM
from llama_fast.engine.memory import check_sizes
from llama_fast.engine.outputs import EngineStats, RequestOutput, TokenChunk
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import RequestError, brief
from llama_fast.serving.engine_thread import EngineThread
from llama_fast.serving.mailbox import Mailbox

DEFAULT_MAX_WAITING = 1024
DEFAULT_STALL_TIMEOUT_S = 300.0


class AsyncLLM:
    """An LLM for many concurrent callers: what they ask for runs in one batch, on a thread of its own.

    ```python
    async with AsyncLLM("path/to/checkpoint") as llm:
        async for chunk in llm.generate("Once upon a time", SamplingParams(temperature=0.8, seed=1)):
            print(chunk.text, end="", flush=True)
    ```

    A request's tokens are those of `LLM.generate`, bit for bit, whatever runs beside it. Every method may be called
    from any thread and any event loop. While it is open, the LLM's own methods that generate raise RequestError.

    Args:
        model: checkpoint folder or hub id, or an LLM, which stays open when this is closed.
        max_waiting: requests that may be unfinished at once; further ones stand in line, first come, first served.
        stall_timeout: seconds after which a step of the engine counts as hung: all stacks go to stderr, and every
            caller gets an EngineDeadError, within two seconds more. None: never.
        llm_arguments: of `LLM`.

    Raises:
        RequestError: an argument is out of range, or the LLM is generating.
        LlamaFastError: what `LLM` raises.
    """

    def __init__(
        self,
        model: str | Path | LLM,
        *,
        max_waiting: int = DEFAULT_MAX_WAITING,
        stall_timeout: float | None = DEFAULT_STALL_TIMEOUT_S,
        **llm_arguments: Any,
    ) -> None:
        check_sizes(max_waiting=max_waiting, max_seq_len=None, cache_bytes=None)
        is_number = isinstance(stall_timeout, numbers.Real) and not isinstance(stall_timeout, bool)
        if stall_timeout is not None and not (is_number and 0 < stall_timeout < math.inf):
            raise RequestError(f"stall_timeout={brief(stall_timeout)} must be seconds, above 0, or None")
        self._owns_llm = not isinstance(model, LLM)
        if isinstance(model, LLM):
            if llm_arguments:
                raise RequestError(f"{', '.join(llm_arguments)}: the LLM is made already; give it a folder instead")
            self.llm = model
        else:
            self.llm = LLM(model, **llm_arguments)
        self._thread = EngineThread(self.llm.engine, max_waiting, stall_timeout)
        # The thread knows nothing of this object, so one that is forgotten ends its thread.
        weakref.finalize(self, self._thread.stop)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        wait: bool = True,
    ) -> ChunkStream:
        """Continue a prompt, handing out text as it becomes final.

        The request is queued by the call itself, in the order of calls. The texts of a sample's chunks, joined, are the
        text that `LLM.generate` returns. What the consumer has not taken yet is merged into one chunk a sample: a slow
        one gets fewer and longer chunks, and holds up nobody.

        A request that fails raises its error behind the chunks that were made before; no chunk says "error". One sample
        of several may fail alone: the error comes when the others have ended.

        Args:
            prompt: a text, a list of token ids, or a chat (a list of messages).
            sampling_params: unset fields come from generation_config.json.
            request_id: for `abort`; must not be that of a request that has not ended. Default: a new one.
            priority: lower ones run first, equal ones in the order of calls; in line everybody is equal.
            cache_salt: the prompt shares the cache's pages only with those of the same salt.
            timeout: seconds from the call on, time in line included, after which it fails with RequestTimeoutError.
            wait: whether it may stand in line where `max_waiting` requests are unfinished.

        Returns:
            An asynchronous iterator. Closing it (`aclose`), dropping it (`break`) or cancelling the task that waits for
            it ends the request before the engine's next step. Where a task may be cancelled between two chunks and the
            iterator is kept, `contextlib.aclosing` closes it.

        Raises:
            RequestError: the prompt or an argument is invalid, the id is taken, or this AsyncLLM is closed or was made
                before a fork.
            QueueFullError: there is no room, and `wait` is false.
            EngineDeadError: the engine met an error it cannot go on after.
        """
        box = self._submit(prompt, sampling_params, request_id, priority, cache_salt, timeout, wait, streams=True)
        return ChunkStream(self, box)

    async def complete(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
        wait: bool = True,
    ) -> RequestOutput:
        """Like `generate`, for the whole output, as `LLM.generate` gives it; a request that fails raises its error."""
        box = self._submit(prompt, sampling_params, request_id, priority, cache_salt, timeout, wait, streams=False)
        try:
            await box.wait_for_end()
        except BaseException:
            self._thread.drop(box)
            raise
        return box.output()

    async def abort(self, request_id: str) -> bool:
        """End a request: it keeps what it has, with finish_reason "abort". Returns when the engine has let go of it.

        Returns:
            Whether there was such a request, it had not ended, and no abort had been asked for before.

        Raises:
            EngineDeadError: the engine met an error it cannot go on after.
        """
        self._thread.check_alive()
        box = self._thread.abort(request_id)
        if box is None:
            return False
        await box.wait_for_end()
        self._thread.check_alive()
        return True

    def stats(self) -> EngineStats:
        """Counts of the engine; requests that stand in line are among the waiting.

        Raises:
            RequestError, EngineDeadError: it is closed or dead.
        """
        self._thread.check()
        stats = self.llm.stats()
        return replace(stats, waiting=stats.waiting + self._thread.num_queued)

    async def close(self) -> None:
        """End every request with what it has, finish_reason "abort", then the thread; twice is once.

        An LLM that was loaded here is closed, too. A step that hangs is waited for until `stall_timeout`.
        """
        if self._thread.is_forked:
            return
        self._thread.stop()
        await self._thread.wait_until_over()
        # Over, it has a line or two to go, unless it was given up in a step that hangs.
        if self._thread.join(timeout=5.0) and self._owns_llm:
            self.llm.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        cache_salt: str,
        timeout: float | None,
        wait: bool,
        *,
        streams: bool,
    ) -> Mailbox:
        self._thread.check()
        params = SamplingParams() if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams or None; got {type(params).__name__}")
        if request_id is not None and not isinstance(request_id, str):
            raise RequestError(f"request_id={brief(request_id)} must be a text or None")
        request = self.llm.request(prompt, params, priority=priority, cache_salt=cache_salt, timeout=timeout)
        return self._thread.submit(request, request_id, wait=wait, streams=streams)


class ChunkStream(AsyncIterator[TokenChunk]):
    """One request's chunks, as `AsyncLLM.generate` returns it.

    Attributes:
        request_id: what `AsyncLLM.abort` calls the request.
    """

    def __init__(self, llm: AsyncLLM, box: Mailbox) -> None:
        self.request_id = box.request_id
        self._llm = llm  # which must not end its thread meanwhile
        self._box = box
        self._closed = False

    async def __anext__(self) -> TokenChunk:
        if self._llm._thread.is_forked:
            self._llm._thread.check()
        while not self._closed:
            # Asked first: what comes between the two lines is taken then.
            ended = self._box.ended
            chunk = self._box.take()
            if chunk is not None:
                return chunk
            if ended:
                self._closed = True
                if self._box.error is not None:
                    raise self._box.error
                break
            try:
                await self._box.wait_for_chunk()
            except BaseException:
                self._drop()
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the request, and return when the engine has let go of it; nothing more is handed out."""
        self._drop()
        if not self._llm._thread.is_forked:
            await self._box.wait_for_end()

    def _drop(self) -> None:
        self._closed = True
        if not self._box.ended:
            self._llm._thread.drop(self._box)

    def __del__(self) -> None:
        self._drop()

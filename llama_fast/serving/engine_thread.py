"""One engine, run by a thread of its own for requests from all other threads, and how each of them ends."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request, Sample
from llama_fast.errors import (
    EngineDeadError,
    LlamaFastError,
    RequestError,
    RequestFailedError,
    RequestTimeoutError,
    without_places,
)
from llama_fast.serving.mailbox import Bell, Mailbox
from llama_fast.serving.room import Room, deadline_of, own
from llama_fast.serving.watchdog import Watchdog

logger = logging.getLogger(__name__)

# How long the interpreter's exit waits for a step to end.
_EXIT_WAIT_S = 5.0


class EngineThread:
    """Holds the engine's session until it is stopped or the engine is dead.

    Args:
        engine: nobody else may generate with it meanwhile.
        max_open: requests that are let in and have not ended; further ones stand in line.
        stall_timeout: seconds after which a step counts as hung; None: never.

    Attributes:
        is_stalled: whether a step has hung; the thread was given up.

    Raises:
        RequestError: somebody is generating with the engine.
        EngineDeadError: the engine is dead.
    """

    def __init__(self, engine: Engine, max_open: int, stall_timeout: float | None) -> None:
        self._engine = engine
        self._process = os.getpid()
        # Requests that were let in and that the thread has not seen; None: stop.
        self._inbox: queue.SimpleQueue[Mailbox | None] = queue.SimpleQueue()
        self._unwanted: deque[Mailbox] = deque()
        self._room = Room(max_open, self._inbox.put)
        self._stopping = False
        # The thread's own.
        self._fresh: deque[Mailbox] = deque()
        self._in_engine: dict[Request, Mailbox] = {}
        self._stall_timeout = stall_timeout
        self._watchdog: Watchdog | None = None
        self.is_stalled = False
        self._is_over, self._over = False, Bell()
        self._refused: LlamaFastError | None = None
        self._entered = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llama_fast engine", daemon=True)
        _threads.add(self)
        self._thread.start()
        self._entered.wait()
        refused = self._refused or self._room.refusal
        if refused is not None:
            raise refused

    # --- for all threads ----------------------------------------------------------------------------------------------

    @property
    def is_forked(self) -> bool:
        """Whether this is a copy in another process, where no thread runs and a lock may be taken for ever."""
        return os.getpid() != self._process

    @property
    def num_queued(self) -> int:
        """Requests that the engine has not seen."""
        return self._room.line_length + self._inbox.qsize()

    def check(self) -> None:
        """Refuse what could not be served any more.

        Raises:
            EngineDeadError: the engine is dead.
            RequestError: it was stopped, or this is another process.
        """
        self.check_alive()
        if self._stopping:
            raise _closed()

    def check_alive(self) -> None:
        """The same, but for one that was stopped."""
        if self.is_forked:
            raise RequestError("the AsyncLLM was made in another process; make one after the fork")
        if isinstance(self._room.refusal, EngineDeadError):
            raise own(self._room.refusal)

    def submit(self, request: Request, request_id: str | None, *, wait: bool, streams: bool) -> Mailbox:
        """See `Room.enter`, and `check`."""
        self.check()
        return self._room.enter(request, request_id, wait=wait, streams=streams)

    def abort(self, request_id: str) -> Mailbox | None:
        """Ask for a request's end: before the next step. None if there is no such request, or it was asked for."""
        box = self._room.ask_abort(request_id)
        if box is not None:
            self.drop(box)
        return box

    def drop(self, box: Mailbox) -> None:
        """Nobody wants this request any more; for finalizers too. The thread is at work as long as it has not ended."""
        self._unwanted.append(box)

    def stop(self) -> None:
        """End all requests with what they have, then the thread; for finalizers too."""
        self._stopping = True
        self._inbox.put(None)

    async def wait_until_over(self) -> None:
        """Wait for the thread's end, or for one that hangs to be given up."""
        await self._over.wait_until(lambda: self._is_over)

    def join(self, timeout: float) -> bool:
        """Wait for the thread's end; whether it came. One that was given up is not waited for."""
        self._thread.join(0.0 if self.is_stalled else timeout)
        return not self._thread.is_alive()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._stall_timeout is not None:
                self._watchdog = Watchdog(self._stall_timeout, self._stalled)
            self._hold_sessions()
        except EngineDeadError as error:
            self._die(error)
        except BaseException as error:
            logger.exception("the engine's thread failed")
            self._die(EngineDeadError(f"the engine's thread failed ({_text(error)}); start a new process"))
        finally:
            # The session's end has aborted what ran.
            for box in self._room.shut(_closed()):
                _end_aborted(box)
            self._in_engine.clear()
            self._fresh.clear()
            if self._watchdog is not None:
                self._watchdog.stop()
            self._is_over = True
            self._over.ring()
            self._entered.set()

    def _hold_sessions(self) -> None:
        while not self._stopping:
            try:
                # A new one whenever nothing runs: the weights may be others by now. While the thread waits it holds one
                # too, so that other callers of the engine are always refused.
                with self._engine.session():
                    self._entered.set()
                    if self._fresh:
                        self._serve()
                    else:
                        self._wait()
            except EngineDeadError:
                raise
            except Exception as error:
                if not self._entered.is_set():
                    self._refused = _told(error)
                    return
                self._fail_all(error)
                if not self._stopping:
                    self._wait()

    def _wait(self) -> None:
        box = self._inbox.get()
        if box is not None:
            self._fresh.append(box)

    def _serve(self) -> None:
        """Run until nothing runs."""
        try:
            self._engine.make_ready()
            while not self._stopping and (self._fresh or self._engine.has_work):
                self._take_in()
                self._drop_unwanted()
                for box in self._room.expired():
                    seconds = deadline_of(box) - box.request.metrics.arrival
                    box.end(RequestTimeoutError(f"the request found no room within timeout={seconds:g} seconds"))
                if self._engine.has_work:
                    with nullcontext() if self._watchdog is None else self._watchdog.step():
                        samples = self._engine.step()
                    self._deliver(samples)
        except EngineDeadError:
            raise
        except Exception as error:
            # Here: leaving the session aborts what runs, and it would seem to have been asked for.
            self._fail_all(error)

    def _take_in(self) -> None:
        while not self._inbox.empty():
            self._wait()
        while self._fresh:
            box = self._fresh[0]
            try:
                self._engine.add(box.request)
            except RequestError as error:
                self._finish(box, error)
            else:
                self._in_engine[box.request] = box
            self._fresh.popleft()

    def _drop_unwanted(self) -> None:
        for _ in range(len(self._unwanted)):
            box = self._unwanted.popleft()
            if self._room.leave_line(box):
                _end_aborted(box)
            elif box.request in self._in_engine:
                self._engine.abort_soon(box.request)
            elif not box.ended:
                self._unwanted.append(box)  # it was let in this moment: its turn comes once the engine has it

    def _deliver(self, samples: Iterable[Sample]) -> None:
        for request in dict.fromkeys(sample.request for sample in samples):
            box = self._in_engine.get(request)
            if box is not None:
                failed = _update(box)
                if failed is not None:
                    self._engine.abort_soon(request)
                if failed is not None or request.finished:
                    self._finish(box, request.error or failed)

    def _finish(self, box: Mailbox, error: LlamaFastError | None) -> None:
        """A request is over: its id and its room are free before its consumer hears of it."""
        self._in_engine.pop(box.request, None)
        self._room.leave(box)
        box.end(error)

    def _fail_all(self, error: Exception) -> None:
        """End what the thread has seen. What failed was nobody's affair, so everybody's."""
        for box in [*self._in_engine.values(), *self._fresh]:
            failed = _update(box)
            # Some may have ended in the step that failed.
            self._finish(box, box.request.error or failed if box.request.finished else own(_told(error)))
        self._fresh.clear()

    # --- the end of the engine ----------------------------------------------------------------------------------------

    def _stalled(self) -> None:
        self._die(
            EngineDeadError(
                f"a step has taken more than stall_timeout={self._stall_timeout:g} seconds, its stacks are on stderr; "
                "start a new process"
            )
        )
        self._engine.declare_dead("a step has not returned in time; start a new process")
        self.is_stalled = self._is_over = True
        self._over.ring()

    def _die(self, error: EngineDeadError) -> None:
        """Tell everybody, now and later. In the engine's thread or, where that hangs, another one."""
        boxes = self._room.shut(error)
        self.stop()
        for box in boxes:
            box.end(own(error))


def _end_aborted(box: Mailbox) -> None:
    """End a request that is not in the engine, or not any more."""
    failed: LlamaFastError | None = None
    for sample in box.request.samples:
        if sample.finish_reason is None:
            try:
                sample.finish("abort")
            except Exception as error:
                failed = _told(error)
            box.request.metrics.finished = time.monotonic()
    box.end(box.request.error or failed or _update(box))


def _update(box: Mailbox) -> LlamaFastError | None:
    """`box.update()`, or why its text cannot be made: the others are not to suffer for it."""
    try:
        box.update()
    except Exception as error:
        return _told(error)
    return None


def _closed() -> RequestError:
    return RequestError("this AsyncLLM is closed; make a new one")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {without_places(' '.join(str(error).split()))[:200]}"


def _told(error: Exception) -> LlamaFastError:
    """What a request's caller is told."""
    if isinstance(error, LlamaFastError):
        return error
    told = RequestFailedError(f"a step failed: {_text(error)}")
    told.__cause__ = error
    return told


_threads: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """A thread that is still in a step when the interpreter goes away would crash it."""
    running = [thread for thread in _threads if not thread.is_forked]
    for thread in running:
        thread.stop()
    until = time.monotonic() + _EXIT_WAIT_S
    for thread in running:
        thread.join(max(0.0, until - time.monotonic()))

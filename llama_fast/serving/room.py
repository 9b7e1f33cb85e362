"""Who is let in: so many requests at once, the others stand in line. For all threads."""

from __future__ import annotations

import copy
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from llama_fast.engine.request import Request
from llama_fast.errors import LlamaFastError, QueueFullError, RequestError, brief
from llama_fast.serving.mailbox import Mailbox


class Room:
    """Requests that have not ended, by their ids.

    Args:
        max_open: so many are let in at once.
        let_in: told of each one, in order; it is called under the room's lock.
    """

    def __init__(self, max_open: int, let_in: Callable[[Mailbox], None]) -> None:
        self._max_open = max_open
        self._let_in = let_in
        self._ids = itertools.count()
        # No finalizer may take it: one can run wherever a thread stands.
        self._lock = threading.Lock()
        self._open: dict[str, Mailbox] = {}
        self._line: OrderedDict[str, Mailbox] = OrderedDict()
        # Of the line's requests, the first.
        self._deadline = math.inf
        self.refusal: LlamaFastError | None = None

    @property
    def line_length(self) -> int:
        """Requests that stand in line."""
        return len(self._line)

    def enter(self, request: Request, request_id: str | None, *, wait: bool, streams: bool) -> Mailbox:
        """Let a request in, or give it its place in line; the arguments are those of `AsyncLLM.generate`.

        Raises:
            RequestError: the id is taken.
            QueueFullError: there is no room and `wait` is false.
            LlamaFastError: what the room was shut with.
        """
        with self._lock:
            if self.refusal is not None:
                raise own(self.refusal)
            if request_id is None:
                request_id = next(name for name in map("request-{}".format, self._ids) if not self._find(name))
            elif self._find(request_id) is not None:
                raise RequestError(f"request_id={brief(request_id)} is the id of a request that has not ended")
            box = Mailbox(request_id, request, streams=streams)
            if len(self._open) < self._max_open and not self._line:
                self._open_to(box)
            elif wait:
                self._line[request_id] = box
                self._deadline = min(self._deadline, deadline_of(box))
            else:
                raise QueueFullError(f"max_waiting={self._max_open} requests have not ended; come back later")
        return box

    def ask_abort(self, request_id: str) -> Mailbox | None:
        """The request of this id; None if there is none, or this was called for it before."""
        with self._lock:
            box = self._find(request_id)
            if box is None or box.abort_asked:
                return None
            box.abort_asked = True
        return box

    def leave(self, box: Mailbox) -> None:
        """A request that was let in has ended: the first in line have its room."""
        with self._lock:
            if self._open.get(box.request_id) is box:
                del self._open[box.request_id]
            while self._line and len(self._open) < self._max_open and self.refusal is None:
                self._open_to(self._line.popitem(last=False)[1])

    def leave_line(self, box: Mailbox) -> bool:
        """Take a request out of the line; False if it does not stand there."""
        with self._lock:
            stands = self._line.get(box.request_id) is box
            if stands:
                del self._line[box.request_id]
        return stands

    def expired(self) -> list[Mailbox]:
        """Take those out of the line whose time is over."""
        now = time.monotonic()
        if now < self._deadline:
            return []
        with self._lock:
            late = [box for box in self._line.values() if deadline_of(box) <= now]
            for box in late:
                del self._line[box.request_id]
            self._deadline = min(map(deadline_of, self._line.values()), default=math.inf)
        return late

    def shut(self, refusal: LlamaFastError) -> list[Mailbox]:
        """Let nobody in from now on, and give out who is there. The first call's `refusal` counts."""
        with self._lock:
            self.refusal = self.refusal or refusal
            boxes = [*self._open.values(), *self._line.values()]
            self._open.clear()
            self._line.clear()
        return boxes

    def _find(self, request_id: str) -> Mailbox | None:
        return self._open.get(request_id) or self._line.get(request_id)

    def _open_to(self, box: Mailbox) -> None:
        self._open[box.request_id] = box
        self._let_in(box)


def deadline_of(box: Mailbox) -> float:
    """When the request's time is over."""
    return math.inf if box.request.deadline is None else box.request.deadline


def own(error: LlamaFastError) -> LlamaFastError:
    """The same error for one more caller: each raises it in its own thread, with its own traceback."""
    other = copy.copy(error)
    other.__cause__ = error
    return other

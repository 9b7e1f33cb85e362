"""A thread that notices a step which does not end: a hung kernel, a deadlock."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# An idle watchdog wakes this often, at the least; Event.wait does not take every number of seconds.
_LONGEST_WAIT_S = 3600.0


class Watchdog:
    """Calls `on_stall` once a single step has taken too long, after the stacks of all threads went to stderr.

    Args:
        seconds: how long a step may take. Monotonic time; an idle engine is never late.
        on_stall: called in the watchdog's thread, which ends then.
    """

    def __init__(self, seconds: float, on_stall: Callable[[], None]) -> None:
        self._seconds = seconds
        self._on_stall = on_stall
        self._began: float | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llama_fast watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _watch(self) -> None:
        suspect: float | None = None
        while not self._stopped.wait(min(self._left(suspect), _LONGEST_WAIT_S)):
            began = self._began
            if began is None or time.monotonic() - began < self._seconds:
                suspect = None
            elif began != suspect:
                # Looked at once more a moment later: a process that was stopped for a while (SIGSTOP, a debugger) is
                # late without having hung.
                suspect = began
            else:
                _dump_stacks(f"llama_fast: a step has taken more than {self._seconds:g} seconds; all stacks:")
                self._on_stall()
                return

    def _left(self, suspect: float | None) -> float:
        began = self._began
        if began is None:
            return self._seconds  # a step that begins meanwhile ends in time if it ends before this
        if began == suspect:
            return min(1.0, self._seconds)
        return max(0.0, began + self._seconds - time.monotonic())


def _dump_stacks(title: str) -> None:
    for stream in (sys.stderr, sys.__stderr__):
        try:
            if stream is not None:
                print(title, file=stream, flush=True)
                faulthandler.dump_traceback(file=stream, all_threads=True)
                return
        except (AttributeError, OSError, ValueError):
            continue  # it is no file, or closed
    logger.error("%s cannot be written: there is no stderr", title)

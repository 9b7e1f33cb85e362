"""Runs one bad input in a process of its own and checks what must hold after every one of them.

An entry is a function in one of the modules of this folder, named by its id and what it tries: `B01_seven_bytes`. It
takes an empty folder of its own. `server.py` forks one process an entry from a preloaded, single-threaded one, so that
a crash, a hang or memory without end is a failed test and nothing more.

Checks are calls of `check`, `refused` and `accepted`, not `assert`: all of it runs under `python -O` too.
"""

import gc
import os
import re
import resource
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from llama_fast.errors import LlamaFastError, RequestError

T = TypeVar("T")

# Of processor time, so that other work on the machine does not count. The slowest entry takes 0.5 to 1.2 s by machine;
# what this is to find, work that grows without bound, takes far longer.
SECONDS = 3.0
WAIT = 10  # times that by the clock: a refusal does not sleep either
MEMORY = 64 << 20


class CheckFailedError(Exception):
    """What must hold does not."""


def check(condition: object, message: str) -> None:
    """`assert` that `python -O` keeps."""
    if not condition:
        raise CheckFailedError(message)


def refused(
    error_type: type[LlamaFastError] | tuple[type[LlamaFastError], ...],
    call: Callable[[], object],
    *needles: str,
    header_bytes: int = 0,
    seconds: float = SECONDS,
) -> LlamaFastError:
    """`call` raises `error_type` with a message that holds every needle, in bounded time and memory.

    `header_bytes`: size of the hostile header or file; twice that may be allocated on top of 64 MiB.
    """
    with _bounded(seconds, MEMORY + 2 * header_bytes):
        try:
            result = call()
        except LlamaFastError as raised:
            error = raised
        else:
            raise CheckFailedError(f"not refused: {result!r:.200}")
    check(isinstance(error, error_type), f"{type(error).__name__} instead of {error_type}: {error}")
    message = str(error)
    for needle in needles:
        check(needle in message, f"the message does not name {needle!r}: {message}")
    check_message(error)
    error.__traceback__ = error.__context__ = error.__cause__ = None  # frames keep files and tensors alive
    return error


def accepted(call: Callable[[], T], *, header_bytes: int = 0, seconds: float = SECONDS) -> T:
    """The result of `call`, which is legal input, in the same bounds as a refusal."""
    with _bounded(seconds, MEMORY + 2 * header_bytes):
        return call()


def check_message(error: LlamaFastError) -> None:
    """A message is one readable line without object addresses; one for a client has no path either."""
    message = str(error)
    check(message, "the message is empty")
    check(len(message) <= 4000, f"the message has {len(message)} characters")
    check(message.isprintable(), f"not printable: {message!r}")
    check(not re.search(r" at 0x[0-9a-f]{6,}|Traceback|File \"", message), f"an object or a traceback: {message}")
    if isinstance(error, RequestError):
        check_no_path(error)


def check_no_path(error: LlamaFastError) -> None:
    """A message that goes to a remote client names no file of this machine."""
    check(not re.search(r"(?<![\w.:/])/[\w.-]+/", str(error)), f"a path: {error}")


@contextmanager
def _bounded(seconds: float, memory: int):
    gc.collect()
    _reset_peak()
    before, start, start_cpu = rss(), time.monotonic(), time.process_time()
    yield
    took, waited, peak = time.process_time() - start_cpu, time.monotonic() - start, _peak() - before
    check(took <= seconds, f"took {took:.2f} s of processor time, more than {seconds} s")
    check(waited <= WAIT * seconds, f"waited: took {waited:.2f} s, more than {WAIT * seconds} s")
    check(peak <= memory, f"took {peak:,} bytes of memory, more than {memory:,}")


def _reset_peak() -> None:
    with suppress(OSError):  # the peak since the fork counts then, which is stricter
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def rss() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def resources() -> dict[str, object]:
    """What must be the same before and after: open files, threads, child processes, temporary files."""
    gc.collect()
    tasks = os.listdir("/proc/self/task")
    children = [Path(f"/proc/self/task/{task}/children") for task in tasks]
    return {
        "open files": sorted(_target(name) for name in os.listdir("/proc/self/fd")),
        "threads": len(tasks),
        "child processes": sum(len(path.read_text().split()) for path in children if path.exists()),
        "temporary files": sorted(os.listdir(os.environ["TMPDIR"])),
    }


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return "the listing itself"


def limit_address_space(spare: int) -> None:
    """No more than `spare` bytes of address space beyond what is mapped now."""
    limit = _status("VmSize:") + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

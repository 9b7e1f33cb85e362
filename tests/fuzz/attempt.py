"""One case in this process: run it inside bounds and say what came of it."""

import faulthandler
import logging
import os
import re
import resource
import signal
import traceback
from pathlib import Path
from typing import NamedTuple

from llama_fast.errors import LlamaFastError
from tests.bad_inputs.harness import CheckFailedError, check, check_message
from tests.fuzz.target import Target, make

CPU_S = 2.0  # a hang is measured in processor time: other programs may be running
WALL_S = 20.0  # one that waits takes none
MEMORY = 64 << 20
SPARE_ADDRESS_SPACE = 1 << 30
OUR_CODE = re.compile(r"(?:llama_fast|tests/fuzz)/(?!attempt)[\w/]+\.py$")


class Outcome(NamedTuple):
    """`kind` is "accepted", "refused" (`what` is the error's type then), or what is wrong."""

    kind: str
    what: str = ""
    where: str = ""
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("accepted", "refused")


class Attempts:
    """Runs cases in `folder`, as a forked process that does nothing else. A hang ends it with SIGPROF or SIGALRM."""

    def __init__(self, target: Target, folder: Path, stderr: int) -> None:
        self._target = target
        self._folder = folder
        self._stderr = stderr
        self._clear_refs = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._logged = _Logged()
        logging.getLogger().handlers[:] = [self._logged]
        faulthandler.enable(stderr)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
            faulthandler.register(number, stderr, all_threads=False, chain=True)
        for name, content in target.files.items():
            (folder / name).write_bytes(content)
        os.chdir(folder)
        limit = _mapped_bytes()[0] + SPARE_ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def run(self, case: int) -> Outcome:
        value = make(self._target, case)
        os.ftruncate(self._stderr, 0)
        self._logged.problems.clear()
        os.pwrite(self._clear_refs, b"5", 0)  # the peak starts again
        before = _mapped_bytes()[1]
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.setitimer(signal.ITIMER_REAL, WALL_S)
        try:
            self._target.run(value, self._folder)
            outcome = Outcome("accepted")
        except LlamaFastError as error:
            outcome = self._refusal(error)
        except CheckFailedError as error:
            outcome = Outcome("wrong result", "", _where(error), str(error))
        except BaseException as error:  # a PanicException of Rust is no Exception
            outcome = Outcome("raised", type(error).__name__, _where(error), str(error))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome.is_finding:
            return outcome
        if self._logged.problems:
            return Outcome("logged", *self._logged.problems[0])
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if growth > MEMORY + 2 * self._target.size(value):
            return Outcome("memory", "", "", f"grew by {growth >> 20} MiB, then: {' '.join(outcome)}")
        return outcome

    def _refusal(self, error: LlamaFastError) -> Outcome:
        name = type(error).__name__
        if not isinstance(error, self._target.refusals):
            return Outcome("refused by another kind", name, _where(error), str(error))
        try:
            check_message(error)
        except CheckFailedError as problem:
            rule = re.split(r"[:\d]", str(problem))[0].strip()
            return Outcome("bad message", f"{name}, {rule}", _where(error), str(problem))
        return Outcome("refused", name, _where(error), str(error))


class _Logged(logging.Handler):
    """Formats every record, since a wrong format string shows only then, and applies the rules for messages to it."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[tuple[str, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            check(len(text) <= 4000, f"{len(text)} characters")
            check(text.isprintable(), f"not printable: {text!r}")
        except Exception as problem:
            self.problems.append((type(problem).__name__, f"{record.pathname}:{record.lineno}", str(problem)))


def _mapped_bytes() -> tuple[int, int]:
    """Address space and resident memory of this process."""
    pages = Path("/proc/self/statm").read_bytes().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def _where(error: BaseException) -> str:
    """The last line of ours that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if OUR_CODE.search(frame.filename)] or frames
    return f"{shortened(ours[-1].filename)}:{ours[-1].lineno}"


def shortened(path: str) -> str:
    """A path of ours without the folders above."""
    found = OUR_CODE.search(path)
    return found[0] if found else Path(path).name

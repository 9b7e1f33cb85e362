"""Many cases of one target, in worker processes forked from this one, which must be single-threaded.

A worker runs its cases one after the other in one process. One that dies, of a crash or a hang, is one finding, for
the case it was at, and the next worker goes on behind it.
"""

import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tests.fuzz.attempt import OUR_CODE, WALL_S, Attempts, Outcome, shortened
from tests.fuzz.target import Target

_SILENCE_S = 3 * WALL_S  # the last resort; a worker's own alarm comes earlier


class _Worker:
    def __init__(self, target: Target, cases: range) -> None:
        self.cases = cases
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
        (self.home / "files").mkdir()
        self.output, write_end = os.pipe()
        self.heard = time.monotonic()
        self.rest = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.output)
            _work(target, cases, self.home, write_end)
        os.close(write_end)

    def outcomes(self) -> Iterator[tuple[int, Outcome]]:
        """What has come since; `ended` afterwards says whether more can come."""
        data = os.read(self.output, 1 << 16)
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            yield self.cases[0], Outcome(*json.loads(line))
            self.cases = self.cases[1:]
        self.ended = not data

    def close(self) -> Outcome:
        """End it; what was wrong, if it ended by itself."""
        os.kill(self.pid, signal.SIGKILL)  # no matter if it is dead: it has not been waited for
        _, status = os.waitpid(self.pid, 0)
        said = (self.home / "stderr").read_text(errors="replace")[-4000:] if (self.home / "stderr").exists() else ""
        os.close(self.output)
        shutil.rmtree(self.home, ignore_errors=True)
        files = re.findall(r'File "(.+)", line (\d+)', said)
        ours = [f"{shortened(path)}:{line}" for path, line in files if OUR_CODE.search(path)]
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        kind = "hung" if number in (signal.SIGPROF, signal.SIGALRM) else "died"
        name = signal.Signals(number).name if number else f"exit status {os.waitstatus_to_exitcode(status)}"
        return Outcome(kind, name, ours[0] if ours else "", said)


def _work(target: Target, cases: range, home: Path, output: int) -> NoReturn:
    """The forked process."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent decides
        stderr = os.open(home / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stderr, 1)
        os.dup2(stderr, 2)
        attempts = Attempts(target, home / "files", stderr)
        for case in cases:
            outcome = attempts.run(case)
            line = json.dumps([text[:2000] for text in outcome]).encode() + b"\n"
            while line:
                line = line[os.write(output, line) :]
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(3)


def campaign(
    target: Target, cases: range, *, workers: int = 1, end: float = float("inf")
) -> Iterator[tuple[int, Outcome]]:
    """(case, outcome) as they come, until `cases` are done or `time.monotonic()` is past `end`."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a thread was started before the fork")
    # At most 2**62 cases a worker: len() of a longer range fails.
    running = [_Worker(target, cases[first::workers]) for first in range(min(workers, len(cases)))]
    try:
        while running and time.monotonic() < end:
            ready, _, _ = select.select([worker.output for worker in running], [], [], 0.5)
            for worker in list(running):
                silent = time.monotonic() - worker.heard > _SILENCE_S
                if worker.output in ready:
                    yield from worker.outcomes()
                    if not worker.ended:
                        continue
                elif not silent:
                    continue
                running.remove(worker)
                outcome = worker.close()
                if worker.cases:
                    yield worker.cases[0], outcome
                    if worker.cases[1:]:
                        running.append(_Worker(target, worker.cases[1:]))
            time.sleep(0.02)  # many outcomes a reading; this process should take no time from its workers
    finally:
        for worker in running:
            worker.close()

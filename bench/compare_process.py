"""A program under comparison, alive in a process of its own that sleeps until it is asked."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

_WORKER = Path(__file__).resolve().with_name("compare_workers.py")
SETTLE_S = 0.05  # threads of OpenMP look for further work for some milliseconds before they sleep


class Absent(Exception):
    """The program's package is not installed for that interpreter."""


class Failed(Exception):
    """The program raised an error or died."""


class Process:
    """compare_workers.py under `python`; use it as a context manager, which kills it at the end.

    In a session of its own: Ctrl-C reaches the driver alone, which then ends all of them. Should the driver be killed,
    they end at the end of their input.

    Attributes:
        worker: another script that answers, of a subclass.

    Args:
        python: the interpreter that has the program.
        options: of the worker; its `--threads` goes to OpenMP too.
    """

    worker: Path | None = None

    def __init__(self, python: str, program: str, model: Path, threads: int, *options: str) -> None:
        command = [
            python,
            str(self.worker or _WORKER),
            program,
            "--model",
            str(model),
            "--threads",
            str(threads),
            *options,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,
            text=True,
        )
        self.idle = Idle(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its answer.

        Raises:
            Absent, Failed: what the program says.
        """
        with self.idle.busy():
            try:
                self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                self._stderr.seek(0)
                tail = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
                raise Failed(f"ended with status {self._process.wait()}: {' '.join(tail)}")
            answer = json.loads(line)
            if "absent" in answer:
                raise Absent(answer["absent"])
            if "error" in answer:
                raise Failed(answer["error"])
            time.sleep(SETTLE_S)
        return answer["answer"]


class Idle:
    """How much CPU time a process takes while nobody asks it anything: it would be taken from the others."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._cpu_s = self._wall_s = 0.0
        self._since: tuple[float, float] | None = None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What the block takes does not count."""
        if self._since is not None:
            cpu_s, now = self._now()
            self._cpu_s += cpu_s - self._since[0]
            self._wall_s += now - self._since[1]
        try:
            yield
        finally:
            self._since = self._now()

    @property
    def share(self) -> float:
        """CPU seconds a second between requests; 0 on systems without /proc."""
        return self._cpu_s / self._wall_s if self._wall_s else 0.0

    def _now(self) -> tuple[float, float]:
        try:
            # After the name, which may hold spaces: state, then utime and stime as fields 14 and 15 of the line.
            fields = self._stat.read_text().rpartition(")")[2].split()
            cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except OSError:
            cpu_s = 0.0
        return cpu_s, time.monotonic()

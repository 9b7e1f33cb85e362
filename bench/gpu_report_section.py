"""One section of gpu_report.py, in a process of its own: a crash, a hang or a broken GPU ends this section alone.

    python bench/gpu_report_section.py MODULE:FUNCTION --name NAME --out DIR --seconds S

The function takes a `Section` and saves what it has as it goes, so that a process that is killed leaves it behind.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# For the last save and the process's end, before it is killed.
_MARGIN_S = 3.0


class NotHere(Exception):
    """What a section needs is not on this machine or not in this version: no failure."""


class Section:
    """A section's results and its time.

    Attributes:
        name: of the section.
        out: folder of the whole report.
        quick: less of everything.
        options: further settings of the command, by name.
        results: what is saved; `checks` is a list of {check, subject, status, detail}.
    """

    def __init__(self, name: str, out: Path, seconds: float, quick: bool, options: dict[str, Any]) -> None:
        self.name, self.out, self.quick, self.options = name, out, quick, options
        self.results: dict[str, Any] = {}
        self._end = time.monotonic() + seconds - min(_MARGIN_S, seconds / 4)

    def left(self) -> float:
        """Seconds that new work may take."""
        return self._end - time.monotonic()

    def has(self, seconds: float, what: str) -> bool:
        """Whether `what` may start, which takes about that long; noted where it may not."""
        if self.left() >= seconds:
            return True
        self.results.setdefault("left_out", []).append(f"{what}: {max(0.0, self.left()):.0f} s were left")
        self.save()
        return False

    def check(self, check: str, subject: str, problem: str | None, note: str = "") -> None:
        """Record how a check went: `problem` is what is wrong, None for nothing."""
        self._record(check, subject, "passed" if problem is None else "failed", problem or note)

    def report(self, check: str, subject: str, finding: str) -> None:
        """Record what was found where no outcome is wrong."""
        self._record(check, subject, "reported", finding)

    def not_run(self, check: str, subject: str, reason: str) -> None:
        """Record a check that this machine cannot make."""
        self._record(check, subject, "not run", reason)

    def _record(self, check: str, subject: str, status: str, detail: str) -> None:
        entry = {"check": check, "subject": subject, "status": status, "detail": detail}
        self.results.setdefault("checks", []).append(entry)
        print(f"{self.name}: {check}, {subject}: {status}{'; ' if detail else ''}{detail}", flush=True)
        self.save()

    def attempt(self, check: str, subject: str, work: Callable[[], str | None]) -> bool:
        """Make a check that returns what is wrong; an exception is wrong too. False if the GPU no longer answers."""
        try:
            problem = work()
        # One broken kernel must not cost what is known of the others.
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.check(check, subject, problem)
        return not gpu_is_broken()

    def earlier(self, name: str) -> dict[str, Any]:
        """Results of a section that ran before this one; {} where it left none."""
        return read_results(self.out, name)

    def save(self) -> None:
        """Write the results as they are now; a reader finds the old file or the new one."""
        path = results_path(self.out, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, default=_plain), encoding="utf-8")
        temporary.replace(path)


def results_path(out: Path, name: str) -> Path:
    """Where a section saves."""
    return out / "sections" / f"{name}.json"


def read_results(out: Path, name: str) -> dict[str, Any]:
    """What a section saved so far; {} for nothing."""
    try:
        results: dict[str, Any] = json.loads(results_path(out, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results


def _plain(value: Any) -> Any:
    """What json cannot write by itself: summaries and paths."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


def has_gpu() -> bool:
    """Whether PyTorch finds one; asked of each process for itself."""
    import torch

    return torch.cuda.is_available()


def gpu_is_broken() -> bool:
    """Whether a kernel has left the GPU in a state in which nothing runs (an illegal address, say)."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def as_hardware_sums() -> AbstractContextManager[None]:
    """Where kernels are interpreted: bf16 and dot products as the hardware has them; nothing on a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return nullcontext()
    from tests.kernels.interpreter import exact_dot, patch_bf16, patch_fma
    from tests.kernels.nested_calls import patch_nested_calls

    patch_bf16()
    patch_fma()
    patch_nested_calls()
    exact: AbstractContextManager[None] = exact_dot()
    return exact


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="MODULE:FUNCTION")
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON")
    args = parser.parse_args(argv)
    section = Section(args.name, args.out, args.seconds, args.quick, args.options)
    module, _, function = args.function.partition(":")
    try:
        getattr(importlib.import_module(module), function)(section)
    except NotHere as reason:
        section.results["not_here"] = str(reason)
    except Exception as error:
        traceback.print_exc()
        section.results["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    section.save()
    sys.stdout.flush()
    return int("error" in section.results)


if __name__ == "__main__":
    # Sections import this module by name: the classes must be the same there.
    sys.modules["gpu_report_section"] = sys.modules["__main__"]
    sys.exit(main())

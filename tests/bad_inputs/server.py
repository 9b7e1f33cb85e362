"""The fork server: `[TRITON_INTERPRET=1] python [-O] -m tests.bad_inputs.server`.

With TRITON_INTERPRET=1 it serves the kernels' entries, else all others: an interpreted kernel is interpreted for good.

Reads entry names from stdin, one a line; writes one JSON line each, `{"name", "seconds", "problem"}`, problem null
where all held. Everything that entries need is imported before the first fork, and no thread is ever started.
"""

import faulthandler
import gc
import importlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_fast.ops.native import native
from tests.bad_inputs import harness

KERNEL_MODULES = ("f_kernels",)
MODULES = (
    "a_config",
    "b_safetensors",
    "c_index",
    "d_tokenizer",
    "e_templates",
    "g_generation",
    "h_cache",
    "i_quantized",
)
# Not where the native kernels were not built.
NATIVE_MODULES = ("f_cpu",) if native()[0] is not None else ()
# Wall clock of an entry, a multiple of the second that a refusal may take: several are tried in one entry.
LIMIT_S = 30.0
SPARE_ADDRESS_SPACE = 2 << 30


def entries(modules: Sequence[str]) -> dict[str, Callable[[Path], None]]:
    """All entries by name, in the order of their modules."""
    found: dict[str, Callable[[Path], None]] = {}
    for module_name in modules:
        module = importlib.import_module(f"tests.bad_inputs.{module_name}")
        found.update({name: f for name, f in vars(module).items() if re.match(r"[A-M]\d\d_", name)})
    return found


def run(entry: Callable[[Path], None], limit_s: float = LIMIT_S) -> str | None:
    """Run `entry` in a child process; what is wrong, or None."""
    home = Path(tempfile.mkdtemp(prefix="bad-input-"))
    for folder in ("files", "tmp"):
        (home / folder).mkdir()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _child(entry, home, write_end, limit_s)
    os.close(write_end)
    try:
        return _outcome(pid, read_end, home / "fault", limit_s)
    finally:
        os.close(read_end)
        shutil.rmtree(home, ignore_errors=True)


def _child(entry: Callable[[Path], None], home: Path, report: int, limit_s: float) -> None:
    problem = "did not end"
    try:
        os.environ["TMPDIR"] = tempfile.tempdir = str(home / "tmp")
        fault = (home / "fault").open("w")
        faulthandler.enable(fault)
        faulthandler.dump_traceback_later(limit_s * 0.9, file=fault)
        os.chdir(home / "files")
        harness.limit_address_space(SPARE_ADDRESS_SPACE)
        before = harness.resources()
        entry(home / "files")
        after = harness.resources()
        changed = [f"{what}: {before[what]} -> {after[what]}" for what in before if before[what] != after[what]]
        problem = f"not as before: {'; '.join(changed)}" if changed else ""
    except harness.CheckFailedError as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.name == entry.__name__]
        problem = f"line {lines[-1] if lines else '?'}: {error}"
    except BaseException:  # a KeyboardInterrupt or a Rust panic must not leave this process either
        problem = traceback.format_exc()
    finally:
        os.write(report, problem.encode("utf-8", "backslashreplace")[-60_000:] or b"ok")
        os._exit(0)


def _outcome(pid: int, report: int, fault: Path, limit_s: float) -> str | None:
    ready, _, _ = select.select([report], [], [], limit_s)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    said = b"".join(iter(lambda: os.read(report, 65536), b"")) if ready else b""
    _, status = os.waitpid(pid, 0)
    where = fault.read_text() if fault.exists() else ""
    if not ready:
        return f"hung for {limit_s} s\n{where}"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}\n{where}"
    return None if said == b"ok" else said.decode()


def main() -> None:
    """Answer the names on stdin until it ends."""
    known = entries(KERNEL_MODULES if os.environ.get("TRITON_INTERPRET") == "1" else (*MODULES, *NATIVE_MODULES))
    gc.collect()
    gc.freeze()  # else each collection in a child scans all that is preloaded
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an entry prints is not an answer
    if len(os.listdir("/proc/self/task")) != 1:
        sys.exit("a thread was started before the first fork")
    for line in sys.stdin:
        name, start = line.strip(), time.monotonic()
        problem = run(known[name])
        answer = {"name": name, "seconds": round(time.monotonic() - start, 3), "problem": problem}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

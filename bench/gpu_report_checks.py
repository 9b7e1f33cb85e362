"""Sections of gpu_report.py that run other programs: the build, the kernels' tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from gpu_report_section import ROOT, NotHere, Section, has_gpu

BENCH = ROOT / "bench"
_CLOCKS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
)
# The longest list of failing tests that a report needs.
_MOST_NAMES = 40
_TOOLS = ("memcheck", "racecheck", "synccheck")
# Where the toolkit is, if no variable says so.
_CUDA_BIN = "/usr/local/cuda/bin"


def nvidia_smi(fields: str = _CLOCKS) -> dict[str, str] | None:
    """What the driver says of the first GPU; None where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))


def build(section: Section) -> None:
    """The native modules of this checkout, and what they are built and run with."""
    section.results["gpu"] = nvidia_smi()
    section.results["nvcc"] = _last_line(["nvcc", "--version"])
    section.results["compiler"] = _first_line([os.environ.get("CXX", "c++"), "--version"])
    section.save()
    if not has_gpu():
        raise NotHere("no GPU: nothing is built")
    link = ROOT / "llama_fast" / "kernels"
    if not _kernels_import() and not link.exists():
        # A checkout that is not installed: kernels/ gets its place in the package. pip would change the environment.
        link.symlink_to("../kernels")
        section.results["linked"] = "llama_fast/kernels -> ../kernels"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    section.results["command"] = " ".join(command)
    # Machine code for this GPU alone is there sooner; the kernels are the same.
    arch = (nvidia_smi("compute_cap") or {}).get("compute_cap", "").replace(".", "")
    environment = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), _CUDA_BIN])}
    if arch.isdecimal():
        environment.setdefault("LLAMA_FAST_CUDA_ARCHS", arch)
    status, output = finish(command, section, "build", environment)
    problem = None if status == 0 else f"{_ended(status)}: {_tail(output)}"
    section.check("build", "native modules", problem)
    for module in ("llama_fast.kernels", "llama_fast._C", "llama_fast._cuda"):
        code = f"import {module} as m; print(getattr(m, 'source_hash', 'no hash'))"
        status, output = finish([sys.executable, "-c", code], section, "import", dict(os.environ))
        section.check("import", module, _tail(output) or "no import" if status else None, output.strip()[-100:])


def _kernels_import() -> bool:
    code = "import llama_fast.kernels"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60).returncode == 0


def finish(command: list[str], section: Section, name: str, environment: dict[str, str]) -> tuple[int | None, str]:
    """Run a command to its end or the section's: its exit status, None if its time was over, and its output."""
    running = start(command, section, name, environment)
    return wait(running, section)


def start(
    command: list[str], section: Section, name: str, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Path]:
    """A process with its output in a file: what it leaves running would hold a pipe open, and reading would not end."""
    print("$", *command, flush=True)
    path = section.out / "sections" / f"{section.name}-{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    return process, path


def wait(running: tuple[subprocess.Popen[bytes], Path], section: Section) -> tuple[int | None, str]:
    """As `finish`; its children end with the section."""
    process, path = running
    status: int | None
    try:
        status = process.wait(timeout=max(1.0, section.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
    return status, path.read_text(encoding="utf-8", errors="replace")


def _ended(status: int | None) -> str:
    return "not done in its time" if status is None else f"exit status {status}"


def _tail(text: str) -> str:
    return " ".join(text.split())[-400:]


def _first_line(command: list[str]) -> str | None:
    return _lines(command, 0)


def _last_line(command: list[str]) -> str | None:
    return _lines(command, -1)


def _lines(command: list[str], index: int) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [""])[index]


# --- the kernels' tests ----------------------------------------------------------------------------------------------


def kernel_tests(section: Section) -> None:
    """tests/kernels on the GPU, an even selection: counts and failing tests of each kernel."""
    if not has_gpu() and "folder" not in section.options:
        raise NotHere("no GPU: `TRITON_INTERPRET=1 pytest tests/kernels` runs them interpreted")
    lines = section.out / "kernel_tests.jsonl"
    # Tests of the engine on the kernels, and of the extension, wherever they are.
    folders = [section.options.get("folder", "tests/kernels")]
    extra = [] if "folder" in section.options else sorted((ROOT / "tests" / "ops").glob("test_cuda*.py"))
    command = [sys.executable, "-m", "pytest", *folders, *map(str, extra), "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(15, (os.cpu_count() or 2) - 1)))]
    environment = {
        **os.environ,
        "PYTEST_PLUGINS": "gpu_report_pytest",
        "PYTHONPATH": os.pathsep.join([str(BENCH), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "REPORT_LINES": str(lines),
        "REPORT_EVERY": str(section.options.get("every", 4 if section.quick else 1)),
        # The slowest test that has started must still end.
        "REPORT_END": str(time.time() + max(1.0, section.left() - min(15.0, section.left() / 4))),
    }
    lines.unlink(missing_ok=True)
    status, output = finish(command, section, "pytest", environment)
    section.results["kernels"] = counted = count_tests(lines)
    for kernel, found in counted.items():
        problem = f"{found['failed']} of {found['failed'] + found['passed']} tests failed" if found["failed"] else None
        section.check("tests", kernel, problem, f"{found['passed']} passed, {found['left_out']} left out")
    # 0: passed, 1: tests failed (said above).
    if status not in (0, 1):
        section.check("tests", "pytest", f"{_ended(status)}: {_tail(output)}")
    if not counted:
        section.check("tests", "pytest", f"no test ran: {_tail(output)}")


def count_tests(lines: Path) -> dict[str, dict[str, Any]]:
    """Counts by kernel (by test file: linear of test_linear.py), and names and reasons of what failed."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failing: dict[str, list[dict[str, str]]] = defaultdict(list)
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        kernel = Path(entry["test"].partition("::")[0]).stem.removeprefix("test_")
        late = entry["outcome"] == "skipped" and entry["why"].endswith("the time is up")
        counts[kernel]["left_out" if late else entry["outcome"]] += 1
        if entry["outcome"] == "failed":
            failing[kernel].append({"test": entry["test"], "why": entry["why"]})
    names = ("passed", "failed", "skipped", "left_out")
    return {
        kernel: {**{name: counts[kernel][name] for name in names}, "failing": failing[kernel][:_MOST_NAMES]}
        for kernel in sorted(counts)
    }


# --- compute-sanitizer -----------------------------------------------------------------------------------------------


def sanitizer(section: Section) -> None:
    """compute-sanitizer over one launch of every kernel on small shapes."""
    if not has_gpu():
        raise NotHere("no GPU")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        for name in ("CUDA_HOME", "CUDA_PATH"):
            tool = tool or shutil.which("compute-sanitizer", path=os.path.join(os.environ.get(name, ""), "bin"))
        tool = tool or shutil.which("compute-sanitizer", path=_CUDA_BIN)
    if tool is None:
        raise NotHere("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    # Each allocation by itself, so that an access beside one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    launch = [sys.executable, str(BENCH / "gpu_report_launches.py")]
    # What Triton compiles, it compiles here and not under the tool.
    status, output = finish(launch, section, "launch", environment)
    if status is None:
        section.not_run("launch", "every kernel", _ended(status))
    elif status:
        section.check("launch", "every kernel", _tail(output))
    if status != 0:
        return
    # Side by side: most of their time is the host's.
    command = [tool, "--print-limit", "20", "--tool"]
    running = {name: start([*command, name, *launch], section, name, environment) for name in _TOOLS}
    for name, process in running.items():
        status, output = wait(process, section)
        if status is None:
            section.not_run(name, "every kernel", "it was not done in its time")
        else:
            section.check(name, "every kernel", sanitizer_problem(output, status))


def sanitizer_problem(output: str, status: int) -> str | None:
    """What compute-sanitizer found, or None; a run without its summary is no clean one."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    if not found:
        return f"exit status {status} without a summary: {_tail(output)}"
    errors = sum(map(int, found))
    if errors:
        first = next((line for line in output.splitlines() if re.search(r"=+ \S", line) and "SUMMARY" not in line), "")
        hint = [
            line.strip("= ") for line in output.splitlines() if re.search(r"Invalid|hazard|Barrier|at .*kernel", line)
        ]
        return f"{errors} errors: {'; '.join(hint[:4]) or first}"[:600]
    return None if status == 0 else f"no errors, but exit status {status}: {_tail(output)}"

"""What every bench shares: the bandwidth that sets the bound, summaries of samples, and the line of JSON at the end."""

import json
import mmap
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Summary:
    """Median and spread of repeated measurements, in the unit of the samples."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Summary":
        """Of at least one sample; between two samples the quantiles are interpolated."""
        p10, median, p90 = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        )
        return cls(median.item(), p10.item(), p90.item())


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def read_bandwidth(num_bytes: int = 2**29, repeats: int = 5) -> float:
    """Bytes per second at which this machine reads `num_bytes` of memory: the denominator of memory bounds.

    The best of `repeats` reductions over one buffer, each in two ways, with one thread and with all of torch's, since
    any can win: a bound must not be beaten. Take a buffer well beyond the last-level cache.
    """
    num_threads = torch.get_num_threads()
    streams = 4 * num_threads  # hardware prefetches several streams a core at once better than one
    num_bytes = max(1, num_bytes // (8 * streams)) * 8 * streams
    buffer = _huge_pages(num_bytes)
    parts = buffer.view(torch.int64).view(streams, -1)
    best = float("inf")
    try:
        for threads in {1, num_threads}:
            torch.set_num_threads(threads)
            for _ in range(repeats):
                best = min(best, seconds(lambda: read_every_byte(buffer)), seconds(lambda: parts.sum(dim=1)))
    finally:
        torch.set_num_threads(num_threads)
    return num_bytes / best


def _huge_pages(num_bytes: int) -> torch.Tensor:
    """Written bytes, on huge pages where the system gives them: page walks are no part of the memory's speed."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def read_every_byte(tensor: torch.Tensor) -> None:
    """Read a contiguous tensor from memory once, whatever its dtype, at the speed of the memory."""
    if tensor.numel():
        tensor.view(torch.uint8).amax()


def linear_flops(dtype: torch.dtype, width: int = 1024, repeats: int = 5) -> float:
    """FLOPs per second of F.linear on 512 rows of `width` in and out: the denominator of compute bounds.

    The best of `repeats` calls after one that warms up, with all of torch's threads. Take a width at which the
    multiplication, not the call, takes the time.
    """
    x, weight = torch.ones(512, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    best = min([seconds(lambda: F.linear(x, weight)) for _ in range(repeats + 1)][1:])
    return 2 * x.shape[0] * weight.numel() / best


def environment(gpu: str | None = None) -> dict[str, Any]:
    """Where and with what a result was measured: device (the GPU where one was used), threads, commit and versions."""
    return {
        "device": gpu or _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "safetensors": _version("safetensors"),
            "llama_fast": _version("llama-fast"),
        },
    }


def json_line(result: dict[str, Any], gpu: str | None = None, commit: str | None = None) -> str:
    """`result` and the environment as one JSON object; summaries become objects.

    Args:
        gpu: its name, where one was used.
        commit: where it is known and the copy that runs is no checkout.
    """
    where = environment(gpu)
    if commit is not None:
        where["commit"] = commit
    return json.dumps({**result, **where}, default=asdict)


def print_json(result: dict[str, Any]) -> None:
    """The last line of a bench on the CPU."""
    print(json_line(result))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, marked `-dirty` when files differ from it; "unknown" outside a checkout."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return git.stdout.strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"

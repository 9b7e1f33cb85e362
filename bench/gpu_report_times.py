"""Sections of gpu_report.py that measure rates and kernels. Without a GPU they compute the bounds alone."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from bench_kernels import run as run_kernels
from bounds import settle
from gpu_report_section import NotHere, Section, has_gpu
from gpu_timing import Gpu
from kernel_cases import cases
from serving_bounds import Rates, measure_rates

_MEGABYTES_64 = 64_000_000
# Seconds in which the clocks rise, and further measurements of a rate.
_CLOCKS_S, _MORE_COPIES = 0.3, 3


def ceilings(section: Section) -> None:
    """What the GPU reaches by itself: the denominators of every bound."""
    if not has_gpu():
        raise NotHere("no GPU: rates are assumed")
    _raise_clocks()
    gpu = Gpu(seconds_per_case=0.05)
    # The best of several: a bound must not be beaten.
    copies = [gpu.bandwidth, *(gpu._copy_bandwidth() for _ in range(_MORE_COPIES))]
    section.results |= {"name": gpu.name, "bytes_per_s": max(copies), "flops_per_s": gpu.flops}
    # Decoding only reads, which can be faster than a copy.
    buffer = torch.ones(2**28, device=gpu.device)
    fastest_us = min(gpu.time(torch.sum, [(buffer,)]).p10 for _ in range(1 + _MORE_COPIES))
    section.results["read_bytes_per_s"] = buffer.nbytes / (1e-6 * fastest_us)
    section.results |= {"launch_us": gpu.launch_us, "l2_bytes": gpu.l2_bytes, "memory_bytes": gpu.memory_bytes}


def _raise_clocks() -> None:
    """Work until the clocks of an idle GPU have risen: an H200's first copies reached 2.8 of 4.3 TB/s."""
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    end = time.perf_counter() + _CLOCKS_S
    while time.perf_counter() < end:
        for _ in range(20):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize()


def rates_of(section: Section) -> Rates:
    """The best that this run reached so far, since a bound must not be beaten; without a GPU what is assumed."""
    measured = section.earlier("ceilings")
    if "bytes_per_s" not in measured and has_gpu():  # that section failed
        return measure_rates(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, False)
    if "bytes_per_s" not in measured:
        return Rates(section.options["rates"]["bytes_per_s"], section.options["rates"]["flops_per_s"])
    kernels = section.earlier("kernel_times").get("kernels", {})
    names = ("bytes_per_s", "read_bytes_per_s")
    bandwidth = max(result.get(name, 0.0) for result in (measured, kernels) for name in names)
    return Rates(bandwidth, max(measured["flops_per_s"], kernels.get("flops_per_s", 0.0)), measured.get("name"))


# --- kernels ---------------------------------------------------------------------------------------------------------


def _plan(quick: bool) -> list[dict[str, Any]]:
    """Selections of bench_kernels' cases, the most important first."""

    def part(kernels: str, models: list[str], rows: list[int], prefill: list[int], contexts: list[int]) -> Any:
        return {"kernels": kernels.split(), "models": models, "rows": rows, "prefill": prefill, "contexts": contexts}

    plan = [
        part("linear", ["8b"], [1, 8, 64], [4096], []),
        part("attention", ["8b"], [1, 64], [4096], [4096]),
        *(
            part(kernel, ["8b"], [], [rows_of_64_mb(kernel)], [])
            for kernel in ("rms_norm", "rope_and_cache", "silu_mul")
        ),
        part("rms_norm rope_and_cache silu_mul sample log_probs", ["8b"], [1, 64], [], []),
        part("attention", ["8b"], [], [16384], []),
        part("linear", ["1b"], [1, 8, 64], [4096], []),
        part("int4_linear", ["8b"], [1, 64], [4096], []),
        part("attention", ["1b"], [1, 64], [4096], [1024, 4096]),
        part("attention", ["8b"], [1, 8, 64], [512], [1024, 32768]),
        part("rms_norm rope_and_cache silu_mul", ["8b", "1b"], [8], [512, 4096], []),
        part("sample log_probs", ["1b"], [1, 8, 64], [], []),
        part("int4_linear", ["1b"], [1, 64], [4096], []),
    ]
    return plan[:5] if quick else plan


def rows_of_64_mb(kernel: str) -> int:
    """Rows of the 8B model with which a call moves 64 MB."""
    one, two = (cases(["8b"], [kernel], [], [count], [])[0].num_bytes for count in (1, 2))
    return round(_MEGABYTES_64 / (two - one))


def kernel_times(section: Section) -> None:
    """bench_kernels over a selection; a kernel whose checks failed in this run is refused."""
    rates, gpu = rates_of(section), Gpu(seconds_per_case=0.03) if has_gpu() else None
    failed = {} if section.options.get("despite_failed_tests") else failed_kernels(section)
    section.results["refused"] = failed
    kernels: dict[str, Any] = {}
    for selection in _plan(section.quick):
        chosen = [kernel for kernel in selection["kernels"] if kernel not in failed]
        if not chosen or not section.has(5, f"times of {', '.join(chosen)}, {', '.join(selection['models'])}"):
            continue
        asked = {**selection, "kernels": chosen, "seconds": max(1.0, section.left() - 3), "jobs": 8, "seed": 0}
        assumed = {"bandwidth": rates.bytes_per_s / 1e12, "flops": rates.flops_per_s / 1e12}
        with torch.no_grad():
            _, result = run_kernels(argparse.Namespace(**asked, **assumed), gpu)
        rows = [*kernels.get("rows", []), *result["rows"]]
        sources = {**kernels.get("sources", {}), **result["sources"]}
        kernels = {**result, "rows": rows, "sources": sources}
        if gpu is not None:
            kernels = settle({**kernels, "bytes_per_s": gpu.bandwidth, "flops_per_s": gpu.flops})
        section.results["kernels"] = kernels
        section.save()
    for row in kernels.get("rows", []):
        if "refused" in row:
            section.check("accuracy before timing", row["kernel"], f"{row['model']} {row['op']}: {row['refused']}")


def failed_kernels(section: Section) -> dict[str, str]:
    """Kernels that this run's checks found wrong, and what: these are not timed."""
    found: dict[str, str] = {}
    for name in ("kernel_tests", "rows", "repeats"):
        for check in section.earlier(name).get("checks", []):
            if check["status"] == "failed":
                found.setdefault(check["subject"], f"{check['check']}: {check['detail']}")
    return found

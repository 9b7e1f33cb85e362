"""Section of gpu_report.py that compiles what models launch, in processes: later sections find it in Triton's cache.

One kernel takes a second or two, and one after the other they would take the time of what is to be measured.
"""

from __future__ import annotations

import os
import time
from multiprocessing import TimeoutError, get_context
from typing import Any

from gpu_report_checks import nvidia_smi
from gpu_report_section import NotHere, Section

_INT4_GROUP = 128


def compile_models(section: Section) -> None:
    """Every launch of the 8B and the 1B model in bf16; a kernel that does not compile is named.

    CUDA is not touched: the processes are forks, in which it would not work.
    """
    capability = (nvidia_smi("compute_cap") or {}).get("compute_cap", "")
    if not capability.replace(".", "").isdecimal():
        raise NotHere(f"no GPU: the driver's compute capability is {capability!r}")
    from llama_fast.kernels import configs
    from llama_fast.kernels.launches import model_launches

    arch = int(capability.replace(".", ""))
    if arch not in configs.TABLES:
        raise NotHere(f"compute capability {capability} has no tiles of its own")
    start = time.perf_counter()
    launches = [x for x in model_launches(arch, ["8b", "1b"], ["bf16"]) if is_used(x)]
    section.results |= {"kernels": len(launches), "compiled": 0, "listed_s": time.perf_counter() - start}
    jobs = max(1, min(15, (os.cpu_count() or 2) - 1))
    # Its end ends the processes, at once.
    with get_context("fork").Pool(jobs) as pool:
        outcomes = pool.imap_unordered(compile_one, launches)
        try:
            for _ in launches:
                kernel, problem = outcomes.next(timeout=max(0.1, section.left()))
                section.results["compiled"] += 1
                if problem is not None:
                    section.check("compile", kernel, problem)
        except TimeoutError:
            done, count = section.results["compiled"], len(launches)
            section.results["left_out"] = [f"{count - done} of {count} kernels: they are compiled where they are met"]
    section.results["seconds"] = time.perf_counter() - start
    section.save()


def is_used(launch: Any) -> bool:
    """Whether a section launches it: of int4 only what bench_kernels.py times."""
    config = launch.config
    return "GROUP_SIZE" not in config or (config["GROUP_SIZE"] == _INT4_GROUP and config["zeros_ptr"] is None)


def compile_one(launch: Any) -> tuple[str, str | None]:
    """In a process of the pool: the kernel, and what is wrong or None once it is in the cache."""
    from llama_fast.kernels.launches import set_chip

    kernel = launch.name.strip("_").removesuffix("_kernel")
    set_chip(launch.arch)
    try:
        launch.kernel.preload(launch.data)
    # Anything can come out of a compiler.
    except Exception as error:
        return kernel, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return kernel, None

"""Programmatic dependent launch: a kernel is launched, and its programs placed, while the kernel before it ends.

From compute capability 9.0 on. A kernel that is launched so begins with `begin`: it waits until everything before it is
done and seen, then lets the next one come, which waits likewise. Where every kernel of a chain does, each sees the
memory that it would see if they ran one after the other; only the time between them shrinks.

Source   CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it among the globals of `begin`
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama_fast.kernels.arguments import INTERPRETED

VARIABLE = "LLAMA_FAST_OVERLAP"


@triton.jit
def begin(OVERLAP: triton.language.constexpr):
    """The first thing that a kernel does, before it reads any memory."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache
def options(table: int) -> dict[str, Any]:
    """Keywords of a launch on a chip of one of configs.TABLES: a kernel's OVERLAP, and what Triton needs.

    LLAMA_FAST_OVERLAP=off launches one kernel after the other.
    """
    if INTERPRETED or table < 90 or os.environ.get(VARIABLE) == "off":
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}

"""The native module of the CPU backend, or why it cannot serve."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

# The instruction set to use instead of the best one, for tests and for machines whose wide registers are slow.
ISA_VARIABLE = "LLAMA_FAST_CPU_ISA"


@lru_cache
def native() -> tuple[ModuleType | None, str]:
    """`llama_fast._C` ready for use and the name of its instruction set; or None and the reason."""
    try:
        module = importlib.import_module("llama_fast._C")
    except ImportError as error:
        if error.name == "llama_fast._C":
            return None, (
                "llama_fast._C was not built when llama_fast was installed (it needs x86-64 Linux and a C++20 "
                "compiler; install g++ and install llama_fast again)"
            )
        return None, f"llama_fast._C cannot be loaded ({error}); install llama_fast again"
    available = module.instruction_sets()
    if not available:
        return None, "this processor lacks AVX2, FMA or F16C"
    wanted = os.environ.get(ISA_VARIABLE, "")
    if not wanted:
        return module, module.selected()
    if wanted not in available:
        return None, f"{ISA_VARIABLE}={wanted!r} is not one of this processor's sets: {', '.join(available)}"
    module.select(wanted)
    return module, wanted

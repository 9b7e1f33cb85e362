"""The native module of the CPU backend, or why it cannot serve."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

from llama_fast.errors import BackendError

# The instruction set to use instead of the best one, for tests and for machines whose wide registers are slow.
ISA_VARIABLE = "LLAMA_FAST_CPU_ISA"
# Of csrc/bindings.cpp. A module of an earlier installation would take addresses in another order.
INTERFACE = 3


@lru_cache
def native() -> tuple[ModuleType | None, str]:
    """`llama_fast._C` ready for use and the name of its instruction set; or None and the reason."""
    try:
        module = importlib.import_module("llama_fast._C")
    except ModuleNotFoundError:
        return None, (
            "llama_fast._C was not built when llama_fast was installed (it needs x86-64 Linux and a C++20 compiler; "
            "install g++ and install llama_fast again)"
        )
    except ImportError as error:
        return None, f"llama_fast._C cannot be loaded ({error}); install llama_fast again"
    if getattr(module, "interface", None) != INTERFACE:
        return None, "llama_fast._C is of another version of llama_fast; install llama_fast again"
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


def required() -> ModuleType:
    """`llama_fast._C`.

    Raises:
        BackendError: it cannot serve.
    """
    module, reason = native()
    if module is None:
        raise BackendError(f"backend='cpu' cannot run: {reason}; use backend='reference'")
    return module

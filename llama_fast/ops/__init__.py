"""The backends. Each is a module that exports the same ops with the same signatures; callers pick one by device.

Graph ops: embed, norm_qkv_rope_cache, attention, linear_residual, norm_gate_up_act, norm_lm_head, sample, log_probs,
advance, copy_pages, prepare_linear, prepare_layers, run_layers, warm_up_rows, check_cache. Primitives they are composed
of: rms_norm, linear, rope_and_cache, silu_mul.
ROLES_SHARE_RUNS says whether one run of the graph may hold prompt and generated tokens, CAPTURABLE whether a decoding
step may become a CUDA graph (replay.py).
"""

import importlib
import logging
import os
from functools import lru_cache
from types import ModuleType

import torch

from llama_fast.errors import BackendError
from llama_fast.ops import reference
from llama_fast.ops.native import native
from llama_fast.ops.replay import on_device

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "cpu", "gpu")


def select_backend(name: str, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The module that serves a model on `device`.

    Args:
        name: "auto" (the fastest that serves the device), "reference", "cpu" or "gpu".
        dtype: of the model; None where it is not known yet.

    Raises:
        BackendError: the name is unknown, or the backend cannot run here.
    """
    if name not in BACKENDS:
        raise BackendError(f"backend={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    if name == "reference":
        return reference
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "cpu" or (name == "auto" and device.type == "cpu" and not interpreted):
        return _cpu(name, device, dtype)
    runs_here = device.type == ("cpu" if interpreted else "cuda")
    if not runs_here:
        runs_on = "the CPU, since TRITON_INTERPRET=1 is set" if interpreted else "an NVIDIA GPU"
        problem: str | None = f"the device is {device} and the kernels run on {runs_on}"
    elif dtype == torch.float64:
        problem = "the kernels compute in float16, bfloat16 or float32 and the model is float64"
    else:
        problem = _kernel_problem(device)
    if problem is None:
        return importlib.import_module("llama_fast.ops.gpu")
    if name == "gpu":
        raise BackendError(f"backend='gpu' cannot run: {problem}; use backend='reference'")
    if runs_here:
        _warn_once(f"kernels are not used, everything runs on the slow reference backend: {problem}")
    return reference


def describe_backend(device: torch.device) -> str:
    """What backend="auto" runs on `device`, in words: "cpu: native kernels, avx2"."""
    served = select_backend("auto", device).__name__.rpartition(".")[2]
    module, isa_or_reason = native()
    if served == "cpu":
        return f"cpu: native kernels, {isa_or_reason}"
    if served == "gpu":
        return "gpu: Triton kernels"
    return "reference: plain PyTorch" + (f"; {isa_or_reason}" if device.type == "cpu" and module is None else "")


def _cpu(name: str, device: torch.device, dtype: torch.dtype | None) -> ModuleType:
    """The native kernels; under "auto" the reference where they cannot serve, with one warning if that is a pity."""
    module, reason = native()
    if device.type != "cpu":
        problem = f"the device is {device} and the native kernels run on the CPU"
    elif dtype == torch.float64:
        problem = "the kernels compute in float16, bfloat16 or float32 and the model is float64"
    elif module is None:
        problem = reason
    else:
        return importlib.import_module("llama_fast.ops.cpu")
    if name == "cpu":
        raise BackendError(f"backend='cpu' cannot run: {problem}; use backend='reference'")
    if module is None:
        _warn_once(f"native kernels are not used, everything runs on the slow reference backend: {problem}")
    return reference


@lru_cache
def _kernel_problem(device: torch.device) -> str | None:
    """Compiles and runs the smallest kernel: Triton, a compiler, its cache folder and the driver must all be there."""
    try:
        configs = importlib.import_module("llama_fast.kernels.configs")
        silu_mul = importlib.import_module("llama_fast.kernels.silu_mul")
        if not configs.table_of(device):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0, or not known"
        with on_device(device):
            out = silu_mul.silu_mul(torch.zeros(1, 2, device=device))
        if out.item() != 0:
            return "the smallest kernel gives a wrong result"
    # Anything can come out of a compiler run: a missing module, C compiler or Python.h, a read-only folder.
    except Exception as error:
        reason = " ".join(str(error).split())
        return f"the smallest kernel does not run ({type(error).__name__}: {reason[:300]})"
    return None


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)

"""The CUDA extension: int4_linear for generated rows in bf16, and whether it is used instead of Triton's.

By default it is where cuda_checked.json has a report of these sources on a GPU of this compute capability.
LLAMA_FAST_CUDA_EXTENSION=on uses it unchecked and makes it an error if it cannot serve; =off never uses it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from llama_fast.errors import BackendError
from llama_fast.kernels import int4_linear as triton_int4
from llama_fast.kernels.arguments import refuse
from llama_fast.kernels.int4_linear import PlanarInt4
from llama_fast.kernels.silu_mul import ACTIVATIONS

logger = logging.getLogger(__name__)

VARIABLE = "LLAMA_FAST_CUDA_EXTENSION"
SETTINGS = ("auto", "on", "off")
# Of csrc/cuda/bindings.cpp. A module of an earlier installation would take addresses in another order.
INTERFACE = 2
# {source hash: {compute capability: {"gpu": name, "report": file of its checks}}}
CHECKED = Path(__file__).with_name("cuda_checked.json")
# As csrc/cuda/int4_linear_call.h numbers them, by the kernels' names; Triton serves the others.
_NUMBERS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
# Elements of x that a thread copies at once, and their bytes; bytes of scales and zeros.
_ELEMENTS, _BYTES, _NUMBER_BYTES = 8, 16, 4
# The kernel counts from a block's first row, up to 32 rows on, in 32 bits.
_MAX_ROW = 2**24


@lru_cache
def extension() -> tuple[ModuleType | None, str]:
    """`llama_fast._cuda`, or None and the reason; no driver is needed for that."""
    try:
        module = importlib.import_module("llama_fast._cuda")
    except ModuleNotFoundError:
        return None, (
            "llama_fast._cuda was not built when llama_fast was installed (it needs nvcc on PATH or in CUDA_HOME; "
            "install the CUDA toolkit and install llama_fast again)"
        )
    except ImportError as error:
        return None, f"llama_fast._cuda cannot be loaded ({error}); install llama_fast again"
    if getattr(module, "interface", None) != INTERFACE:
        return None, "llama_fast._cuda is of another version of llama_fast; install llama_fast again"
    return module, ""


def setting() -> str:
    """What LLAMA_FAST_CUDA_EXTENSION says: "auto" where it is not set.

    Raises:
        BackendError: it is not one of SETTINGS.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in SETTINGS:
        raise BackendError(f"{VARIABLE}={value!r} is unknown; use one of {', '.join(SETTINGS)}")
    return value


def in_use(device: torch.device) -> bool:
    """Whether generated rows on `device` go to the extension, where it serves their weight.

    Raises:
        BackendError: LLAMA_FAST_CUDA_EXTENSION is wrong, or "on" where the extension cannot run.
    """
    chosen = setting()
    if chosen == "off" or device.type != "cuda":
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _in_use(chosen, index)


@lru_cache
def _in_use(chosen: str, index: int) -> bool:
    module, reason = extension()
    if module is not None:
        reason = _problem(module, index, checked_only=chosen == "auto")
    if not reason:
        return True
    if chosen == "on":
        raise BackendError(f"{VARIABLE}=on cannot be: {reason}; or set {VARIABLE}=off")
    logger.info("generated rows of 4-bit weights run on Triton's int4_linear: %s", reason)
    return False


def _problem(module: ModuleType, index: int, checked_only: bool) -> str:
    """Why a module that was loaded is not used on a GPU; empty if it is."""
    capability = torch.cuda.get_device_capability(index)
    major, minor = capability
    # Machine code runs on later minor versions, PTX of the last architecture on everything later.
    known = [divmod(architecture, 10) for architecture in module.architectures]
    if not any(found[0] == major and found[1] <= minor for found in known) and capability < max(known):
        built = ", ".join(f"{a}.{b}" for a, b in known)
        return (
            f"llama_fast._cuda was built for compute capability {built} and this GPU is {major}.{minor}; install "
            f"llama_fast again with LLAMA_FAST_CUDA_ARCHS={10 * major + minor}"
        )
    if checked_only:
        checked = json.loads(CHECKED.read_text(encoding="utf-8"))
        if f"{major}.{minor}" not in checked.get(module.source_hash, {}):
            return f"llama_fast._cuda has not been checked on compute capability {major}.{minor}"
    try:
        with torch.cuda.device(index):
            # Not at the first launch, which may be a captured one.
            module.load()
    except RuntimeError as error:
        return f"llama_fast._cuda does not run on this GPU: {error}"
    return ""


def serves(packed: PlanarInt4, activation: str | None = None) -> bool:
    """Whether generated rows times `packed` are the extension's; whatever their number.

    Args:
        activation: of a gated projection.

    Raises:
        BackendError: as in_use.
    """
    return (
        in_use(packed.scales.device)
        and packed.scales.dtype == torch.bfloat16
        and not _misfit(packed, activation is not None)
        and (activation is None or ACTIVATIONS.get(activation) in _NUMBERS)
    )


def _misfit(packed: PlanarInt4, gated: bool) -> str:
    outputs = packed.out_features // (2 if gated else 1)
    if outputs % 2:
        return f"out_features={outputs} must be even"
    if packed.in_features > _MAX_ROW:
        return f"in_features={packed.in_features} must be at most {_MAX_ROW}"
    for name, tensor, alignment in (
        ("words", packed.words, _BYTES),
        ("scales", packed.scales, _NUMBER_BYTES),
        ("zeros", packed.zeros, _NUMBER_BYTES),
    ):
        if tensor is not None and (tensor.data_ptr() % alignment or not tensor.is_contiguous()):
            return f"{name} must be contiguous and start at a multiple of {alignment} bytes"
    return ""


def int4_linear(
    x: Tensor,
    packed: PlanarInt4,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times the dequantized weight's transpose; then bias, and at most one of residual add and gated activation.

    The twin of kernels/int4_linear.py on the same packing, with the same roundings and another order of summation,
    which depends on in_features and the group size alone: a row has the same bits in any company. One launch on the
    current stream, which may be under capture. It reads the weight while the kernel before it on the stream still
    runs, so that one must not be what writes the weight.

    Args:
        x: bf16 [num_tokens, in_features]; rows start at multiples of 16 bytes.
        packed: of `pack_int4`, with bf16 scales and an even number of outputs; with `activation` gate's outputs, then
            up's, an even number each.
        residual: bf16 [num_tokens, out_features], contiguous, added to the rounded projection.
        activation: silu, gelu, gelu_tanh, relu or another name of these: the result is activation(gate) * up.
        out_dtype: bfloat16 (None) or float32.

    Returns:
        [num_tokens, out_features], or half of that with `activation`.

    Raises:
        KernelArgumentError: dtypes, devices, shapes, strides or an alignment that are not as above.
        BackendError: the extension is not there, or CUDA refused the launch.

    Source: PTX ISA, mma.m16n8k16, as csrc/cuda/int4_linear.h tells.
    """
    op = "int4_linear"
    triton_int4._check(x, packed, residual, activation, out_dtype)  # the twin's own, so that both refuse alike
    if x.dtype != torch.bfloat16:
        refuse(op, f"x is {x.dtype}; the CUDA extension takes bfloat16; set {VARIABLE}=off")
    if problem := _misfit(packed, activation is not None):
        refuse(op, f"{problem} for the CUDA extension; set {VARIABLE}=off")
    num_rows, in_features = x.shape
    x_stride = x.stride(0) if num_rows > 1 else in_features
    if x.data_ptr() % _BYTES or x_stride % _ELEMENTS or x_stride > _MAX_ROW:
        refuse(
            op,
            f"x's rows must start at multiples of {_BYTES} bytes, at most {_MAX_ROW} elements apart, for the CUDA "
            f"extension; got address {x.data_ptr():#x} and stride {x_stride}; use x.contiguous()",
        )
    number = 0
    if activation is not None:
        number = _NUMBERS.get(ACTIVATIONS[activation], 0)
        if not number:
            refuse(op, f"activation={activation!r} is not in the CUDA extension; set {VARIABLE}=off")
    module, reason = extension()
    if module is None:
        raise BackendError(f"int4_linear: {reason}")
    out_features = packed.out_features // 2 if number else packed.out_features
    out = torch.empty((num_rows, out_features), dtype=out_dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    try:
        module.int4_linear(
            x.data_ptr(),
            x_stride,
            num_rows,
            packed.words.data_ptr(),
            packed.scales.data_ptr(),
            0 if packed.zeros is None else packed.zeros.data_ptr(),
            0 if packed.bias is None else packed.bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            out_features,
            in_features,
            packed.group_size,
            number,
            out.dtype == torch.float32,
            _stream(x.device),
        )
    except RuntimeError as error:
        raise BackendError(f"int4_linear: {error}") from error
    return out


def _stream(device: torch.device) -> int:
    """Address of the stream that PyTorch works on."""
    return torch.cuda.current_stream(device).cuda_stream

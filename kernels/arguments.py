"""What every kernel checks before it launches, so that bad tensors are refused before any work."""

from __future__ import annotations

from typing import NoReturn

import torch
import triton
from torch import Tensor

from llama_fast.errors import KernelArgumentError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Fixed when a kernel is decorated, so read once, here.
INTERPRETED: bool = triton.knobs.runtime.interpret
_DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"
# What a 128-bit load needs.
_ALIGNMENT = 16


def refuse(op: str, problem: str) -> NoReturn:
    """Raise KernelArgumentError in the name of an op."""
    raise KernelArgumentError(f"{op}: {problem}")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Floating-point arguments of an op: one dtype of DTYPES, one device that kernels run on, nothing for autograd.

    Raises:
        KernelArgumentError: they are not; None stands for an argument that is not given.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    if first.dtype not in DTYPES:
        refuse(op, f"{first_name} is {first.dtype}; use float16, bfloat16 or float32")
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            refuse(op, f"{name} is {tensor.dtype} and {first_name} is {first.dtype}; give both one dtype")
    check_devices(op, **given)


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """All tensors on one device that kernels run on, none of them recorded by autograd."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    if first.device.type != _DEVICE_TYPE:
        wanted = "a CPU tensor, since TRITON_INTERPRET=1 is set" if INTERPRETED else "a CUDA tensor"
        refuse(op, f"{first_name} is on {first.device}; the kernel takes {wanted}; elsewhere use backend='reference'")
    for name, tensor in given.items():
        if tensor.device != first.device:
            refuse(op, f"{name} is on {tensor.device} and {first_name} on {first.device}; move one of them")
        if tensor.requires_grad and torch.is_grad_enabled():
            refuse(op, f"{name} requires grad and kernels have no backward; use backend='reference' or torch.no_grad()")


def check_integers(op: str, **tensors: Tensor) -> None:
    """Index arguments are int64."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            refuse(op, f"{name} is {tensor.dtype}; use int64")


def contiguous(x: Tensor) -> Tensor:
    """`x` with adjacent rows that start where 128-bit loads may, copied if need be.

    How a row is spread over a program's threads follows from strides and alignment, and with it the order of a sum;
    a kernel that sums along rows takes them in one form only.
    """
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()

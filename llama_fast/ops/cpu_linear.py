"""Weights of the CPU backend's matmuls: projections where the checkpoint has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_fast.errors import KernelArgumentError
from llama_fast.ops.activations import ACTIVATIONS, Activation
from llama_fast.ops.cpu_arguments import DTYPES, check
from llama_fast.ops.int4 import GROUP_SIZES, MAX_ZERO, Int4Linear
from llama_fast.ops.native import required
from llama_fast.ops.reference import LinearPart

# In the order of csrc/cpu/calls.h.
ACTIVATION_NUMBERS = {
    "silu": 0,
    "swish": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "laplace": 3,
    "leaky_relu": 4,
    "linear": 5,
    "mish": 6,
    "quick_gelu": 7,
    "relu": 8,
    "relu2": 9,
    "relu6": 10,
    "sigmoid": 11,
    "tanh": 12,
}
_OP = "prepare_linear"
# A configuration may hold the function itself instead of its name.
_NAMES = {function: name for name, function in ACTIVATIONS.items()}


@dataclass(frozen=True)
class LinearWeight:
    """Several projections of one input, used where they lie.

    Attributes:
        parts: the checkpoint's parameters, or the modules that hold quantized ones.
        native: their addresses, for the kernels.
        tensors: what the addresses point at; kept alive here.
        activation: of gate and up.
        trainable: whether a gradient of a parameter would be lost here.
    """

    parts: tuple[LinearPart | Int4Linear, ...]
    native: Any
    tensors: tuple[Tensor, ...]
    in_features: int
    out_features: int
    dtype: torch.dtype
    activation: str | Activation | None
    trainable: bool

    @property
    def pair(self) -> bool:
        """Whether the parts are gate and up of one width, which one kernel takes together."""
        first = self.parts[0]
        height = first.out_features if isinstance(first, Int4Linear) else len(first.weight)
        return len(self.parts) == 2 and height * 2 == self.out_features

    def __reduce__(self) -> tuple:
        # A copy's parameters lie elsewhere: it holds no address, and `LlamaLM.prepare` makes its weights anew.
        return LinearWeight, (*(self.parts, None, ()), *list(vars(self).values())[3:])


def prepare_linear(
    parts: Sequence[nn.Linear] | Sequence[Int4Linear], activation: str | Activation | None = None
) -> LinearWeight:
    """Take several projections of the same input (q, k, v; gate, up) as one; nothing is copied.

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None; or quantized ones
            with groups of one size, with or without zeros.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.

    Raises:
        BackendError: the native module is not there.
        KernelArgumentError: a parameter has a dtype or device that the kernels do not serve, or shapes do not fit.
    """
    quantized = [part for part in parts if isinstance(part, Int4Linear)]
    plain = [part for part in parts if not isinstance(part, Int4Linear)]
    if quantized and plain:
        raise KernelArgumentError(
            f"{_OP}: {len(quantized)} of {len(parts)} parts are quantized; one weight's are all quantized or none"
        )
    group_size = quantized[0].group_size if quantized else 0
    held = [_int4_part(part, group_size) for part in quantized] or [_dense_part(part) for part in plain]
    first = held[0]
    for part in held:
        check(_OP, "weight" if part.scales is None else "weight_scale", part.numbers, first.numbers.dtype, 2)
        if part.in_features != first.in_features:
            raise KernelArgumentError(
                f"{_OP}: parts take one input; got weights {[(p.out_features, p.in_features) for p in held]}"
            )
        if part.bias is not None:
            check(_OP, "bias", part.bias, first.numbers.dtype, 1)
            if part.bias.shape[0] != part.out_features:
                raise KernelArgumentError(
                    f"{_OP}: bias {tuple(part.bias.shape)} does not fit weight {(part.out_features, part.in_features)}"
                )
    return LinearWeight(
        parts=tuple(quantized) or tuple(LinearPart(part.weight, part.bias) for part in plain),
        native=required().LinearWeight(
            DTYPES[first.numbers.dtype], first.in_features, group_size, [part.addresses() for part in held]
        ),
        tensors=tuple(tensor for part in held for tensor in part.tensors() if tensor is not None),
        in_features=first.in_features,
        out_features=sum(part.out_features for part in held),
        dtype=first.numbers.dtype,
        trainable=any(parameter.requires_grad for part in parts for parameter in part.parameters()),
        activation=activation if isinstance(activation, str | None) else _NAMES.get(activation, activation),
    )


@dataclass(frozen=True)
class _Part:
    """One projection's memory: rows without gaps."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0] if self.weight.ndim else 0

    @property
    def numbers(self) -> Tensor:
        """Of the activations' dtype."""
        return self.weight if self.scales is None else self.scales

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.scales, self.zeros

    def addresses(self) -> tuple[int, int, int, int, int]:
        """As csrc/bindings.cpp takes a part."""
        weight, *rest = (0 if tensor is None else tensor.data_ptr() for tensor in self.tensors())
        bias, scales, zeros = rest
        return weight, bias, self.out_features, scales, zeros


def _dense_part(part: nn.Linear) -> _Part:
    # Only a weight that is a transposed view or the like is copied.
    weight = part.weight.detach().contiguous()
    return _Part(weight, _bias(part), weight.shape[-1] if weight.ndim else 0)


def _int4_part(part: Int4Linear, group_size: int) -> _Part:
    """A quantized projection, whose words and zeros are checked here: the kernels follow them."""
    if part.group_size != group_size or group_size not in GROUP_SIZES:
        raise KernelArgumentError(
            f"{_OP}: groups of {part.group_size} beside {group_size}; one weight's are of one size, "
            f"{', '.join(map(str, GROUP_SIZES))}"
        )
    # In the files' order, which is a copy only where another backend holds another.
    words, scales = part.rows().contiguous(), part.weight_scale.detach().contiguous()
    zeros = None if part.weight_zero_point is None else part.weight_zero_point.detach().contiguous()
    outs, ins = part.out_features, part.in_features
    shapes = {"weight_packed": (words, torch.int32, (outs, ins // 8)), "weight_scale": (scales, scales.dtype, None)}
    if zeros is not None:
        shapes["weight_zero_point"] = zeros, torch.uint8, None
    for name, (tensor, dtype, shape) in shapes.items():
        shape = shape or (outs, ins // group_size)
        if tensor.dtype is not dtype or not tensor.is_cpu or tensor.shape != shape or ins % group_size:
            raise KernelArgumentError(
                f"{_OP}: {name} must be {dtype} {shape} on the CPU, for weight {(outs, ins)} in groups of {group_size};"
                f" got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if zeros is not None and zeros.numel() and int(zeros.max()) > MAX_ZERO:
        raise KernelArgumentError(f"{_OP}: weight_zero_point holds {int(zeros.max())}; accepted: 0 to {MAX_ZERO}")
    return _Part(words, _bias(part), ins, scales, zeros)


def _bias(part: nn.Linear | Int4Linear) -> Tensor | None:
    return None if part.bias is None else part.bias.detach().contiguous()

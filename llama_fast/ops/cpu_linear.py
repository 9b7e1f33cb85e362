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
# A configuration may hold the function itself instead of its name.
_NAMES = {function: name for name, function in ACTIVATIONS.items()}


@dataclass(frozen=True)
class LinearWeight:
    """Several projections of one input, used where they lie.

    Attributes:
        parts: the checkpoint's parameters.
        native: their addresses, for the kernels.
        tensors: what the addresses point at; kept alive here.
        activation: of gate and up.
        trainable: whether a gradient of a parameter would be lost here.
    """

    parts: tuple[LinearPart, ...]
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
        return len(self.parts) == 2 and len(self.parts[0].weight) * 2 == self.out_features

    def __reduce__(self) -> tuple:
        # A copy's parameters lie elsewhere: it holds no address, and `LlamaLM.prepare` makes its weights anew.
        return LinearWeight, (*(self.parts, None, ()), *list(vars(self).values())[3:])


def prepare_linear(parts: Sequence[nn.Linear], activation: str | Activation | None = None) -> LinearWeight:
    """Take several projections of the same input (q, k, v; gate, up) as one; nothing is copied.

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.

    Raises:
        BackendError: the native module is not there.
        KernelArgumentError: a parameter has a dtype or device that the kernels do not serve, or shapes do not fit.
    """
    # Only a weight that is a transposed view or the like is copied.
    weights = [part.weight.detach().contiguous() for part in parts]
    biases = [None if part.bias is None else part.bias.detach().contiguous() for part in parts]
    first = weights[0]
    for weight, bias in zip(weights, biases, strict=True):
        check("prepare_linear", "weight", weight, first.dtype, 2)
        if weight.shape[1] != first.shape[1]:
            raise KernelArgumentError(
                f"prepare_linear: parts take one input; got weights {[tuple(w.shape) for w in weights]}"
            )
        if bias is not None:
            check("prepare_linear", "bias", bias, first.dtype, 1)
            if bias.shape[0] != weight.shape[0]:
                raise KernelArgumentError(
                    f"prepare_linear: bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}"
                )
    addresses = [
        (weight.data_ptr(), 0 if bias is None else bias.data_ptr(), weight.shape[0])
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return LinearWeight(
        parts=tuple(LinearPart(part.weight, part.bias) for part in parts),
        native=required().LinearWeight(DTYPES[first.dtype], first.shape[1], addresses),
        tensors=(*weights, *(bias for bias in biases if bias is not None)),
        in_features=first.shape[1],
        out_features=sum(weight.shape[0] for weight in weights),
        dtype=first.dtype,
        trainable=any(parameter.requires_grad for part in parts for parameter in part.parameters()),
        activation=activation if isinstance(activation, str | None) else _NAMES.get(activation, activation),
    )

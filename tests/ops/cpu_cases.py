"""Projections and layouts that the CPU backend's tests share."""

import torch
from torch import nn

from llama_fast.ops import cpu


def projection(weight, bias=None):
    """A module with these parameters, where they lie."""
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
    return module


def prepared(weight, bias=None, num_parts=1, activation=None, ops=cpu):
    """One weight of a backend, from parts of unequal height."""
    first = max(1, weight.shape[0] // (num_parts + 1)) if num_parts > 1 else weight.shape[0]
    ends = [first * (part + 1) for part in range(num_parts - 1)]
    biases = [None] * num_parts if bias is None else bias.tensor_split(ends)
    parts = [projection(*part) for part in zip(weight.tensor_split(ends), biases, strict=True)]
    return ops.prepare_linear(parts, activation)


def gate_up_of(weight, bias=None, activation="silu", ops=cpu):
    """A backend's gate and up, halves of `weight`."""
    biases = (None, None) if bias is None else bias.chunk(2)
    parts = [projection(*part) for part in zip(weight.chunk(2), biases, strict=True)]
    return ops.prepare_linear(parts, activation)


def offset(x, elements):
    """The same numbers, from an address that many elements past an aligned one."""
    return torch.cat((x.new_zeros(elements), x.flatten()))[elements:].view(x.shape)

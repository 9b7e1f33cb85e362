"""Projections of 4-bit integers: what a module holds, in the one order that files and all backends share.

A weight is (value - zero) * scale: `value` has 4 bits, and a group of 32, 64 or 128 consecutive input features of an
output shares a zero and a scale. Products with a scale of 16 bits are exact in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llama_fast.errors import UnsupportedError

GROUP_SIZES = (32, 64, 128)
# The zero of a symmetric weight, and the largest of an asymmetric one: GPTQ's first format stores zeros minus 1.
SYMMETRIC_ZERO, MAX_ZERO = 8, 16
# An `Int4Linear`'s parameters beside its bias.
INT4_SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point")
# Values in a word.
_NIBBLES = 8


def pack_rows(values: Tensor) -> Tensor:
    """uint8 [out_features, in_features], each below 16 -> int32 [out_features, in_features / 8].

    Nibble i of word r, counted from the lowest bits, is input feature 8 * r + i: the order of compressed-tensors'
    "pack-quantized" files.
    """
    pairs = values.view(values.shape[0], -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(torch.int32)


def unpack_rows(words: Tensor) -> Tensor:
    """The inverse of `pack_rows`."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


@dataclass(frozen=True)
class Int4Weight:
    """A projection of (values - zero) * scale, unpacked.

    Attributes:
        values: uint8 [out_features, in_features], 0 to 15.
        scales: [out_features, groups] in the activation dtype; a group is 32, 64 or 128 consecutive input features.
        zeros: uint8 [out_features, groups], 0 to 16, or None: 8 throughout (symmetric).
        bias: [out_features] in the activation dtype, or None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None

    def dequantized(self, rows: slice = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        """Some outputs' weight in `dtype`, which is scales' by default; fp32 holds that of 16-bit scales exactly."""
        scales = self.scales[rows].to(dtype or self.scales.dtype)
        values = self.values[rows].unflatten(1, (scales.shape[1], -1)).to(scales.dtype)
        zeros = SYMMETRIC_ZERO if self.zeros is None else self.zeros[rows, :, None].to(scales.dtype)
        return ((values - zeros) * scales[:, :, None]).flatten(1)


class Int4Linear(nn.Module):
    """Parameters of a quantized projection, none of which is trained.

    Attributes:
        weight_packed: int32 [out_features, in_features / 8], as `pack_rows` makes it, unless a backend holds it in an
            order of its own (`reorder`).
        weight_scale: [out_features, groups] in the activation dtype.
        weight_zero_point: uint8 [out_features, groups], 0 to 16, or None: 8 throughout.
        bias: [out_features] in the activation dtype, or None.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, group_size: int, symmetric: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = in_features // group_size

        def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        self.weight_packed = parameter(out_features, in_features // _NIBBLES, dtype=torch.int32)
        self.weight_scale = parameter(out_features, groups)
        self.weight_zero_point = None if symmetric else parameter(out_features, groups, dtype=torch.uint8)
        self.bias = parameter(out_features) if bias else None
        self._restore: Callable[[Tensor], Tensor] | None = None

    def extra_repr(self) -> str:
        symmetric = self.weight_zero_point is None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"symmetric={symmetric}, bias={self.bias is not None}"
        )

    def reorder(self, words: Tensor, restore: Callable[[Tensor], Tensor]) -> None:
        """Hold the values as `words`, a backend's permutation of them, so that they are in memory once.

        Args:
            words: what `weight_packed` becomes; may be a view of a larger tensor.
            restore: `words` -> what `rows` returns.
        """
        self.weight_packed.data = words
        self._restore = restore

    def rows(self) -> Tensor:
        """The values as `pack_rows` makes them, in whichever order they are held."""
        return self.weight_packed.data if self._restore is None else self._restore(self.weight_packed.data)

    def unpacked(self, outputs: slice = slice(None)) -> Int4Weight:
        """Some outputs' weight with a byte a value, as a copy."""
        zeros = None if self.weight_zero_point is None else self.weight_zero_point.data[outputs]
        bias = None if self.bias is None else self.bias[outputs]
        return Int4Weight(unpack_rows(self.rows()[outputs]), self.weight_scale[outputs], zeros, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        before = self.weight_scale.dtype
        super()._apply(fn, recurse)
        scales = self.weight_scale.data
        if scales.dtype != before and not scales.is_meta:
            tiny = torch.finfo(scales.dtype).tiny
            if wrong := int((~((scales >= tiny) & scales.isfinite())).sum()):
                raise UnsupportedError(
                    f"{wrong} scales of an int4 weight are no normal numbers in {scales.dtype}; load the model again "
                    f"with dtype={str(before).removeprefix('torch.')!r}"
                )
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # What is loaded is in the files' order.
        if f"{prefix}weight_packed" in state_dict and self._restore is not None:
            self.weight_packed.data = self.rows()
            self._restore = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._restore is not None and not keep_vars:
            destination[f"{prefix}weight_packed"] = self.rows()

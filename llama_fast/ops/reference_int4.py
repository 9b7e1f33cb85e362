"""The reference backend's linear over a weight of 4-bit integers, and that weight as a checkpoint's loader makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ops.rows import MATMUL_MULTIPLE, in_row_blocks, needs_grad, widen

# Output features dequantized at a time: a whole fp32 weight would be eight times the packed one.
_CHUNK = 512


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
        zeros = 8 if self.zeros is None else self.zeros[rows, :, None].to(scales.dtype)
        return ((values - zeros) * scales[:, :, None]).flatten(1)


def prepare_int4(parts: Sequence[Int4Weight]) -> Int4Weight:
    """Make one weight of several of the same input (q, k, v; gate, up) and group size."""
    zeros = bias = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat(
            [torch.full_like(part.scales, 8, dtype=torch.uint8) if part.zeros is None else part.zeros for part in parts]
        )
    if any(part.bias is not None for part in parts):
        bias = torch.cat(
            [part.scales.new_zeros(part.scales.shape[0]) if part.bias is None else part.bias for part in parts]
        )
    values, scales = torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts])
    return Int4Weight(values, scales, zeros, bias)


def int4_linear(x: Tensor, weight: Int4Weight, generated: bool = False) -> Tensor:
    """x times the dequantized weight's transpose, plus bias: [num_tokens, in_features] -> [num_tokens, out_features].

    The weight is dequantized to fp32 (fp64 for fp64), exactly so for 16-bit scales; sums and bias are fp32; the result
    is rounded to x's dtype once. The kernel sums integers first and multiplies a group's sum by its scale: the same
    number, other roundings of fp32.

    Args:
        generated: whether the rows are generated tokens (see Batch); both roles take one route here.
    """
    wide = widen(x)

    def times(rows: slice) -> Tensor:
        part = weight.dequantized(rows, wide.dtype)
        missing = -part.shape[0] % MATMUL_MULTIPLE
        part = F.pad(part, (0, 0, 0, missing))
        outputs = F.linear(wide, part) if needs_grad(x) else in_row_blocks(lambda block: F.linear(block, part), wide)
        return outputs[:, : outputs.shape[1] - missing]

    chunks = [slice(start, start + _CHUNK) for start in range(0, weight.values.shape[0], _CHUNK)]
    y = torch.cat([times(rows) for rows in chunks], dim=-1)
    if weight.bias is not None:
        y = y + weight.bias.to(y.dtype)
    return y.to(x.dtype)

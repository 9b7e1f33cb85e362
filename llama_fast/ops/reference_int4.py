"""The reference backend's linear over a weight of 4-bit integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ops.int4 import Int4Linear, Int4Weight
from llama_fast.ops.rows import MATMUL_MULTIPLE, in_row_blocks, needs_grad, widen

# Output features dequantized at a time: a whole fp32 weight would be eight times the packed one.
_CHUNK = 512


def int4_linear(x: Tensor, weight: Int4Weight, out_dtype: torch.dtype | None = None) -> Tensor:
    """x times the dequantized weight's transpose, plus bias: [num_tokens, in_features] -> [num_tokens, out_features].

    The weight is dequantized to fp32 (fp64 for fp64), exactly so for 16-bit scales; sums and bias are fp32; the result
    is rounded to `out_dtype`, which is x's by default, once. The kernels sum integers first and multiply a group's sum
    by its scale: the same number, other roundings of fp32.
    """
    wide = widen(x)
    dense = weight.dequantized(dtype=wide.dtype)
    out_features = dense.shape[0]
    dense = F.pad(dense, (0, 0, 0, -out_features % MATMUL_MULTIPLE))
    trained = needs_grad(x, weight.scales, weight.bias)
    y = F.linear(wide, dense) if trained else in_row_blocks(lambda rows: F.linear(rows, dense), wide)
    y = y[:, :out_features]
    if weight.bias is not None:
        y = y + weight.bias.to(y.dtype)
    return y.to(out_dtype or x.dtype)


def int4_module_linear(x: Tensor, module: Int4Linear, out_dtype: torch.dtype | None = None) -> Tensor:
    """`int4_linear` with a module's weight, some outputs at a time."""
    starts = range(0, module.out_features, _CHUNK)
    chunks = [int4_linear(x, module.unpacked(slice(start, start + _CHUNK)), out_dtype) for start in starts]
    return torch.cat(chunks, dim=-1)

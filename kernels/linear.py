"""linear: x times the weight's transpose, the same bits for a row in any company, with epilogues that save a pass.

Fused    bias; residual add; activation(gate) * up over a weight whose first half is gate and second half is up.
Traffic  weight once for each block of rows (once up to 64 rows): memory-bound up to some 200 rows, then compute-bound:
         2 * num_tokens * out_features * in_features FLOPs.
Shapes   x [num_tokens, in_features], weight [out_features, in_features] -> [num_tokens, out_features]
Dtypes   fp16, bf16 or fp32 for x and weight; fp32 sums; out in x's dtype, or fp32 (logits). What an unfused op would
         store is rounded where it would: the projection before the residual add, gate and up before the activation.

The weight is the MMA's A operand and the tokens its B: an output is one sum along in_features, taken in steps of the
MMA in ascending order, whatever the tile. So one kernel serves every number of rows, and prompt and generated rows take
one route. Cutting the sum in 2 or 4 for few output features (split-K) was tried on an H100: at one row 88% of the bound
instead of 80% for Llama 1B's down projection, no gain for any other shape of 1B and 8B, for a second launch and another
order of summation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import configs
from llama_fast.kernels.arguments import check_tensors, refuse
from llama_fast.kernels.overlap import begin, options
from llama_fast.kernels.silu_mul import ACTIVATIONS, activate

# Tiles of output features that share a block of rows in L2 before the next block of rows begins.
_GROUP = 8


@triton.jit
def finish(y, rows, cols, mask, bias_ptr, residual_ptr, out_ptr, out_features, DTYPE: tl.constexpr):
    """Bias, rounding, residual add and store of y [rows, cols], fp32."""
    offsets = rows.to(tl.int64)[:, None] * out_features + cols[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, cols < out_features, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        y = y.to(DTYPE).to(tl.float32) + tl.load(residual_ptr + offsets, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    out_features,
    in_features,
    x_stride,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    # Programs that share a block of rows, or a tile of the weight, are neighbours, so that L2 serves the second.
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    group_size = GROUP * row_tiles
    first_out = (tile // group_size) * GROUP
    group_outs = tl.minimum(out_tiles - first_out, GROUP)
    out_tile = first_out + (tile % group_size) % group_outs
    row_tile = (tile % group_size) // group_outs

    cols = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ks = tl.arange(0, BLOCK_K)

    # A tile over the edge reads the last output's weight again and stores nothing of it. int64: a 405B model's LM head
    # has 2.1e9 elements.
    weight_rows = tl.minimum(cols, out_features - 1).to(tl.int64)
    weight_ptrs = weight_ptr + weight_rows[:, None] * in_features + ks[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + ks[:, None]
    row_mask = (rows < num_rows)[None, :]
    # tl.cast: Triton compiles an argument that is 1 as a plain number, without methods.
    up_ptrs = weight_ptrs + tl.cast(out_features, tl.int64) * in_features
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    up = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, row_mask, other=0.0)
            weight = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, row_mask & (ks[:, None] + k < in_features), other=0.0)
            weight = tl.load(weight_ptrs, ks[None, :] + k < in_features, other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
        if ACTIVATION is not None:
            if EVEN_K:  # noqa: SIM108 - beside its twin above
                weight = tl.load(up_ptrs)
            else:
                weight = tl.load(up_ptrs, ks[None, :] + k < in_features, other=0.0)
            up = tl.dot(weight, x, up, input_precision="ieee")
            up_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    y = tl.trans(acc)
    mask = (rows < num_rows)[:, None] & (cols < out_features)[None, :]
    if ACTIVATION is not None:
        # Both halves get their bias here, and are rounded as if they had been stored.
        up = tl.trans(up)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, cols < out_features, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + out_features + cols, cols < out_features, other=0.0).to(tl.float32)[None, :]
        y = activate(y.to(dtype).to(tl.float32), ACTIVATION) * up.to(dtype).to(tl.float32)
        finish(y, rows, cols, mask, None, None, out_ptr, out_features, dtype)
    else:
        finish(y, rows, cols, mask, bias_ptr, residual_ptr, out_ptr, out_features, dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times weight's transpose; then bias, and at most one of residual add and gated activation.

    Args:
        x: [num_tokens, in_features]; rows may be strided, columns may not.
        weight: [out_features, in_features], contiguous; with `activation` gate's rows, then up's.
        bias: [out_features], added in fp32.
        residual: [num_tokens, out_features], contiguous, added to the rounded projection.
        activation: a name of silu_mul.ACTIVATIONS: the result is activation(gate) * up, half as wide.
        out_dtype: x's or float32.

    Returns:
        [num_tokens, out_features], or half of that with `activation`.

    Raises:
        KernelArgumentError: dtypes, devices, shapes or strides that are not as above.
    """
    _check(x, weight, bias, residual, activation, out_dtype)
    gated = activation is not None
    num_rows, in_features = x.shape
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((num_rows, out_features), dtype=out_dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    table = configs.table_of(x.device)
    tile = configs.linear_tile(table, x.dtype, gated, out_features, num_rows)
    tiles = triton.cdiv(out_features, tile.block_out) * triton.cdiv(num_rows, tile.block_rows)
    _linear_kernel[(tiles,)](
        x,
        weight,
        bias,
        residual,
        out,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        ACTIVATIONS[activation] if activation is not None else None,
        in_features % tile.block_k == 0,
        _GROUP,
        tile.block_out,
        tile.block_rows,
        tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(table),
    )
    return out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> None:
    op = "linear"
    check_tensors(op, x=x, weight=weight, bias=bias, residual=residual)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not x.shape[1]:
        refuse(
            op,
            "x must be [num_tokens, in_features] and weight [out_features, in_features]; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}",
        )
    if x.stride(1) != 1 or not weight.is_contiguous():
        refuse(op, f"x's columns and weight must be contiguous; got strides {x.stride()} and {weight.stride()}")
    out_features = weight.shape[0]
    if bias is not None and (bias.shape != (out_features,) or not bias.is_contiguous()):
        refuse(op, f"bias must be [{out_features}] and contiguous; got {tuple(bias.shape)}, stride {bias.stride()}")
    if residual is not None and (residual.shape != (x.shape[0], out_features) or not residual.is_contiguous()):
        refuse(op, f"residual must be {(x.shape[0], out_features)} and contiguous; got {tuple(residual.shape)}")
    if out_dtype not in (None, x.dtype, torch.float32):
        refuse(op, f"out_dtype={out_dtype}; use {x.dtype} or torch.float32")
    if activation is not None:
        if activation not in ACTIVATIONS:
            refuse(op, f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        if out_features % 2 or residual is not None:
            refuse(op, f"activation needs gate and up of equal height and no residual; weight has {out_features} rows")

"""int4_linear: linear over a weight of 4-bit integers, unpacked in registers on their way to the MMA.

Fused    dequantize; then bias, residual add or activation(gate) * up, as in linear.
Traffic  out_features * in_features * (1/2 + itemsize / group_size) bytes, with zeros twice the second term, once for
         each block of rows (once up to 64 rows): memory-bound for a few rows, then bound by unpacking, then by the MMA.
Shapes   x [num_tokens, in_features], weight [out_features, in_features] -> [num_tokens, out_features]
Dtypes   fp16, bf16 or fp32 for x, scales and bias; fp32 sums; out in x's dtype, or fp32. A weight is never rounded:
         the integer minus its zero is exact in each dtype, and scales multiply sums in fp32.
Layout   `pack_int4` makes it once (see PlanarInt4): a nibble of a thread's words is an element of the MMA's operand in
         the same thread, so that unpacking is shifts and masks and nothing moves between threads.

A group's products are summed as integers times x in steps of the MMA in ascending order; one fused multiply-add with
the scale takes the group into the output's sum. This order follows from in_features and the group size alone. As in
linear the weight is the MMA's A operand and the tokens its B; one kernel serves every number of rows, and prompt and
generated rows take one route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import configs
from llama_fast.kernels.arguments import check_devices, check_tensors, refuse
from llama_fast.kernels.linear import finish
from llama_fast.kernels.overlap import begin, options
from llama_fast.kernels.silu_mul import ACTIVATIONS, activate

if TYPE_CHECKING:
    from llama_fast.ops.int4 import Int4Weight

GROUP_SIZES = (32, 64, 128)
# The zero of a symmetric weight, and the largest of an asymmetric one: GPTQ's first format stores zeros minus 1.
SYMMETRIC_ZERO, _MAX_ZERO = 8, 16
# 16 words hold a block of input features. One nibble of all 16 is a plane: as many as one step of the MMA takes.
_BLOCK, _WORDS, _PLANES = 128, 16, 8
# Words that are repacked at a time, so that what lies between is small beside a large weight.
_CHUNK_WORDS = 2**22
# Tiles of output features that share a block of rows in L2 before the next block of rows begins.
_GROUP = 8


@dataclass(frozen=True)
class PlanarInt4:
    """A weight as the kernel reads it; one or several parts, their outputs one after the other.

    Attributes:
        words: int32 [blocks, out_features, 16]; nibble j of word i is input feature 128 * block + 16 * j + i. Features
            past the last are 0. What a program loads at a time is contiguous.
        scales: [groups, out_features] in the activation dtype.
        zeros: integers in scales' shape and dtype, or None: 8 throughout. (As bytes they would make Triton choose
            another layout of the MMA's operands on sm_80, one that the words are not in.)
        bias: [out_features] or None.
        in_features: without padding.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[0]


def pack_int4(*parts: Int4Weight) -> PlanarInt4:
    """Repack one weight, or several of the same input (q, k, v; gate, up).

    Raises:
        KernelArgumentError: shapes, dtypes or values are not Int4Weight's, or parts differ in input or group size.
    """
    for part in parts:
        _check_part(part, parts[0])
    out_features, in_features = sum(part.values.shape[0] for part in parts), parts[0].values.shape[1]
    scales = torch.cat([part.scales for part in parts]).t().contiguous()
    zeros = bias = None
    if any(part.zeros is not None for part in parts):
        given = [torch.full_like(p.scales, SYMMETRIC_ZERO) if p.zeros is None else p.zeros for p in parts]
        zeros = torch.cat([zero.to(scales.dtype) for zero in given]).t().contiguous()
    if any(part.bias is not None for part in parts):
        bias = torch.cat([p.scales.new_zeros(p.scales.shape[0]) if p.bias is None else p.bias for p in parts])
    blocks = triton.cdiv(in_features, _BLOCK)
    words = torch.zeros((blocks, out_features, _WORDS), dtype=torch.int32, device=scales.device)
    row = 0
    for part in parts:
        rows = part.values.shape[0]
        padded = torch.nn.functional.pad(part.values, (0, blocks * _BLOCK - in_features))
        planes = padded.view(rows, blocks, _PLANES, _WORDS)
        for plane in range(_PLANES):
            words[:, row : row + rows] |= planes[:, :, plane].transpose(0, 1).to(torch.int32) << (4 * plane)
        row += rows
    return PlanarInt4(words, scales, zeros, bias, in_features)


def unpack_int4(packed: PlanarInt4) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of the Int4Weight that was packed (of several parts: of all as one)."""
    shifts = torch.arange(0, 4 * _PLANES, 4, device=packed.words.device)
    planes = (packed.words[:, :, None] >> shifts[:, None]) & 15  # [blocks, out_features, planes, 16]
    values = planes.transpose(0, 1).flatten(1)[:, : packed.in_features].to(torch.uint8)
    zeros = None if packed.zeros is None else packed.zeros.t().contiguous().to(torch.uint8)
    return values.contiguous(), packed.scales.t().contiguous(), zeros, packed.bias


def to_planes(rows: Tensor, planes: Tensor) -> None:
    """Repack words whose nibble i of word r is input feature 8 * r + i, as ops/int4.py's `pack_rows` makes them.

    Args:
        rows: int32 [out_features, in_features / 8].
        planes: int32 [blocks, out_features, 16], written: `PlanarInt4.words`, or some outputs of them.
    """
    blocks = planes.shape[0]
    for outs in _chunks(planes):
        # Word 2 * j + h of a block has of plane j the words 8 * h to 8 * h + 7.
        padded = torch.nn.functional.pad(rows[outs], (0, blocks * _WORDS - rows.shape[1]))
        halves = padded.view(-1, blocks, _PLANES, 2, 1)
        words = halves[:, :, 0] >> _shifts(rows) & 15
        for plane in range(1, _PLANES):
            words |= (halves[:, :, plane] >> _shifts(rows) & 15) << (4 * plane)
        planes[:, outs] = words.flatten(2).transpose(0, 1)


def from_planes(planes: Tensor, in_features: int) -> Tensor:
    """The rows that `to_planes` was given: int32 [out_features, in_features / 8]."""
    rows = planes.new_empty(planes.shape[1], planes.shape[0], _PLANES, 2)
    for outs in _chunks(planes):
        words = planes[:, outs].transpose(0, 1).unflatten(2, (2, 8))
        for plane in range(_PLANES):
            rows[outs, :, plane] = ((words >> (4 * plane) & 15) << _shifts(planes)).sum(-1, dtype=torch.int32)
    return rows.flatten(1)[:, : in_features // 8].contiguous()


def _chunks(planes: Tensor) -> list[slice]:
    """Outputs, some at a time."""
    size = max(1, _CHUNK_WORDS // (planes.shape[0] * _WORDS))
    return [slice(start, start + size) for start in range(0, planes.shape[1], size)]


def _shifts(words: Tensor) -> Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)


@triton.jit
def _plane(words, plane: tl.constexpr, dtype: tl.constexpr):
    """One nibble of each word; in 16 bits, where an exponent set beside it makes it a number, 2^m larger."""
    q = (words >> (4 * plane)) & 15
    if dtype == tl.bfloat16:
        return (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        return (q | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return q.to(tl.float32)


@triton.jit
def _pair(words, plane: tl.constexpr, distance: tl.constexpr, dtype: tl.constexpr):
    return tl.join(_plane(words, plane, dtype), _plane(words, plane + distance, dtype))


@triton.jit
def _group_of(words, group: tl.constexpr, GROUP_SIZE: tl.constexpr, dtype: tl.constexpr):
    """The integers of a group, planes in order: words [outs, 16] -> [outs, GROUP_SIZE], all within a thread."""
    if GROUP_SIZE == 32:
        q = tl.permute(_pair(words, 2 * group, 1, dtype), (0, 2, 1))
    elif GROUP_SIZE == 64:
        q = tl.join(_pair(words, 4 * group, 2, dtype), _pair(words, 4 * group + 1, 2, dtype))
        q = tl.permute(q, (0, 2, 3, 1))
    else:
        even = tl.join(_pair(words, 0, 4, dtype), _pair(words, 2, 4, dtype))
        odd = tl.join(_pair(words, 1, 4, dtype), _pair(words, 3, 4, dtype))
        q = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    return tl.reshape(q, (words.shape[0], GROUP_SIZE))


@triton.jit(do_not_specialize=["num_rows"])
def _int4_linear_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    num_rows,
    out_features,
    in_features,
    x_stride,
    ACTIVATION: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    # With an activation the first half of a tile is gate's and the second up's, so that one loop serves both.
    TILE_OUT: tl.constexpr = BLOCK_OUT if ACTIVATION is None else BLOCK_OUT // 2
    # As in linear: programs that share a block of rows, or a tile of the weight, are neighbours.
    out_tiles = tl.cdiv(out_features, TILE_OUT)
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    group_size = GROUP * row_tiles
    first_out = (tile // group_size) * GROUP
    group_outs = tl.minimum(out_tiles - first_out, GROUP)
    out_tile = first_out + (tile % group_size) % group_outs
    row_tile = (tile % group_size) // group_outs

    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = out_tile * TILE_OUT + tl.arange(0, TILE_OUT)
    # A tile over the edge reads the last output's weight again and stores nothing of it.
    places = tl.arange(0, BLOCK_OUT)
    outs = tl.minimum(out_tile * TILE_OUT + places % TILE_OUT, out_features - 1)
    weight_rows = out_features
    if ACTIVATION is not None:
        outs += (places // TILE_OUT) * out_features
        weight_rows = 2 * out_features

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # What `_plane` adds: 2^m, or nothing.
    BASE: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0 if dtype == tl.float16 else 0.0
    words_ptrs = words_ptr + outs[:, None] * 16 + tl.arange(0, 16)[None, :]
    x_ptrs = x_ptr + rows.to(tl.int64)[None, :] * x_stride + tl.arange(0, GROUP_SIZE)[:, None]
    row_mask = (rows < num_rows)[None, :]
    zero = tl.full((BLOCK_OUT,), 8.0, dtype)
    # Triton's pipeline brings in early what the MMA takes. Scales it leaves out, so they are loaded a group ahead.
    scale = tl.load(scales_ptr + outs)
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for block in range(0, in_features, 128):
        words = tl.load(words_ptrs)
        for g in tl.static_range(128 // GROUP_SIZE):
            k = block + GROUP_SIZE * g
            # in_features is a multiple of the group size: a group is there or not, as a whole.
            mask = row_mask if EVEN_K else row_mask & (k < in_features)
            x = tl.load(x_ptrs + GROUP_SIZE * g, mask, other=0.0)
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + outs) if EVEN_K else tl.load(zeros_ptr + outs, k < in_features, other=0.0)
                zeros_ptr += weight_rows
            scales_ptr += weight_rows
            next_scale = tl.load(scales_ptr + outs, k + GROUP_SIZE < in_features, other=0.0)
            # Exact: both are integers of few bits.
            weight = _group_of(words, g, GROUP_SIZE, dtype) - (zero + BASE)[:, None]
            sums = tl.dot(weight, x, input_precision="ieee")
            # Fused on purpose: the compiler might fuse multiply and add for one tile and not for another.
            acc = tl.fma(sums, tl.broadcast_to(scale.to(tl.float32)[:, None], sums.shape), acc)
            scale = next_scale
        words_ptrs += 16 * weight_rows
        x_ptrs += 128

    y = tl.trans(acc)
    mask = (rows < num_rows)[:, None] & (cols < out_features)[None, :]
    if ACTIVATION is not None:
        # Both halves get their bias here, and are rounded as if they had been stored.
        if bias_ptr is not None:
            y += tl.load(bias_ptr + outs).to(tl.float32)[None, :]
        y = y.to(dtype).to(tl.float32)
        gate, up = tl.split(tl.permute(tl.reshape(y, (BLOCK_ROWS, 2, TILE_OUT)), (0, 2, 1)))
        y = activate(gate, ACTIVATION) * up
        finish(y, rows, cols, mask, None, None, out_ptr, out_features, dtype)
    else:
        finish(y, rows, cols, mask, bias_ptr, residual_ptr, out_ptr, out_features, dtype)


def int4_linear(
    x: Tensor,
    packed: PlanarInt4,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times the dequantized weight's transpose; then bias, and at most one of residual add and gated activation.

    Args:
        x: [num_tokens, in_features] in scales' dtype; rows may be strided, columns may not.
        packed: of `pack_int4`; with `activation` gate's outputs, then up's.
        residual: [num_tokens, out_features], contiguous, added to the rounded projection.
        activation: a name of silu_mul.ACTIVATIONS: the result is activation(gate) * up, half as wide.
        out_dtype: x's or float32.

    Returns:
        [num_tokens, out_features], or half of that with `activation`.

    Raises:
        KernelArgumentError: dtypes, devices, shapes or strides that are not as above.
    """
    _check(x, packed, residual, activation, out_dtype)
    num_rows, in_features = x.shape
    out_features = packed.out_features if activation is None else packed.out_features // 2
    out = torch.empty((num_rows, out_features), dtype=out_dtype or x.dtype, device=x.device)
    if not out.numel():
        return out
    table = configs.table_of(x.device)
    tile = configs.int4_tile(table, x.dtype, packed.group_size, num_rows)
    tile_out = tile.block_out if activation is None else tile.block_out // 2
    _int4_linear_kernel[(triton.cdiv(out_features, tile_out) * triton.cdiv(num_rows, tile.block_rows),)](
        x,
        packed.words,
        packed.scales,
        packed.zeros,
        packed.bias,
        residual,
        out,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        ACTIVATIONS[activation] if activation is not None else None,
        packed.group_size,
        in_features % _BLOCK == 0,
        _GROUP,
        tile.block_out,
        tile.block_rows,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(table),
    )
    return out


def _check(
    x: Tensor, packed: PlanarInt4, residual: Tensor | None, activation: str | None, out_dtype: torch.dtype | None
) -> None:
    op = "int4_linear"
    check_tensors(op, x=x, scales=packed.scales, bias=packed.bias, residual=residual)
    if x.ndim != 2 or x.shape[1] != packed.in_features or x.stride(1) != 1:
        refuse(
            op,
            f"x must be [num_tokens, {packed.in_features}] with contiguous columns; "
            f"got {tuple(x.shape)}, stride {x.stride()}",
        )
    out_features = packed.out_features
    if residual is not None and (residual.shape != (x.shape[0], out_features) or not residual.is_contiguous()):
        refuse(op, f"residual must be {(x.shape[0], out_features)} and contiguous; got {tuple(residual.shape)}")
    if out_dtype not in (None, x.dtype, torch.float32):
        refuse(op, f"out_dtype={out_dtype}; use {x.dtype} or torch.float32")
    if activation is not None:
        if activation not in ACTIVATIONS:
            refuse(op, f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        if out_features % 2 or residual is not None:
            refuse(op, f"activation needs gate and up of equal height and no residual; weight has {out_features} rows")


def _check_part(part: Int4Weight, first: Int4Weight) -> None:
    op = "pack_int4"
    values, scales, zeros, bias = part.values, part.scales, part.zeros, part.bias
    check_tensors(op, scales=scales, bias=bias, first_scales=first.scales)
    check_devices(op, scales=scales, values=values, zeros=zeros)
    if values.ndim != 2 or scales.ndim != 2 or values.shape[0] != scales.shape[0] or not scales.shape[1]:
        refuse(
            op,
            "values must be [out_features, in_features] and scales [out_features, groups]; "
            f"got {tuple(values.shape)} and {tuple(scales.shape)}",
        )
    in_features, groups = values.shape[1], scales.shape[1]
    if in_features % groups or in_features // groups not in GROUP_SIZES:
        refuse(op, f"in_features={in_features} in {groups} groups; groups of 32, 64 or 128 are supported")
    if (in_features, groups) != (first.values.shape[1], first.scales.shape[1]):
        refuse(
            op,
            f"parts have {first.values.shape[1]} input features in {first.scales.shape[1]} groups and {in_features} "
            f"in {groups}; they must agree",
        )
    if values.dtype != torch.uint8 or bool((values > 15).any()):
        refuse(op, f"values must be uint8 from 0 to 15; got {values.dtype}")
    if zeros is not None:
        if zeros.dtype != torch.uint8 or zeros.shape != scales.shape:
            refuse(op, f"zeros must be uint8 {tuple(scales.shape)}; got {zeros.dtype} {tuple(zeros.shape)}")
        if bool((zeros > _MAX_ZERO).any()):
            refuse(op, f"zeros must be from 0 to {_MAX_ZERO}; got {int(zeros.max())}")
    if bias is not None and bias.shape != scales.shape[:1]:
        refuse(op, f"bias must be [{scales.shape[0]}]; got {tuple(bias.shape)}")

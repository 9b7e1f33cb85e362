"""rope_and_cache: rotate q and k by the batch's cos/sin, write k and v into their pages.

Fused    rotation of q and of k, lookup of each token's page, both cache writes.
Traffic  num_tokens * (2 * num_heads + 4 * num_kv_heads) * head_dim * itemsize bytes (and cos, sin): memory-bound.
Shapes   q [num_tokens, num_heads, head_dim], k and v [num_tokens, num_kv_heads, head_dim], cos and sin
         [num_tokens, rotary_dim], pages [num_pages, num_kv_heads, page_size, head_dim] -> rotated q, contiguous
Dtypes   fp16, bf16 or fp32 for q, k, v and pages (one of them); cos and sin fp32; fp32 arithmetic, rounded once.
Source   RoFormer, arXiv:2104.09864, in the half-split layout of Hugging Face's Llama: pairs are (i, i + rotary_dim/2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from llama_fast.kernels import configs
from llama_fast.kernels.arguments import check_devices, check_integers, check_tensors, refuse
from llama_fast.kernels.batch_checks import check_indices
from llama_fast.kernels.overlap import begin, options

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

# Elements of a few heads of one token, a program's share. Two warps: 16 elements a thread, so that each half of a pair
# is one 128-bit load in 16-bit dtypes.
_ELEMENTS = 1024
_WARPS = 2


@triton.jit
def _rotated(source, mask, dims, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Both halves of the heads that begin at `source`, rotated: fp32 [BLOCK_H, BLOCK_HALF] each."""
    first = tl.load(source + dims, mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + dims, mask, other=0.0).to(tl.float32)
    # Every head loads the token's rotation again, from cache: one row, spread over the heads, would take shared memory.
    dims = tl.broadcast_to(dims, first.shape)
    first_cos = tl.load(cos_ptr + dims, mask, other=0.0)
    first_sin = tl.load(sin_ptr + dims, mask, other=0.0)
    second_cos = tl.load(cos_ptr + HALF + dims, mask, other=0.0)
    second_sin = tl.load(sin_ptr + HALF + dims, mask, other=0.0)
    return first * first_cos - second * first_sin, second * second_cos + first * second_sin


# A page table's width differs from batch to batch, which should compile nothing.
@triton.jit(do_not_specialize=["page_table_stride"])
def _rope_and_cache_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    seq_ids_ptr,
    page_table_ptr,
    q_stride,
    k_stride,
    v_stride,
    page_table_stride,
    page_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    # Tokens are on axis 0, the only one that may exceed 65,535; on axis 1 blocks of heads, q's, then k's (and v's).
    # int64: a pool of 2^31 elements is 4 GiB in bf16.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    HALF: tl.constexpr = ROTARY_DIM // 2
    cos_ptr += token * ROTARY_DIM
    sin_ptr += token * ROTARY_DIM
    lanes = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if block < Q_BLOCKS:
        heads = block * BLOCK_H + lanes
        in_heads = heads < NUM_HEADS
        mask = in_heads & (dims < HALF)
        source = q_ptr + token * q_stride + heads * HEAD_DIM
        first, second = _rotated(source, mask, dims, cos_ptr, sin_ptr, HALF)
        target = out_ptr + token * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM
        tl.store(target + dims, first.to(dtype), mask)
        tl.store(target + HALF + dims, second.to(dtype), mask)
        if ROTARY_DIM < HEAD_DIM:
            mask = in_heads & (rest < HEAD_DIM)
            tl.store(target + rest, tl.load(source + rest, mask), mask)
    else:
        # All loads before the first store, or they would wait for the lookup of the page.
        slot = tl.load(slots_ptr + token)
        seq = tl.load(seq_ids_ptr + token)
        heads = (block - Q_BLOCKS) * BLOCK_H + lanes
        in_heads = heads < NUM_KV_HEADS
        v_dims = tl.arange(0, BLOCK_D)[None, :]
        v_mask = in_heads & (v_dims < HEAD_DIM)
        v = tl.load(v_ptr + token * v_stride + heads * HEAD_DIM + v_dims, v_mask, other=0.0)
        finite = tl.min((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32), axis=1, keep_dims=True) != 0
        mask = in_heads & (dims < HALF)
        source = k_ptr + token * k_stride + heads * HEAD_DIM
        first, second = _rotated(source, mask, dims, cos_ptr, sin_ptr, HALF)
        page = tl.load(page_table_ptr + seq * page_table_stride + slot // PAGE)
        target = page * page_stride + (slot % PAGE) * HEAD_DIM + heads.to(tl.int64) * head_stride
        tl.store(v_pages_ptr + target + v_dims, tl.where(finite, v, 0.0), v_mask)
        target += k_pages_ptr
        tl.store(target + dims, tl.where(finite, first, float("nan")).to(dtype), mask)
        tl.store(target + HALF + dims, tl.where(finite, second, float("nan")).to(dtype), mask)
        if ROTARY_DIM < HEAD_DIM:
            mask = in_heads & (rest < HEAD_DIM)
            k_rest = tl.load(source + rest, mask, other=0.0).to(tl.float32)
            tl.store(target + rest, tl.where(finite, k_rest, float("nan")).to(dtype), mask)


def rope_and_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, pages: LayerPages) -> torch.Tensor:
    """Rotate q and k in fp32; write k and v into their pages.

    A head of v that is not finite is written as zeros, and NaN as its k (see the twin in ops/reference.py).

    Args:
        q: [num_tokens, num_heads, head_dim]; tokens may be strided, heads and dims may not.
        k, v: [num_tokens, num_kv_heads, head_dim], likewise.
        batch: gives cos, sin, slots, seq_ids and page_table; slots must lie within its pages (the allocator's duty).
        pages: this layer's cache, written in place.

    Returns:
        The rotated q, contiguous, in q's dtype.

    Raises:
        KernelArgumentError: dtypes, devices, shapes or strides that are not as above.
    """
    _check(q, k, v, batch, pages)
    check_indices("rope_and_cache", batch, pages)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() or k.numel():
        rotary_dim = batch.cos.shape[1]
        block_d = triton.next_power_of_2(head_dim)
        block_h = max(1, min(_ELEMENTS // block_d, triton.next_power_of_2(max(num_heads, num_kv_heads))))
        grid = (num_tokens, triton.cdiv(num_heads, block_h) + triton.cdiv(num_kv_heads, block_h))
        _rope_and_cache_kernel[grid](
            q,
            k,
            v,
            out,
            pages.k,
            pages.v,
            batch.cos,
            batch.sin,
            batch.slots,
            batch.seq_ids,
            batch.page_table,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            batch.page_table.stride(0),
            pages.k.stride(0),
            pages.k.stride(1),
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_dim,
            pages.page_size,
            block_h,
            block_d,
            triton.next_power_of_2(rotary_dim // 2),
            triton.next_power_of_2(max(1, head_dim - rotary_dim)),
            num_warps=_WARPS,
            **options(configs.table_of(q.device)),
        )
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, pages: LayerPages) -> None:
    op = "rope_and_cache"
    check_tensors(op, q=q, k=k, v=v, **{"pages.k": pages.k, "pages.v": pages.v})
    indices = {"slots": batch.slots, "seq_ids": batch.seq_ids, "page_table": batch.page_table}
    check_devices(op, q=q, cos=batch.cos, sin=batch.sin, **indices)
    check_integers(op, **indices)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        refuse(op, f"q, k and v must be [num_tokens, heads, head_dim], k and v alike; got {shapes}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() and (x.stride(2) != 1 or x.stride(1) != x.shape[2]):
            refuse(op, f"{name}'s heads and dims must be contiguous; got stride {x.stride()}")
    if batch.cos.dtype != torch.float32 or batch.sin.dtype != torch.float32:
        refuse(op, f"cos and sin must be float32; got {batch.cos.dtype} and {batch.sin.dtype}")
    num_tokens, _, head_dim = q.shape
    if batch.cos.ndim != 2 or batch.cos.shape[0] != num_tokens or batch.sin.shape != batch.cos.shape:
        shapes = f"{tuple(batch.cos.shape)} and {tuple(batch.sin.shape)}"
        refuse(op, f"cos and sin must be [{num_tokens}, rotary_dim]; got {shapes}")
    rotary_dim = batch.cos.shape[1]
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        refuse(op, f"rotary_dim={rotary_dim}, the width of cos, must be even, from 2 to head_dim={head_dim}")
    if not batch.cos.is_contiguous() or not batch.sin.is_contiguous():
        refuse(op, f"cos and sin must be contiguous; got stride {batch.cos.stride()} and {batch.sin.stride()}")
    if batch.slots.shape != (num_tokens,) or batch.seq_ids.shape != (num_tokens,) or batch.page_table.ndim != 2:
        refuse(op, f"slots and seq_ids must be [{num_tokens}] and page_table 2-D")
    if batch.page_table.stride(1) != 1 or not batch.slots.is_contiguous() or not batch.seq_ids.is_contiguous():
        refuse(op, "slots, seq_ids and the page table's rows must be contiguous")
    for name, x in (("k", pages.k), ("v", pages.v)):
        if x.ndim != 4 or (x.shape[1], x.shape[3]) != tuple(k.shape[1:]) or x.shape != pages.k.shape:
            refuse(op, f"pages.{name} must be [num_pages, {k.shape[1]}, page_size, {k.shape[2]}]; got {tuple(x.shape)}")
        if x.stride(3) != 1 or x.stride(2) != x.shape[3] or x.stride() != pages.k.stride():
            refuse(op, f"pages.{name}: slots and dims must be contiguous; got stride {x.stride()}")

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

from llama_fast.kernels.arguments import check_devices, check_integers, check_tensors, refuse

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

# Elements that one program rotates: a few heads of one token.
_ELEMENTS = 1024


@triton.jit
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
):
    # Blocks of heads: first those of q, then those of k (and v). Tokens are on axis 0, which may exceed 65,535.
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    dims = tl.arange(0, BLOCK_D)
    half: tl.constexpr = ROTARY_DIM // 2
    # The other element of a pair; dims beyond rotary_dim are their own and turn by nothing.
    partner = tl.where(dims < half, dims + half, dims - half)
    rotated = dims < ROTARY_DIM
    cos = tl.load(cos_ptr + token * ROTARY_DIM + dims, rotated, other=1.0)[None, :]
    sin = tl.load(sin_ptr + token * ROTARY_DIM + dims, rotated, other=0.0)[None, :]
    sin = tl.where(dims[None, :] < half, -sin, sin)
    pair = tl.where(rotated, partner, dims)[None, :]

    is_query = block < q_blocks
    heads = tl.where(is_query, block, block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    mask = (heads < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)) & (dims[None, :] < HEAD_DIM)
    if is_query:  # noqa: SIM108 - Triton has no conditional expression on a loaded value
        source = q_ptr + token * q_stride + heads * HEAD_DIM
    else:
        source = k_ptr + token * k_stride + heads * HEAD_DIM
    x = tl.load(source + dims[None, :], mask, other=0.0).to(tl.float32)
    other = tl.load(source + pair, mask, other=0.0).to(tl.float32)
    # Unrotated dims are copied, not multiplied by one and added to zero times themselves: infinity stays infinity.
    out = tl.where(rotated[None, :], x * cos + other * sin, x).to(out_ptr.dtype.element_ty)
    if is_query:
        tl.store(out_ptr + (token * NUM_HEADS + heads) * HEAD_DIM + dims[None, :], out, mask)
    else:
        slot = tl.load(slots_ptr + token)
        seq = tl.load(seq_ids_ptr + token)
        page = tl.load(page_table_ptr + seq * page_table_stride + slot // PAGE)
        # int64: a pool of 2^31 elements is 4 GiB in bf16.
        target = page * page_stride + heads * head_stride + (slot % PAGE) * HEAD_DIM + dims[None, :]
        tl.store(k_pages_ptr + target, out, mask)
        v = tl.load(v_ptr + token * v_stride + heads * HEAD_DIM + dims[None, :], mask, other=0.0)
        tl.store(v_pages_ptr + target, v, mask)


def rope_and_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, pages: LayerPages) -> torch.Tensor:
    """Rotate q and k in fp32; write k and v into their pages.

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
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        block_d = triton.next_power_of_2(head_dim)
        block_h = max(1, min(_ELEMENTS // block_d, triton.next_power_of_2(num_heads)))
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
            batch.cos.shape[1],
            pages.page_size,
            block_h,
            block_d,
        )
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, pages: LayerPages) -> None:
    op = "rope_and_cache"
    check_tensors(op, q=q, k=k, v=v, **{"pages.k": pages.k, "pages.v": pages.v})
    indices = {"slots": batch.slots, "seq_ids": batch.seq_ids, "page_table": batch.page_table}
    check_devices(op, q=q, cos=batch.cos, sin=batch.sin, **indices)
    check_integers(op, **indices)
    num_tokens, rotary_dim = q.shape[0], batch.cos.shape[-1]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[0] != num_tokens or x.shape[2] != q.shape[2] or k.shape != v.shape:
            shapes = f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
            refuse(op, f"q, k and v must be [num_tokens, heads, head_dim], k and v alike; got {shapes}")
        if x.shape[0] and (x.stride(2) != 1 or x.stride(1) != x.shape[2]):
            refuse(op, f"{name}'s heads and dims must be contiguous; got stride {x.stride()}")
    if batch.cos.dtype != torch.float32 or batch.sin.dtype != torch.float32:
        refuse(op, f"cos and sin must be float32; got {batch.cos.dtype} and {batch.sin.dtype}")
    if batch.cos.shape != (num_tokens, rotary_dim) or batch.sin.shape != batch.cos.shape or rotary_dim % 2:
        refuse(op, f"cos and sin must be [{num_tokens}, rotary_dim]; got {tuple(batch.cos.shape)}")
    if rotary_dim > q.shape[2] or not batch.cos.is_contiguous() or not batch.sin.is_contiguous():
        refuse(op, f"cos and sin must be contiguous, with at most head_dim={q.shape[2]} columns; got {rotary_dim}")
    if batch.slots.shape != (num_tokens,) or batch.seq_ids.shape != (num_tokens,) or batch.page_table.ndim != 2:
        refuse(op, f"slots and seq_ids must be [{num_tokens}] and page_table 2-D")
    if batch.page_table.stride(1) != 1 or not batch.slots.is_contiguous() or not batch.seq_ids.is_contiguous():
        refuse(op, "slots, seq_ids and the page table's rows must be contiguous")
    for name, x in (("k", pages.k), ("v", pages.v)):
        if x.ndim != 4 or (x.shape[1], x.shape[3]) != tuple(k.shape[1:]) or x.shape != pages.k.shape:
            refuse(op, f"pages.{name} must be [num_pages, {k.shape[1]}, page_size, {k.shape[2]}]; got {tuple(x.shape)}")
        if x.stride(3) != 1 or x.stride(2) != x.shape[3] or x.stride() != pages.k.stride():
            refuse(op, f"pages.{name}: slots and dims must be contiguous; got stride {x.stride()}")

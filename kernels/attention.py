"""attention: causal grouped-query attention over the paged cache, flash style; prompt and generated tokens.

Fused    scores, mask, softmax, weighted sum; the heads of a group share each key and value that is read.
Traffic  generated: K and V of every visible slot once, 2 * slots * num_kv_heads * head_dim * itemsize: memory-bound.
         prompt: 4 * pairs * num_heads * head_dim FLOPs, pairs the visible (query, key): compute-bound.
Shapes   q [num_tokens, num_heads, head_dim], pages [num_pages, num_kv_heads, page_size, head_dim]
         -> [num_tokens, num_heads * head_dim]
Dtypes   fp16, bf16 or fp32 (q and pages alike); fp32 scores and sums, weights rounded to the dtype before they meet V.
Source   FlashAttention-2, arXiv:2307.08691; split merge as in Flash-Decoding.

Order    A tile of keys is a page. Within a split of `split_size` slots an online softmax starts fresh and takes tiles
         in ascending order; splits' (max, sum, accumulator) are merged in ascending order by `_merge`. Prompt programs
         merge in registers, generated tokens have a program a split and a second launch that merges. A tile or split
         that a row does not see changes no bit of it, so a row's result follows from its slot alone. All sums are MMAs,
         the weights' own too (against a column of ones): no sum follows how threads share a tile.
Work     No launch depends on lengths: each program finds its sequence from the lengths on the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels import configs
from llama_fast.kernels.arguments import check_devices, check_integers, check_tensors, refuse
from llama_fast.kernels.batch_checks import check_indices
from llama_fast.kernels.overlap import begin, options

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

MAX_HEAD_DIM = 256
# Finite, so that a row that has seen nothing yet gives exp2(0), not NaN, before its mask makes it zero.
_MASKED = tl.constexpr(-1e30)
# The sum of a row's weights is kept in as many equal columns as a narrow MMA has.
_SUM_COLUMNS = tl.constexpr(16)
_LOG2E = 1.4426950408889634  # the hardware has exp2, not exp


@triton.jit
def _find(unit, counts, INDEX: tl.constexpr):
    """Which sequence a unit of work belongs to, and the units before it; `counts` is the units of each sequence."""
    seq = tl.sum((tl.cumsum(counts, 0) <= unit).to(tl.int32), 0)
    return seq.to(tl.int64), tl.sum(tl.where(tl.arange(0, INDEX) < seq, counts, 0), 0)


@triton.jit
def _update(q, k, v, row_max, row_sum, acc, scale, visible, masked):
    """One tile of keys and values [page, dim] in the online softmax of a split; `visible` counts if `masked`."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if masked:
        scores = tl.where(visible, scores, _MASKED)
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # Explicit fma everywhere: the compiler may fuse one copy of an expression and not another, and bits would differ.
    weights = tl.exp2(tl.fma(scores, scale, -(new_max * scale)[:, None]))
    if masked:
        weights = tl.where(visible, weights, 0.0)
    keep = tl.exp2((row_max - new_max) * scale)
    weights = weights.to(v.dtype)
    ones = tl.full((v.shape[0], _SUM_COLUMNS), 1.0, v.dtype)
    row_sum = tl.dot(weights, ones, row_sum * keep[:, None], input_precision="ieee")
    acc = tl.dot(weights, v, acc * keep[:, None], input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def _merge(row_max, row_sum, acc, split_max, split_sum, split_acc, scale):
    """Adds one split to those before it: row_max and row_sum [rows], acc [rows, dim]."""
    new_max = tl.maximum(row_max, split_max)
    keep = tl.exp2((row_max - new_max) * scale)
    add = tl.exp2((split_max - new_max) * scale)
    row_sum = tl.fma(row_sum, keep, split_sum * add)
    acc = tl.fma(acc, tl.expand_dims(keep, -1), split_acc * tl.expand_dims(add, -1))
    return new_max, row_sum, acc


@triton.jit
def _normalised(row_sum, acc):
    """acc / sum; NaN for a whole row that saw a value that is not finite, as the reference gives."""
    broken = tl.max((tl.abs(acc) < float("inf")).to(tl.int32) ^ 1, -1, keep_dims=True) != 0
    return tl.where(broken, float("nan"), acc / tl.expand_dims(row_sum, -1))


# A page table's width differs from batch to batch, which should compile nothing.
@triton.jit(do_not_specialize=["num_seqs", "page_table_stride"])
def _prompt_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    slots_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    page_table_ptr,
    num_seqs,
    page_table_stride,
    page_stride,
    head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    index = tl.arange(0, INDEX)
    starts = tl.load(query_starts_ptr + index, index < num_seqs, other=0).to(tl.int32)
    ends = tl.load(query_starts_ptr + 1 + index, index < num_seqs, other=0).to(tl.int32)
    tiles = tl.cdiv((ends - starts) * GROUP, BLOCK_M)
    # Last tiles first: they see the most keys, and the short ones fill the gaps at the end.
    unit = tl.sum(tiles, 0) - 1 - tl.program_id(0)
    if unit < 0:
        return
    seq, before = _find(unit, tiles, INDEX)
    kv_head = tl.program_id(1)
    # int64: heads may lie a whole pool apart.
    head_start = kv_head.to(tl.int64) * head_stride

    # A row is one head of one token; the heads of a group are neighbours.
    query_start = tl.load(query_starts_ptr + seq)
    rows = (unit - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_sequence = rows < (tl.load(query_starts_ptr + seq + 1) - query_start) * GROUP
    tokens = query_start + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    slots = tl.load(slots_ptr + tokens, in_sequence, other=-1).to(tl.int32)
    last_slot = tl.max(slots, 0)
    # Slots below are seen by every row.
    whole = tl.min(tl.where(in_sequence, slots, last_slot), 0) + 1
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)

    dims = tl.arange(0, BLOCK_D)
    has_dim = dims < HEAD_DIM
    offsets = (tokens * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + offsets, in_sequence[:, None] & has_dim[None, :], other=0.0)

    in_page = tl.arange(0, PAGE)
    in_page_offsets = in_page[:, None] * HEAD_DIM + dims[None, :]
    table_ptr = page_table_ptr + seq * page_table_stride

    row_max = tl.full((BLOCK_M,), _MASKED, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, last_slot + 1, SPLIT):
        split_max = tl.full((BLOCK_M,), _MASKED, tl.float32)
        split_sum = tl.zeros((BLOCK_M, _SUM_COLUMNS), tl.float32)
        split_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        end = tl.minimum(start + SPLIT, last_slot + 1)
        for slot in range(start, end, PAGE):
            page = in_page_offsets + (head_start + tl.load(table_ptr + slot // PAGE) * page_stride)
            mask = (slot + in_page < seq_len)[:, None] & has_dim[None, :]
            k = tl.load(k_ptr + page, mask, other=0.0)
            v = tl.load(v_ptr + page, mask, other=0.0)
            visible = slot + in_page[None, :] <= slots[:, None]
            split_max, split_sum, split_acc = _update(
                q, k, v, split_max, split_sum, split_acc, scale, visible, slot + PAGE > whole
            )
        row_max, row_sum, acc = _merge(row_max, row_sum, acc, split_max, tl.max(split_sum, 1), split_acc, scale)

    out = _normalised(row_sum, acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, in_sequence[:, None] & has_dim[None, :])


@triton.jit(do_not_specialize=["num_seqs", "page_table_stride"])
def _generated_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    partial_ptr,
    stats_ptr,
    slots_ptr,
    page_table_ptr,
    num_seqs,
    page_table_stride,
    page_stride,
    head_stride,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    # The work list: splits of all sequences in order, dealt out to however many programs there are.
    index = tl.arange(0, INDEX)
    slots = tl.load(slots_ptr + index, index < num_seqs, other=-1).to(tl.int32)
    splits = tl.where(index < num_seqs, slots // SPLIT + 1, 0)
    row_blocks: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(1) // row_blocks
    rows = (tl.program_id(1) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    heads = (kv_head * GROUP + rows).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    has_dim = dims < HEAD_DIM
    mask = (rows < GROUP)[:, None] & has_dim[None, :]
    in_page = tl.arange(0, PAGE)
    in_page_offsets = in_page[:, None] * HEAD_DIM + dims[None, :]
    # int64: heads may lie a whole pool apart.
    head_start = kv_head.to(tl.int64) * head_stride

    for unit in range(tl.program_id(0), tl.sum(splits, 0), tl.num_programs(0)):
        seq, before = _find(unit, splits, INDEX)
        last_slot = tl.load(slots_ptr + seq).to(tl.int32)
        q = tl.load(q_ptr + (seq * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
        table_ptr = page_table_ptr + seq * page_table_stride
        row_max = tl.full((BLOCK_M,), _MASKED, tl.float32)
        row_sum = tl.zeros((BLOCK_M, _SUM_COLUMNS), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        start = (unit - before) * SPLIT
        end = tl.minimum(start + SPLIT, last_slot + 1)
        for slot in range(start, end, PAGE):
            page = in_page_offsets + (head_start + tl.load(table_ptr + slot // PAGE) * page_stride)
            written = slot + in_page <= last_slot
            k = tl.load(k_ptr + page, written[:, None] & has_dim[None, :], other=0.0)
            v = tl.load(v_ptr + page, written[:, None] & has_dim[None, :], other=0.0)
            row_max, row_sum, acc = _update(q, k, v, row_max, row_sum, acc, scale, written[None, :], slot + PAGE > end)
        place = unit * NUM_HEADS + heads
        tl.store(partial_ptr + place[:, None] * HEAD_DIM + dims[None, :], acc, mask)
        tl.store(stats_ptr + 2 * place, row_max, rows < GROUP)
        tl.store(stats_ptr + 2 * place + 1, tl.max(row_sum, 1), rows < GROUP)


@triton.jit
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    slots_ptr,
    scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Merges the splits of one head of one sequence in ascending order."""
    begin(OVERLAP)
    seq, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, INDEX)
    splits = tl.load(slots_ptr + index, index < seq, other=-1).to(tl.int32) // SPLIT + 1
    first = tl.sum(tl.where(index < seq, splits, 0), 0)
    dims = tl.arange(0, BLOCK_D)
    has_dim = dims < HEAD_DIM
    row_max = tl.full((1,), _MASKED, tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    one = tl.arange(0, 1)
    for unit in range(first, first + tl.load(slots_ptr + seq).to(tl.int32) // SPLIT + 1):
        place = unit * NUM_HEADS + head
        split_max = tl.load(stats_ptr + 2 * place + one)
        split_sum = tl.load(stats_ptr + 2 * place + 1 + one)
        split_acc = tl.load(partial_ptr + place * HEAD_DIM + dims[None, :], has_dim[None, :], other=0.0)
        row_max, row_sum, acc = _merge(row_max, row_sum, acc, split_max, split_sum, split_acc, scale)
    out = _normalised(row_sum, acc).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (seq * NUM_HEADS + head) * HEAD_DIM + dims[None, :], out, has_dim[None, :])


def page_size_problem(page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a page cannot be a tile of keys on a device; None if it can."""
    least, most = configs.MIN_PAGE, configs.largest_page(configs.table_of(device), dtype, head_dim)
    if least <= page_size <= most and page_size & (page_size - 1) == 0:
        return None
    return f"page_size={page_size} must be a power of two from {least} to {most} for head_dim={head_dim} in {dtype}"


def attention(q: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """Causal grouped-query attention: a token at slot s sees slots 0 to s of its sequence.

    Args:
        q: [num_tokens, num_heads, head_dim], rotated, contiguous; head_dim up to 256.
        pages: this layer's cache; page_size a power of two, at least 16 on a GPU. Slots that were not written are never
            read as numbers.
        batch: gives slots, query_starts, seq_lens, page_table, split_size and the role of its tokens; where they are
            generated ones, one a sequence.

    Returns:
        [num_tokens, num_heads * head_dim] in q's dtype.

    Raises:
        KernelArgumentError: dtypes, devices, shapes or strides that are not as above.
    """
    _check(q, pages, batch)
    check_indices("attention", batch, pages)
    num_tokens, num_heads, head_dim = q.shape
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=q.dtype, device=q.device)
    if out.numel():
        (_generated if batch.generated else _prompt)(q, out, pages, batch)
    return out


def _block_d(head_dim: int) -> int:
    """The MMA takes no fewer than 16."""
    return max(16, triton.next_power_of_2(head_dim))


def _prompt(q: Tensor, out: Tensor, pages: LayerPages, batch: Batch) -> None:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, num_seqs = pages.k.shape[1], batch.seq_lens.shape[0]
    group = num_heads // num_kv_heads
    table = configs.table_of(q.device)
    tile = configs.prompt_attention_tile(table, q.dtype, head_dim)
    # At most one tile of a sequence is not full.
    most_tiles = num_tokens * group // tile.block_m + num_seqs
    _prompt_kernel[(most_tiles, num_kv_heads)](
        q,
        pages.k,
        pages.v,
        out,
        batch.slots,
        batch.query_starts,
        batch.seq_lens,
        batch.page_table,
        num_seqs,
        batch.page_table.stride(0),
        pages.k.stride(0),
        pages.k.stride(1),
        head_dim**-0.5 * _LOG2E,
        num_heads,
        group,
        head_dim,
        pages.page_size,
        batch.split_size,
        triton.next_power_of_2(num_seqs),
        tile.block_m,
        _block_d(head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(table),
    )


def _generated(q: Tensor, out: Tensor, pages: LayerPages, batch: Batch) -> None:
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = pages.k.shape[1]
    group = num_heads // num_kv_heads
    table = configs.table_of(q.device)
    tile = configs.generated_attention_tile(table, q.dtype, head_dim)
    most_splits = num_seqs * triton.cdiv(batch.page_table.shape[1] * pages.page_size, batch.split_size)
    scale, index = head_dim**-0.5 * _LOG2E, triton.next_power_of_2(num_seqs)
    partial = torch.empty((most_splits, num_heads, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((most_splits, num_heads, 2), dtype=torch.float32, device=q.device)
    blocks = num_kv_heads * triton.cdiv(group, tile.block_m)
    programs = min(most_splits, triton.cdiv(configs.GENERATED_ATTENTION_PROGRAMS, blocks))
    _generated_kernel[(programs, blocks)](
        q,
        pages.k,
        pages.v,
        partial,
        stats,
        batch.slots,
        batch.page_table,
        num_seqs,
        batch.page_table.stride(0),
        pages.k.stride(0),
        pages.k.stride(1),
        scale,
        num_heads,
        group,
        head_dim,
        pages.page_size,
        batch.split_size,
        index,
        tile.block_m,
        _block_d(head_dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(table),
    )
    _merge_kernel[(num_seqs, num_heads)](
        partial,
        stats,
        out,
        batch.slots,
        scale,
        num_heads,
        head_dim,
        batch.split_size,
        index,
        _block_d(head_dim),
        num_warps=1,
        **options(table),
    )


def _check(q: Tensor, pages: LayerPages, batch: Batch) -> None:
    op = "attention"
    check_tensors(op, q=q, **{"pages.k": pages.k, "pages.v": pages.v})
    indices = {
        "slots": batch.slots,
        "query_starts": batch.query_starts,
        "seq_lens": batch.seq_lens,
        "page_table": batch.page_table,
    }
    check_devices(op, q=q, **indices)
    check_integers(op, **indices)
    if q.ndim != 3 or not q.is_contiguous() or not 0 < q.shape[2] <= MAX_HEAD_DIM:
        refuse(
            op,
            f"q must be [num_tokens, num_heads, head_dim] and contiguous, head_dim at most {MAX_HEAD_DIM}; "
            f"got shape {tuple(q.shape)}, stride {q.stride()}",
        )
    num_tokens, num_heads, head_dim = q.shape
    for name, x in (("k", pages.k), ("v", pages.v)):
        shaped = x.ndim == 4 and x.shape[3] == head_dim and x.shape == pages.k.shape
        if not shaped or (num_heads % x.shape[1] if x.shape[1] else num_heads):
            refuse(
                op,
                f"pages.{name} must be [num_pages, num_kv_heads, page_size, {head_dim}] with num_kv_heads dividing "
                f"{num_heads} heads; got {tuple(x.shape)}",
            )
        if x.stride(3) != 1 or x.stride(2) != head_dim or x.stride() != pages.k.stride():
            refuse(op, f"pages.{name}: slots and dims must be contiguous; got stride {x.stride()}")
    problem = page_size_problem(pages.page_size, head_dim, q.dtype, q.device)
    if problem is not None:
        refuse(op, problem)
    if batch.split_size < 1 or batch.split_size % pages.page_size:
        refuse(op, f"page_size={pages.page_size} must divide split_size={batch.split_size}")
    num_seqs = batch.seq_lens.numel()
    if batch.seq_lens.ndim != 1 or (num_tokens and not num_seqs):
        refuse(op, f"seq_lens must be [num_seqs], num_seqs > 0 where tokens are; got {tuple(batch.seq_lens.shape)}")
    if batch.slots.shape != (num_tokens,) or batch.query_starts.shape != (num_seqs + 1,):
        refuse(
            op,
            f"slots must be [{num_tokens}] and query_starts [{num_seqs + 1}]; got {tuple(batch.slots.shape)} and "
            f"{tuple(batch.query_starts.shape)}",
        )
    if batch.page_table.ndim != 2 or batch.page_table.shape[0] != num_seqs or batch.page_table.stride(1) != 1:
        refuse(op, f"page_table must be [{num_seqs}, max_pages] with contiguous rows; got {batch.page_table.shape}")
    if not (batch.slots.is_contiguous() and batch.query_starts.is_contiguous() and batch.seq_lens.is_contiguous()):
        refuse(op, "slots, query_starts and seq_lens must be contiguous")
    if batch.generated and num_tokens != num_seqs:
        refuse(op, f"generated tokens come one a sequence; got {num_tokens} tokens of {num_seqs} sequences")

"""Attention over the paged cache in plain PyTorch: split by split, or dense under autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.ops.rows import MATMUL_MULTIPLE, ROW_BLOCK, elementwise, needs_grad, pad_last, widen

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

# Finite, so that a fully masked split gives exp(0), not NaN, before its mask makes it zero.
_MASKED = -1e30


def attention(q: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """Causal grouped-query attention over the paged cache: token at slot s sees slots 0..s of its sequence.

    Each split of `batch.split_size` slots gets a softmax of its own (max, sum, accumulator, in fp32); splits are merged
    in ascending order. A row's order of summation depends on its slot alone. Slots past a sequence's length are never
    read as numbers, so stale cache contents are harmless. The others hold finite V (see rope_and_cache).

    Args:
        q: [num_tokens, num_heads, head_dim], rotated.

    Returns:
        [num_tokens, num_heads * head_dim] in q's dtype.

    Source: FlashAttention, arXiv:2205.14135; split merge as in Flash-Decoding.
    """
    if needs_grad(q, pages.k, pages.v):
        return _attention_dense(q, pages, batch)
    out = torch.empty_like(q)
    starts, lengths = batch.query_starts.tolist(), batch.seq_lens.tolist()
    for sequence, length in enumerate(lengths):
        splits = _gather_splits(pages, batch.page_table[sequence], length, batch.split_size)
        for start in range(starts[sequence], starts[sequence + 1], ROW_BLOCK):
            rows = slice(start, min(start + ROW_BLOCK, starts[sequence + 1]))
            out[rows] = _attend_rows(q[rows], batch.slots[rows], splits)
    return out.flatten(1)


class _Split(NamedTuple):
    """One split of a sequence, zeros past its length: [num_kv_heads, split_size, padded head_dim], widened."""

    keys: Tensor
    values: Tensor


def _gather_splits(pages: LayerPages, page_table: Tensor, length: int, split_size: int) -> list[_Split]:
    pages_per_split = split_size // pages.page_size
    splits = []
    for first_slot in range(0, length, split_size):
        first_page = first_slot // pages.page_size
        table = page_table[first_page : first_page + pages_per_split]
        table = F.pad(table, (0, pages_per_split - table.shape[0]))
        valid = (torch.arange(split_size, device=table.device) + first_slot < length)[None, :, None]
        gathered = []
        for source in (pages.k, pages.v):
            heads_first = source[table].transpose(0, 1).reshape(source.shape[1], split_size, source.shape[3])
            gathered.append(pad_last(widen(heads_first.masked_fill(~valid, 0)), MATMUL_MULTIPLE))
        splits.append(_Split(*gathered))
    return splits


def _attend_rows(q: Tensor, slots: Tensor, splits: list[_Split]) -> Tensor:
    """Up to ROW_BLOCK queries [rows, num_heads, head_dim] of one sequence against its splits; shape of q."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads, split_size, _ = splits[0].keys.shape
    group = num_heads // num_kv_heads
    # Scaling q in fp32 instead of the scores saves a pass; padded rows sit at slot -1 and see nothing.
    block = F.pad(pad_last(widen(q) * head_dim**-0.5, MATMUL_MULTIPLE), (0, 0, 0, 0, 0, ROW_BLOCK - rows))
    block = (
        block.view(ROW_BLOCK, num_kv_heads, group, -1).permute(1, 2, 0, 3).reshape(num_kv_heads, group * ROW_BLOCK, -1)
    )
    last_visible = F.pad(slots, (0, ROW_BLOCK - rows), value=-1).repeat(group)[None, :, None]

    running_max = block.new_full((num_kv_heads, group * ROW_BLOCK, 1), _MASKED)
    running_sum = torch.zeros_like(running_max)
    accumulator = torch.zeros_like(block)
    for index in range(int(slots.max()) // split_size + 1):
        keys, values = splits[index]
        hidden = torch.arange(split_size, device=slots.device) + index * split_size > last_visible
        scores = torch.bmm(block, keys.transpose(1, 2)).masked_fill(hidden, _MASKED)
        split_max = scores.amax(-1, keepdim=True)
        weights = elementwise(torch.exp, scores - split_max).masked_fill(hidden, 0)
        new_max = torch.maximum(running_max, split_max)
        keep, add = elementwise(torch.exp, running_max - new_max), elementwise(torch.exp, split_max - new_max)
        running_sum = running_sum * keep + weights.sum(-1, keepdim=True) * add
        accumulator = accumulator * keep + torch.bmm(weights, values) * add
        running_max = new_max
    # Padded rows have seen nothing: 0 / 1, not 0 / 0, which stays NaN for a row whose scores are all -inf.
    out = accumulator / running_sum.masked_fill(last_visible < 0, 1)
    out = out.view(num_kv_heads, group, ROW_BLOCK, -1).permute(2, 0, 1, 3).reshape(ROW_BLOCK, num_heads, -1)
    return out[:rows, :, :head_dim].to(q.dtype)


def _attention_dense(q: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """The same attention under autograd: all sequences padded to the longest, one masked call."""
    num_seqs, table_width = batch.page_table.shape
    query_lens = batch.query_starts.diff()
    longest = int(query_lens.max())
    column = torch.arange(q.shape[0], device=q.device) - batch.query_starts[batch.seq_ids]
    queries = q.new_zeros(num_seqs, longest, *q.shape[1:]).index_put((batch.seq_ids, column), q)
    slots = batch.slots.new_full((num_seqs, longest), -1).index_put((batch.seq_ids, column), batch.slots)

    # Stale slots are zeroed, not only masked: 0 * NaN is NaN.
    num_slots = table_width * pages.page_size
    slot = torch.arange(num_slots, device=q.device)
    filled = (slot < batch.seq_lens[:, None])[:, None, :, None]
    keys, values = (
        source[batch.page_table].transpose(1, 2).flatten(2, 3).masked_fill(~filled, 0) for source in (pages.k, pages.v)
    )
    # Padded rows see slot 0: their result is dropped, and a row that sees nothing would give NaN gradients.
    visible = slot <= slots.clamp(min=0)[:, :, None]
    attended = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, attn_mask=visible[:, None], enable_gqa=True
    )
    return attended.transpose(1, 2)[batch.seq_ids, column].flatten(1)

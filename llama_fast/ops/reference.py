"""The reference backend: every op in plain PyTorch, on any device and dtype, differentiable.

It is the oracle of the kernels' tests, the baseline of their benches and the fallback where no kernel runs. Sums are
taken in fp32 (fp64 for fp64 inputs) and rounded where Hugging Face's Llama stores a tensor; RoPE and the activation
are computed in fp32. A token's bits do not depend on its company (see rows.py), so prompt and generated tokens may
share a launch. Under autograd the row blocks are off and the cache is built out of place: grad-mode bits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.ops.activations import ACTIVATIONS, Activation
from llama_fast.ops.reference_sample import log_probs, sample
from llama_fast.ops.rows import MATMUL_MULTIPLE, ROW_BLOCK, elementwise, in_row_blocks, needs_grad, pad_last

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages
    from llama_fast.model.llama import RMSNorm

__all__ = [
    "PREFILL_EQUALS_DECODE",
    "attention",
    "copy_pages",
    "embed",
    "linear",
    "linear_residual",
    "log_probs",
    "norm_gate_up_act",
    "norm_lm_head",
    "norm_qkv_rope_cache",
    "prepare_linear",
    "rms_norm",
    "rope_and_cache",
    "sample",
    "silu_mul",
]

# A token gets the same bits as prompt and as generated token, so both may share a launch and their pages.
PREFILL_EQUALS_DECODE = True

# Finite, so that a fully masked split gives exp(0), not NaN, before its mask makes it zero.
_MASKED = -1e30
# Rows of the LM head widened to fp32 at a time: 4096 x 4096 is 64 MiB.
_HEAD_CHUNK = 4096


@dataclass(frozen=True)
class LinearPart:
    """One projection as the checkpoint stores it: weight [out_features, in_features], bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LinearWeight:
    """What `prepare_linear` returns here: the parts as they are; outputs are concatenated in their order."""

    parts: tuple[LinearPart, ...]
    activation: Activation | None


def prepare_linear(parts: Sequence[nn.Linear], activation: str | Activation | None = None) -> LinearWeight:
    """Make one weight of several projections of the same input (q, k, v; gate, up).

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.
    """
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    return LinearWeight(tuple(LinearPart(part.weight, part.bias) for part in parts), function)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- primitives ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight: Hugging Face's order.

    Args:
        x: [num_tokens, hidden_size].
        weight: [hidden_size].

    Returns:
        [num_tokens, hidden_size] in x's dtype.

    Source: arXiv:1910.07467.
    """

    def norm(rows: Tensor) -> Tensor:
        wide = _widen(rows)
        scaled = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(rows.dtype)

    return norm(x) if needs_grad(x, weight) else in_row_blocks(norm, x)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias; the same bits for a row in any company."""
    if needs_grad(x, weight, bias):
        return F.linear(x, weight, bias)
    out_features = weight.shape[0]
    missing = -out_features % MATMUL_MULTIPLE
    if missing or weight.shape[1] % MATMUL_MULTIPLE:
        x, weight = pad_last(x, MATMUL_MULTIPLE), F.pad(pad_last(weight, MATMUL_MULTIPLE), (0, 0, 0, missing))
        bias = None if bias is None else F.pad(bias, (0, missing))
    return in_row_blocks(lambda rows: F.linear(rows, weight, bias), x)[:, :out_features]


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """x [num_tokens, in_features] times all parts of `weight` -> [num_tokens, sum of out_features], in x's dtype."""
    outputs = [_matmul(x, part.weight, part.bias) for part in weight.parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def silu_mul(gate_up: Tensor, activation: Activation = F.silu) -> Tensor:
    """activation(gate) * up in fp32, rounded once.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first.

    Returns:
        [num_tokens, intermediate_size] in gate_up's dtype.

    Source: SwiGLU, arXiv:2002.05202.
    """
    gate, up = _widen(gate_up).chunk(2, dim=-1)
    return (elementwise(activation, gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dims of x [num_tokens, heads, head_dim]; pairs are (i, i + rotary_dim / 2)."""
    rotary_dim = cos.shape[-1]
    wide = _widen(x)
    rotated, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1).to(x.dtype)


def rope_and_cache(q: Tensor, k: Tensor, v: Tensor, batch: Batch, pages: LayerPages) -> Tensor:
    """Rotate q and k by the batch's cos/sin in fp32; write k and v into their pages.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k, v: [num_tokens, num_kv_heads, head_dim].
        pages: this layer's cache; tokens go to `batch.slots` of their sequence.

    Returns:
        The rotated q.

    Source: RoFormer, arXiv:2104.09864, in the half-split layout of Hugging Face's Llama.
    """
    q, k = _rotate(q, batch.cos, batch.sin), _rotate(k, batch.cos, batch.sin)
    page, offset = batch.pages_of_slots(pages.page_size)
    if needs_grad(k, v):
        heads = torch.arange(k.shape[1], device=k.device)
        where = (page[:, None], heads[None], offset[:, None])
        pages.k, pages.v = pages.k.index_put(where, k), pages.v.index_put(where, v)
    else:
        pages.k[page, :, offset] = k
        pages.v[page, :, offset] = v
    return q


def attention(q: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """Causal grouped-query attention over the paged cache: token at slot s sees slots 0..s of its sequence.

    Each split of `batch.split_size` slots gets a softmax of its own (max, sum, accumulator, in fp32); splits are merged
    in ascending order. A row's order of summation depends on its slot alone. Slots past a sequence's length are never
    read as numbers, so stale cache contents are harmless.

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


def _gather_splits(pages: LayerPages, page_table: Tensor, length: int, split_size: int) -> list[tuple[Tensor, Tensor]]:
    """A sequence's K and V, one contiguous [num_kv_heads, split_size, padded head_dim] pair a split, zeros past length."""
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
            gathered.append(pad_last(_widen(heads_first.masked_fill(~valid, 0)), MATMUL_MULTIPLE))
        splits.append((gathered[0], gathered[1]))
    return splits


def _attend_rows(q: Tensor, slots: Tensor, splits: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Up to ROW_BLOCK queries [rows, num_heads, head_dim] of one sequence against its splits; shape of q."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads, split_size, _ = splits[0][0].shape
    group = num_heads // num_kv_heads
    # Scaling q in fp32 instead of the scores saves a pass; padded rows sit at slot -1 and see nothing.
    block = F.pad(pad_last(_widen(q) * head_dim**-0.5, MATMUL_MULTIPLE), (0, 0, 0, 0, 0, ROW_BLOCK - rows))
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
    # Padded rows have seen nothing: 0 / 1, not 0 / 0.
    out = accumulator / running_sum.masked_fill(running_sum == 0, 1)
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


def copy_pages(pool: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """Copy whole pages in every layer, K and V: pool [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]."""
    pool[:, :, list(target)] = pool[:, :, list(source)]


# --- ops of the graph, composed from the primitives ------------------------------------------------------------------


def embed(token_ids: Tensor, embed_tokens: nn.Embedding) -> Tensor:
    """Rows of the embedding: token_ids [num_tokens] -> [num_tokens, hidden_size]."""
    return F.embedding(token_ids, embed_tokens.weight, embed_tokens.padding_idx)


def norm_qkv_rope_cache(x: Tensor, norm: RMSNorm, qkv: LinearWeight, batch: Batch, pages: LayerPages) -> Tensor:
    """RMSNorm, q/k/v projection, RoPE, cache write: x [num_tokens, hidden_size] -> q [num_tokens, heads, head_dim]."""
    packed = linear(rms_norm(x, norm.weight, norm.eps), qkv)
    num_kv_heads, head_dim = pages.k.shape[1], pages.k.shape[3]
    q, k, v = packed.unflatten(-1, (-1, head_dim)).tensor_split(
        (packed.shape[-1] // head_dim - 2 * num_kv_heads, packed.shape[-1] // head_dim - num_kv_heads), dim=1
    )
    return rope_and_cache(q, k, v, batch, pages)


def linear_residual(x: Tensor, weight: LinearWeight, residual: Tensor) -> Tensor:
    """residual + linear(x), the projection rounded before the add: [num_tokens, hidden_size]."""
    return residual + linear(x, weight)


def norm_gate_up_act(x: Tensor, norm: RMSNorm, gate_up: LinearWeight) -> Tensor:
    """RMSNorm, gate and up projection, activation(gate) * up -> [num_tokens, intermediate_size]."""
    return silu_mul(linear(rms_norm(x, norm.weight, norm.eps), gate_up), gate_up.activation or F.silu)


def norm_lm_head(x: Tensor, norm: RMSNorm, lm_head: LinearWeight) -> Tensor:
    """Final RMSNorm and LM head: x [num_tokens, hidden_size] -> logits [num_tokens, vocab_size], fp32 (fp64 for fp64).

    The normed hidden state is rounded to the activation dtype; products are summed and kept in fp32.
    """
    hidden_states = _widen(rms_norm(x, norm.weight, norm.eps))
    (part,) = lm_head.parts
    if needs_grad(hidden_states, part.weight) or part.weight.dtype == hidden_states.dtype:
        return _matmul(hidden_states, part.weight.to(hidden_states.dtype), part.bias)
    # A 16-bit head is widened a chunk at a time: a whole fp32 copy would double the memory of a 128k vocabulary.
    chunks = part.weight.split(_HEAD_CHUNK)
    return torch.cat([_matmul(hidden_states, chunk.to(hidden_states.dtype), None) for chunk in chunks], dim=-1)

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
from llama_fast.ops.int4 import Int4Linear
from llama_fast.ops.reference_attention import attention
from llama_fast.ops.reference_int4 import int4_module_linear
from llama_fast.ops.reference_sample import log_probs, sample
from llama_fast.ops.rows import MATMUL_MULTIPLE, elementwise, in_row_blocks, needs_grad, pad_last, widen
from llama_fast.ops.shared import advance, copy_pages, embed, prepare_layers, run_layers, warm_up_rows

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages
    from llama_fast.model.llama import Norm

__all__ = [
    "CAPTURABLE",
    "ROLES_SHARE_RUNS",
    "advance",
    "attention",
    "check_cache",
    "copy_pages",
    "embed",
    "linear",
    "linear_residual",
    "log_probs",
    "norm_gate_up_act",
    "norm_lm_head",
    "norm_qkv_rope_cache",
    "prepare_layers",
    "prepare_linear",
    "rms_norm",
    "rope_and_cache",
    "run_layers",
    "sample",
    "silu_mul",
    "warm_up_rows",
]

# Rows of the LM head widened to fp32 at a time, few enough to stay in cache: at 128256 x 2048 on 2 cores 512 rows took
# 92 ms a token, 4096 rows 141 ms.
HEAD_CHUNK = 512


# A generated token has the bits that it would have as a prompt token, and nothing is gained by separating them.
ROLES_SHARE_RUNS = True
# Sampling looks at values on the host.
CAPTURABLE = False


@dataclass(frozen=True)
class LinearPart:
    """One projection as the checkpoint stores it: weight [out_features, in_features], bias [out_features] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LinearWeight:
    """What `prepare_linear` returns here: the parts as they are; outputs are concatenated in their order."""

    parts: tuple[LinearPart | Int4Linear, ...]
    activation: str | Activation | None


def check_cache(head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a cache that this backend cannot read; this one reads all."""


def prepare_linear(
    parts: Sequence[nn.Linear] | Sequence[Int4Linear], activation: str | Activation | None = None
) -> LinearWeight:
    """Make one weight of several projections of the same input (q, k, v; gate, up).

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None; or quantized ones,
            which are read where they are used.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.
    """
    kept = (part if isinstance(part, Int4Linear) else LinearPart(part.weight, part.bias) for part in parts)
    return LinearWeight(tuple(kept), activation)


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
        wide = widen(rows)
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
    # A transposed fp16 weight would take another kernel; the checkpoint's are contiguous already.
    weight = weight.contiguous()
    return in_row_blocks(lambda rows: F.linear(rows, weight, bias), x)[:, :out_features]


def linear(x: Tensor, weight: LinearWeight, generated: bool = False) -> Tensor:
    """x [num_tokens, in_features] times all parts of `weight` -> [num_tokens, sum of out_features], in x's dtype.

    Args:
        generated: whether the rows are generated tokens (see Batch); both roles take one route here.
    """
    outputs = [
        int4_module_linear(x, part) if isinstance(part, Int4Linear) else _matmul(x, part.weight, part.bias)
        for part in weight.parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def silu_mul(gate_up: Tensor, activation: str | Activation = "silu") -> Tensor:
    """activation(gate) * up in fp32, rounded once.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first.
        activation: a name of `ACTIVATIONS` or an elementwise function.

    Returns:
        [num_tokens, intermediate_size] in gate_up's dtype.

    Source: SwiGLU, arXiv:2002.05202.
    """
    gate, up = widen(gate_up).chunk(2, dim=-1)
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    return (elementwise(function, gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim dims of x [num_tokens, heads, head_dim]; pairs are (i, i + rotary_dim / 2)."""
    rotary_dim = cos.shape[-1]
    wide = widen(x)
    rotated, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1).to(x.dtype)


def rope_and_cache(q: Tensor, k: Tensor, v: Tensor, batch: Batch, pages: LayerPages) -> Tensor:
    """Rotate q and k by the batch's cos/sin in fp32; write k and v into their pages.

    A head of v that is not finite is written as zeros, and NaN as its k: then exactly the rows that see the slot become
    NaN. Attention drops the scores of what a row does not see, but 0 times infinity would reach every row.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k, v: [num_tokens, num_kv_heads, head_dim].
        pages: this layer's cache; tokens go to `batch.slots` of their sequence.

    Returns:
        The rotated q.

    Source: RoFormer, arXiv:2104.09864, in the half-split layout of Hugging Face's Llama.
    """
    q, k = _rotate(q, batch.cos, batch.sin), _rotate(k, batch.cos, batch.sin)
    broken = ~v.isfinite().all(-1, keepdim=True)
    k, v = k.masked_fill(broken, torch.nan), v.masked_fill(broken, 0)
    page, offset = batch.pages_of_slots(pages.page_size)
    if needs_grad(k, v):
        heads = torch.arange(k.shape[1], device=k.device)
        where = (page[:, None], heads[None], offset[:, None])
        pages.k, pages.v = pages.k.index_put(where, k), pages.v.index_put(where, v)
    else:
        pages.k[page, :, offset] = k
        pages.v[page, :, offset] = v
    return q


# --- ops of the graph, composed from the primitives ------------------------------------------------------------------


def norm_qkv_rope_cache(x: Tensor, norm: Norm, qkv: LinearWeight, batch: Batch, pages: LayerPages) -> Tensor:
    """RMSNorm, q/k/v projection, RoPE, cache write: x [num_tokens, hidden_size] -> q [num_tokens, heads, head_dim]."""
    packed = linear(rms_norm(x, norm.weight, norm.eps), qkv, batch.generated)
    num_kv_heads, head_dim = pages.k.shape[1], pages.k.shape[3]
    q, k, v = packed.unflatten(-1, (-1, head_dim)).tensor_split(
        (packed.shape[-1] // head_dim - 2 * num_kv_heads, packed.shape[-1] // head_dim - num_kv_heads), dim=1
    )
    return rope_and_cache(q, k, v, batch, pages)


def linear_residual(x: Tensor, weight: LinearWeight, residual: Tensor, batch: Batch) -> Tensor:
    """residual + linear(x), the projection rounded before the add: [num_tokens, hidden_size]."""
    return residual + linear(x, weight, batch.generated)


def norm_gate_up_act(x: Tensor, norm: Norm, gate_up: LinearWeight, batch: Batch) -> Tensor:
    """RMSNorm, gate and up projection, activation(gate) * up -> [num_tokens, intermediate_size]."""
    return silu_mul(linear(rms_norm(x, norm.weight, norm.eps), gate_up, batch.generated), gate_up.activation or "silu")


def norm_lm_head(x: Tensor, norm: Norm, lm_head: LinearWeight) -> Tensor:
    """Final RMSNorm and LM head: x [num_tokens, hidden_size] -> logits [num_tokens, vocab_size], fp32 (fp64 for fp64).

    The normed hidden state is rounded to the activation dtype; products are summed and kept in fp32.
    """
    normed = rms_norm(x, norm.weight, norm.eps)
    hidden_states = widen(normed)
    (part,) = lm_head.parts
    if isinstance(part, Int4Linear):
        return int4_module_linear(normed, part, out_dtype=hidden_states.dtype)
    # A 16-bit head is widened a chunk at a time: a whole fp32 copy would double the memory of a 128k vocabulary.
    chunks = [part.weight] if part.weight.dtype == hidden_states.dtype else part.weight.split(HEAD_CHUNK)
    logits = torch.cat([_matmul(hidden_states, chunk.to(hidden_states.dtype), None) for chunk in chunks], dim=-1)
    return logits if part.bias is None else logits + part.bias

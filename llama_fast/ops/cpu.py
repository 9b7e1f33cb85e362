"""The CPU backend: native kernels (csrc/cpu) on the checkpoint's weights where they lie.

One kernel serves prompt and generated tokens and sums every output in one order, so a token's bits depend on nothing
beside its sequence. torch.set_num_threads says how many threads run; their number changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_fast.errors import KernelArgumentError
from llama_fast.ops import reference
from llama_fast.ops.activations import Activation
from llama_fast.ops.cpu_arguments import (
    DTYPES,
    check,
    contiguous,
    heads,
    norm_weight_of,
    pages_of,
    places_of,
    rotation,
    rows,
)
from llama_fast.ops.cpu_layers import NativeLayers, native_layers, native_pages
from llama_fast.ops.cpu_linear import ACTIVATION_NUMBERS, LinearWeight, prepare_linear
from llama_fast.ops.native import required
from llama_fast.ops.reference_sample import SamplingBatch, check_logits, check_sampling
from llama_fast.ops.shared import copy_pages, embed, warm_up_rows
from llama_fast.ops.shared import run_layers as run_ops

if TYPE_CHECKING:
    from llama_fast.engine.decode_rows import DecodeRows
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages, PagedKVCache
    from llama_fast.model.llama import DecoderLayer, Norm

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

# A generated token has the bits that it would have as a prompt token (tests/ops/test_cpu_one_answer.py).
ROLES_SHARE_RUNS = True
# A graph is CUDA's.
CAPTURABLE = False

_C = required()

_CPU = torch.device("cpu")
_STORE, _ADD_RESIDUAL, _GATE_UP, _STORE_FLOAT = range(4)


def check_cache(head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a cache that this backend cannot read; this one reads all."""


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    # The kernels write there: whatever the default device is, it must be this memory.
    return torch.empty(shape, dtype=dtype, device=_CPU)


def _linear(
    op: str,
    x: Tensor,
    weight: LinearWeight,
    norm: Norm | None = None,
    epilogue: int = _STORE,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    x = _input(op, x, weight)
    # Held until the kernel has run: it may be a copy.
    norm_weight = None if norm is None else norm_weight_of(op, norm.weight, weight.dtype, weight.in_features)
    num_tokens, out_features = x.shape[0], weight.out_features
    if residual is not None:
        residual = rows(op, "residual", residual, weight.dtype, out_features).contiguous()
        if residual.shape[0] != num_tokens:
            raise KernelArgumentError(f"{op}: residual {tuple(residual.shape)} does not fit {num_tokens} tokens of x")
    if epilogue == _GATE_UP:
        out_features //= 2
    dtype = torch.float32 if epilogue == _STORE_FLOAT else weight.dtype
    out = torch.empty((num_tokens, out_features), dtype=dtype, device=_CPU)
    _C.linear(
        weight.native,
        x.data_ptr(),
        x.stride(0),
        num_tokens,
        0 if norm_weight is None else norm_weight.data_ptr(),
        0.0 if norm is None else norm.eps,
        epilogue,
        activation,
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _input(op: str, x: Tensor, weight: LinearWeight) -> Tensor:
    if weight.trainable and torch.is_grad_enabled():
        raise KernelArgumentError(f"{op}: a weight requires grad; kernels are inference-only, use backend='reference'")
    return rows(op, "x", x, weight.dtype, weight.in_features)


# --- primitives ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight: Hugging Face's order.

    Args:
        x: [num_tokens, hidden_size]; rows may be strided.
        weight: [hidden_size].

    Returns:
        [num_tokens, hidden_size] in x's dtype.

    Raises:
        KernelArgumentError: dtype, shape or device that the kernel does not serve.

    Source: arXiv:1910.07467.
    """
    check("rms_norm", "x", x, x.dtype, 2)
    num_tokens, width = x.shape
    x = rows("rms_norm", "x", x, x.dtype, width)
    weight = norm_weight_of("rms_norm", weight, x.dtype, width)
    out = _empty(num_tokens, width, dtype=x.dtype)
    threads = torch.get_num_threads()
    args = (x.data_ptr(), x.stride(0), num_tokens, width, weight.data_ptr(), eps, out.data_ptr(), threads)
    _C.rms_norm(DTYPES[x.dtype], *args)
    return out


def linear(x: Tensor, weight: LinearWeight, generated: bool = False) -> Tensor:
    """x [num_tokens, in_features] times all parts of `weight` -> [num_tokens, sum of out_features], in x's dtype.

    Args:
        x: rows may be strided.
        generated: whether the rows are generated tokens (see Batch); both roles take one route here.

    Raises:
        KernelArgumentError: dtype, shape or device that the kernel does not serve.
    """
    return _linear("linear", x, weight)


def silu_mul(gate_up: Tensor, activation: str | Activation = "silu") -> Tensor:
    """activation(gate) * up in fp32, rounded once.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first; rows may be strided.
        activation: a name of `ACTIVATIONS` or an elementwise function, which PyTorch runs.

    Returns:
        [num_tokens, intermediate_size] in gate_up's dtype.

    Raises:
        KernelArgumentError: dtype, shape or device that the kernel does not serve.

    Source: SwiGLU, arXiv:2002.05202.
    """
    check("silu_mul", "gate_up", gate_up, gate_up.dtype, 2)
    if gate_up.shape[1] % 2:
        raise KernelArgumentError(f"silu_mul: gate_up must have an even width; got {tuple(gate_up.shape)}")
    if not isinstance(activation, str):
        return reference.silu_mul(gate_up, activation)
    if activation not in ACTIVATION_NUMBERS:
        raise KernelArgumentError(
            f"silu_mul: activation={activation!r}; accepted: {', '.join(sorted(ACTIVATION_NUMBERS))}"
        )
    gate_up = rows("silu_mul", "gate_up", gate_up, gate_up.dtype, gate_up.shape[1])
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = _empty(num_tokens, width, dtype=gate_up.dtype)
    args = (gate_up.data_ptr(), gate_up.stride(0), num_tokens, width, out.data_ptr(), torch.get_num_threads())
    _C.silu_mul(DTYPES[gate_up.dtype], ACTIVATION_NUMBERS[activation], *args)
    return out


def rope_and_cache(q: Tensor, k: Tensor, v: Tensor, batch: Batch, pages: LayerPages) -> Tensor:
    """Rotate q and k by the batch's cos/sin in fp32; write k and v into their pages.

    A head of v that is not finite is written as zeros, and NaN as its k: then exactly the rows that see the slot become
    NaN, as in the reference.

    Args:
        q: [num_tokens, num_heads, head_dim]; rows may be strided, as may k's and v's.
        k, v: [num_tokens, num_kv_heads, head_dim].
        pages: this layer's cache; tokens go to `batch.slots` of their sequence.

    Returns:
        The rotated q.

    Raises:
        KernelArgumentError: dtypes, shapes or devices that the kernel does not serve, or a place outside the cache.

    Source: RoFormer, arXiv:2104.09864, in the half-split layout of Hugging Face's Llama.
    """
    op, dtype = "rope_and_cache", q.dtype
    check(op, "q", q, dtype, 3)
    places, num_tokens = places_of(_C, op, batch, pages)
    cache, num_kv_heads, head_dim = pages_of(_C, op, pages, dtype)
    q, k, v = (heads(op, name, t, dtype, num_tokens, head_dim) for name, t in (("q", q), ("k", k), ("v", v)))
    if k.shape[1] != num_kv_heads or v.shape[1] != num_kv_heads:
        raise KernelArgumentError(
            f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache of {num_kv_heads} heads"
        )
    cos, sin = rotation(op, batch, num_tokens, head_dim)
    out = _empty(num_tokens, q.shape[1], head_dim, dtype=dtype)
    _C.rope_and_cache(
        DTYPES[dtype],
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        q.shape[1],
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        places,
        cache,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def attention(q: Tensor, pages: LayerPages, batch: Batch) -> Tensor:
    """Causal grouped-query attention over the paged cache: token at slot s sees slots 0..s of its sequence.

    Splits of `batch.split_size` slots are summed by themselves and merged in ascending order (csrc/cpu/attention.h).

    Args:
        q: [num_tokens, num_heads, head_dim], rotated.

    Returns:
        [num_tokens, num_heads * head_dim] in q's dtype.

    Raises:
        KernelArgumentError: dtypes, shapes or devices that the kernel does not serve, or a place outside the cache.

    Source: FlashAttention, arXiv:2205.14135; split merge as in Flash-Decoding.
    """
    op, dtype = "attention", q.dtype
    check(op, "q", q, dtype, 3)
    places, num_tokens = places_of(_C, op, batch, pages)
    cache, num_kv_heads, head_dim = pages_of(_C, op, pages, dtype)
    q = heads(op, "q", q, dtype, num_tokens, head_dim)
    num_heads, split_size = q.shape[1], batch.split_size
    _check_heads(op, num_heads, num_kv_heads, batch, pages.page_size)
    out = _empty(num_tokens, num_heads * head_dim, dtype=dtype)
    if num_heads == 0:
        return out
    _C.attention(
        DTYPES[dtype],
        q.data_ptr(),
        q.stride(0),
        num_heads,
        split_size,
        places,
        cache,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _check_heads(op: str, num_heads: int, num_kv_heads: int, batch: Batch, page_size: int) -> None:
    if num_kv_heads == 0 or num_heads % num_kv_heads or batch.split_size < 1 or batch.split_size % page_size:
        raise KernelArgumentError(
            f"{op}: {num_heads} heads must be a multiple of the cache's {num_kv_heads}, and split_size="
            f"{batch.split_size} of its page_size={page_size}"
        )


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row: penalties, bias, temperature, top-k, top-p, min-p, Gumbel-max; as the reference's.

    Args:
        logits: [B, vocab_size], floating point; B may be 0.

    Returns:
        int64 [B]: token ids; -1 for a row without a finite maximum. Equal scores go to the lowest id.

    Raises:
        KernelArgumentError: shapes that do not fit each other, or a vocabulary above MAX_VOCAB_SIZE.
    """
    check_sampling(logits, batch)
    logits = rows("sample", "logits", logits.float(), torch.float32, logits.shape[1])
    num_rows, vocab_size = logits.shape
    tokens = _empty(num_rows, dtype=torch.int64)
    fields = [
        contiguous("sample", name, getattr(batch, name), dtype)
        for name, dtype in (
            ("temperature", torch.float32),
            ("top_p", torch.float32),
            ("min_p", torch.float32),
            ("repetition_penalty", torch.float32),
            ("frequency_penalty", torch.float32),
            ("presence_penalty", torch.float32),
            ("top_k", torch.int32),
            ("sample_index", torch.int32),
            ("seeds", torch.int64),
            ("position", torch.int64),
        )
    ]
    tables = [
        None if table is None else contiguous("sample", name, table, dtype)
        for name, table, dtype in (
            ("prompt_mask", batch.prompt_mask, torch.bool),
            ("output_counts", batch.output_counts, torch.int32),
            ("bias", batch.bias, torch.float32),
        )
    ]
    _C.sample(
        logits.data_ptr(),
        logits.stride(0),
        num_rows,
        vocab_size,
        *(field.data_ptr() for field in fields),
        *(0 if table is None else table.data_ptr() for table in tables),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens


def log_probs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the raw distribution; arguments and results as the reference's `log_probs`.

    Args:
        logits: [R, vocab_size], floating point; R may be 0.
        token_ids: [R] int64, the tokens to score.
        num_top: how many of the most probable tokens to report; at most vocab_size are.

    Returns:
        chosen fp32 [R], ranks int64 [R], top_values fp32 and top_ids int64 [R, min(num_top, vocab_size)].

    Raises:
        KernelArgumentError: `logits` is not 2-D, its vocabulary is above MAX_VOCAB_SIZE, or a token is not in it.
    """
    check_logits(logits)
    logits = rows("log_probs", "logits", logits.float(), torch.float32, logits.shape[1])
    num_rows, vocab_size = logits.shape
    token_ids = contiguous("log_probs", "token_ids", token_ids, torch.int64)
    if token_ids.shape != (num_rows,) or (
        num_rows and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size
    ):
        raise KernelArgumentError(
            f"log_probs: token_ids must be [{num_rows}] ids below {vocab_size}; got {tuple(token_ids.shape)}, "
            f"{token_ids.flatten()[:10].tolist()}"
        )
    if num_top < 0:
        raise KernelArgumentError(f"log_probs: num_top={num_top} is negative")
    num_top = min(num_top, vocab_size)
    chosen, ranks = _empty(num_rows, dtype=torch.float32), _empty(num_rows, dtype=torch.int64)
    top_values = _empty(num_rows, num_top, dtype=torch.float32)
    top_ids = _empty(num_rows, num_top, dtype=torch.int64)
    outputs = [tensor.data_ptr() for tensor in (chosen, ranks, top_values, top_ids)]
    args = (logits.data_ptr(), logits.stride(0), num_rows, vocab_size, num_top, token_ids.data_ptr(), *outputs)
    _C.log_probs(*args, torch.get_num_threads())
    return chosen, ranks, top_values, top_ids


def advance(tokens: Tensor, indices: Tensor | None, rows: DecodeRows, counted: bool) -> Tensor:
    """Hand each row the token that was drawn for it; arguments and result as ops/shared.py's.

    Args:
        tokens: int64 [n], below vocab_size.
        indices: int64 [n], the rows they are for, each at most once; None: the first n.

    Raises:
        KernelArgumentError: dtypes or shapes that are not as above.
    """
    count, num_rows = tokens.shape[0], rows.done.shape[0]
    for name, tensor in (("tokens", tokens), ("indices", indices)):
        if tensor is not None and not (
            tensor.dtype is torch.int64 and tensor.is_cpu and tensor.shape == (count,) and tensor.is_contiguous()
        ):
            raise KernelArgumentError(
                f"advance: {name} must be contiguous int64 [{count}] on the CPU; got {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}"
            )
    if count > num_rows:
        raise KernelArgumentError(f"advance: {count} tokens are more than the {num_rows} rows")
    if "cpu" not in rows.kept:
        buffers = (rows.token_ids, rows.slots, rows.seq_lens, rows.limits, rows.done)
        tables = (rows.page_table, rows.stop_mask, rows.output_counts)
        addresses = [buffer.data_ptr() for buffer in (*buffers, *tables)]
        sizes = (rows.page_table.shape[1], rows.stop_mask.shape[1], rows.spare_page)
        rows.kept["cpu"] = _C.DecodeRows(*addresses, *sizes)
    out = _empty(count, dtype=torch.int64)
    _C.advance(
        rows.kept["cpu"],
        tokens.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        count,
        counted,
        out.data_ptr(),
    )
    return out


# --- ops of the graph ------------------------------------------------------------------------------------------------


def norm_qkv_rope_cache(x: Tensor, norm: Norm, qkv: LinearWeight, batch: Batch, pages: LayerPages) -> Tensor:
    """RMSNorm, q/k/v projection, RoPE, cache write: x [num_tokens, hidden_size] -> q [num_tokens, heads, head_dim]."""
    op = "norm_qkv_rope_cache"
    places, num_tokens = places_of(_C, op, batch, pages)
    cache, num_kv_heads, head_dim = pages_of(_C, op, pages, qkv.dtype)
    x = _input(op, x, qkv)
    norm_weight = norm_weight_of(op, norm.weight, qkv.dtype, qkv.in_features)
    num_heads = qkv.out_features // head_dim - 2 * num_kv_heads
    if x.shape[0] != num_tokens or qkv.out_features % head_dim or num_heads < 1:
        raise KernelArgumentError(
            f"{op}: x {tuple(x.shape)} and {qkv.out_features} outputs do not fit {num_tokens} tokens of the batch and "
            f"a cache of {num_kv_heads} heads of {head_dim}"
        )
    cos, sin = rotation(op, batch, num_tokens, head_dim)
    out = _empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
    _C.norm_qkv_rope_cache(
        qkv.native,
        x.data_ptr(),
        x.stride(0),
        norm_weight.data_ptr(),
        norm.eps,
        num_heads,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        places,
        cache,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def linear_residual(x: Tensor, weight: LinearWeight, residual: Tensor, batch: Batch) -> Tensor:
    """residual + linear(x), the projection rounded before the add: [num_tokens, hidden_size]."""
    return _linear("linear_residual", x, weight, None, _ADD_RESIDUAL, 0, residual)


def norm_gate_up_act(x: Tensor, norm: Norm, gate_up: LinearWeight, batch: Batch) -> Tensor:
    """RMSNorm, gate and up projection, activation(gate) * up -> [num_tokens, intermediate_size]."""
    activation = gate_up.activation or "silu"
    if isinstance(activation, str) and gate_up.pair:
        number = ACTIVATION_NUMBERS[activation]
        return _linear("norm_gate_up_act", x, gate_up, norm, _GATE_UP, number)
    return silu_mul(_linear("norm_gate_up_act", x, gate_up, norm), activation)


def norm_lm_head(x: Tensor, norm: Norm, lm_head: LinearWeight) -> Tensor:
    """Final RMSNorm and LM head: x [num_tokens, hidden_size] -> logits [num_tokens, vocab_size], fp32."""
    return _linear("norm_lm_head", x, lm_head, norm, _STORE_FLOAT)


def prepare_layers(layers: Sequence[DecoderLayer]) -> NativeLayers:
    """What `run_layers` takes, of layers that are prepared themselves."""
    return native_layers(_C, layers)


def run_layers(layers: NativeLayers, x: Tensor, batch: Batch, cache: PagedKVCache) -> Tensor:
    """Every layer's five ops, in one native call where no layer needs Python; the same bits as op by op.

    Args:
        x: [num_tokens, hidden_size]; left as it is.

    Returns:
        [num_tokens, hidden_size]; K and V of the batch's tokens are written into the cache.

    Raises:
        KernelArgumentError: as the ops.
    """
    if not layers.native:
        return run_ops(layers.layers, x, batch, cache)
    op, first = "run_layers", layers.weights[0]
    dtype, hidden_size = first.dtype, first.in_features
    places, num_tokens = places_of(_C, op, batch, cache.layer(0))
    pages, num_kv_heads, head_dim = native_pages(_C, cache, len(layers.native), dtype)
    x = _input(op, x, first)
    num_heads = layers.weights[1].in_features // head_dim
    packed = (num_heads + 2 * num_kv_heads) * head_dim
    _check_heads(op, num_heads, num_kv_heads, batch, cache.page_size)
    if x.shape[0] != num_tokens or any(weight.out_features != packed for weight in layers.weights[::4]):
        raise KernelArgumentError(
            f"{op}: x {tuple(x.shape)} and q, k, v of {first.out_features} do not fit {num_tokens} tokens of the batch "
            f"and a cache of {num_kv_heads} heads of {head_dim}"
        )
    cos, sin = rotation(op, batch, num_tokens, head_dim)
    out = torch.empty((num_tokens, hidden_size), dtype=dtype, device=_CPU).copy_(x)
    _C.run_layers(
        layers.native,
        pages,
        out.data_ptr(),
        num_heads,
        batch.split_size,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[1],
        places,
        torch.get_num_threads(),
    )
    return out

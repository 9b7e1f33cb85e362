"""The GPU backend: the Triton kernels, composed into the ops of the graph.

Prompt and generated tokens (`Batch.generated`) take an attention kernel each, in two runs of the graph, and where the
CUDA extension is in use (cuda_extension.py) an int4_linear each; they share all others. On CPU tensors the kernels run
in Triton's interpreter, where TRITON_INTERPRET=1 was set before the start: slow, for tests and debugging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llama_fast.errors import RequestError
from llama_fast.kernels import batch_checks, configs
from llama_fast.kernels import int4_linear as int4_kernel
from llama_fast.kernels import linear as linear_kernel
from llama_fast.kernels.advance import advance
from llama_fast.kernels.arguments import INTERPRETED, refuse
from llama_fast.kernels.attention import MAX_HEAD_DIM, attention, page_size_problem
from llama_fast.kernels.int4_linear import PlanarInt4, from_planes, to_planes
from llama_fast.kernels.log_probs import log_probs
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.kernels.rope_and_cache import rope_and_cache
from llama_fast.kernels.sample import sample
from llama_fast.kernels.silu_mul import silu_mul as silu_mul_kernel
from llama_fast.ops import cuda_extension
from llama_fast.ops.activations import Activation
from llama_fast.ops.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Linear
from llama_fast.ops.reference import LinearPart
from llama_fast.ops.shared import copy_pages, embed, prepare_layers, run_layers

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

# One kernel serves a prompt's rows well and another one token a sequence. Their bits are the same where the MMAs' are,
# as on sm_90 (tests/kernels/test_attention.py); nothing in the engine counts on it.
ROLES_SHARE_RUNS = False
# No op of a decoding step looks at a value on the host or takes memory that outlives it; checks of indices do look.
CAPTURABLE = not batch_checks.ENABLED


@dataclass(frozen=True)
class LinearWeight:
    """Several projections of one input as one matrix.

    Attributes:
        parts: the checkpoint's parameters, whose data are views of `weight` and `bias`.
        weight: [out_features, in_features], the parts' rows in their order; or the same of 4-bit integers.
        bias: [out_features] or None; that of 4-bit integers is in `weight`.
        activation: of gate and up.
        by_extension: whether generated rows, however many, and all rows of a head go to the CUDA extension.
    """

    parts: tuple[LinearPart, ...] | tuple[Int4Linear, ...]
    weight: Tensor | PlanarInt4
    bias: Tensor | None
    activation: str | Activation | None
    by_extension: bool = False


def check_cache(head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a cache that the attention kernel has no tile for.

    Raises:
        RequestError: head_dim or page_size is out of range.
    """
    if head_dim > MAX_HEAD_DIM:
        raise RequestError(f"head_dim={head_dim} is above the {MAX_HEAD_DIM} of backend='gpu'; use backend='reference'")
    problem = page_size_problem(page_size, head_dim, dtype, device)
    if problem is not None:
        raise RequestError(f"{problem} with backend='gpu'")


def prepare_linear(
    parts: Sequence[nn.Linear] | Sequence[Int4Linear], activation: str | Activation | None = None
) -> LinearWeight:
    """Make one matrix of several projections of the same input (q, k, v; gate, up).

    The parts' parameters become views of it, so that the weights are in memory once.

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None; or quantized ones of
            one group size, whose values are repacked.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.

    Raises:
        KernelArgumentError: some parts are quantized and some are not, or their group sizes differ.
    """
    quantized = [part for part in parts if isinstance(part, Int4Linear)]
    if quantized:
        return _prepare_int4(quantized, len(parts), activation)
    plain = [part for part in parts if not isinstance(part, Int4Linear)]
    weight = _joined([part.weight for part in plain])
    biases = [part.bias for part in plain]
    bias = None if biases[0] is None else _joined([bias for bias in biases if bias is not None])
    linear_parts = tuple(LinearPart(part.weight, part.bias) for part in plain)
    return LinearWeight(linear_parts, weight, bias, activation)


def _prepare_int4(parts: Sequence[Int4Linear], num_parts: int, activation: str | Activation | None) -> LinearWeight:
    """`prepare_linear` of those of `num_parts` that are quantized."""
    op = "prepare_linear"
    if len(parts) < num_parts:
        refuse(
            op,
            f"{len(parts)} of {num_parts} projections of one input are quantized; those that are joined (q, k and v; "
            "gate and up) must all be or none; use backend='reference'",
        )
    sizes = {part.group_size for part in parts}
    if len(sizes) > 1 or not sizes <= set(GROUP_SIZES):
        refuse(
            op,
            f"projections of one input have groups of {', '.join(map(str, sorted(sizes)))}; they must have one group "
            f"size, {', '.join(map(str, GROUP_SIZES))}; use backend='reference'",
        )
    scales = _joined_scales([part.weight_scale for part in parts])
    zeros = bias = None
    if any(part.weight_zero_point is not None for part in parts):
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
        for part, mine in zip(parts, zeros.split([part.out_features for part in parts], dim=1), strict=True):
            if part.weight_zero_point is not None:
                mine.copy_(part.weight_zero_point.detach().t())
    biases = [part.bias for part in parts]
    if all(part_bias is not None for part_bias in biases):
        bias = _joined([part_bias for part_bias in biases if part_bias is not None])
    elif any(part_bias is not None for part_bias in biases):
        bias = torch.cat([scales.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts])
    packed = PlanarInt4(_joined_words(parts), scales, zeros, bias, parts[0].in_features)
    # A function of its own runs on what a plain linear gives.
    by_extension = cuda_extension.serves(packed, activation if isinstance(activation, str) else None)
    return LinearWeight(tuple(parts), packed, None, activation, by_extension)


def _joined_words(parts: Sequence[Int4Linear]) -> Tensor:
    """The parts' values, output after output, as `PlanarInt4.words`, whose views they are or become."""
    held = [part.weight_packed.detach() for part in parts]
    sizes = [part.out_features for part in parts]
    # In this order: whatever another backend made of them, it did not get its rows from here.
    ours = all(getattr(part._restore, "func", None) is from_planes for part in parts)
    if ours and (whole := _whole(held, 1)) is not None:
        return whole
    blocks = -(-parts[0].in_features // 128)
    words = held[0].new_empty((blocks, sum(sizes), 16))
    for part, mine in zip(parts, words.split(sizes, dim=1), strict=True):
        to_planes(part.rows(), mine)
        part.reorder(mine, partial(from_planes, in_features=part.in_features))
    return words


def _joined_scales(parameters: list[nn.Parameter]) -> Tensor:
    """Parameters [out_features, groups] as [groups, all out_features], whose transposed views they are or become."""
    turned = [parameter.detach().t() for parameter in parameters]
    if (whole := _whole(turned, 1)) is not None:
        return whole
    joined = torch.cat(turned, dim=1)
    for parameter, view in zip(parameters, joined.split([t.shape[1] for t in turned], dim=1), strict=True):
        parameter.data = view.t()
    return joined


def _whole(tensors: list[Tensor], dim: int) -> Tensor | None:
    """The contiguous tensor whose slices along `dim` `tensors` are, in their order; None if there is none."""
    first, sizes = tensors[0], [tensor.shape[dim] for tensor in tensors]
    shape = [*first.shape[:dim], sum(sizes), *first.shape[dim + 1 :]]
    stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    room = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    if not first.data_ptr() or room < math.prod(shape):
        return None
    whole = first.as_strided(shape, stride)
    for tensor, piece in zip(tensors, whole.split(sizes, dim=dim), strict=True):
        layout = tensor.data_ptr(), tensor.shape, tensor.stride()
        if layout != (piece.data_ptr(), piece.shape, piece.stride()):
            return None
    return whole


def _joined(parameters: list[Tensor]) -> Tensor:
    """Parameters of one width, row after row in one contiguous tensor whose views they are or become."""
    tensors = [parameter.detach() for parameter in parameters]
    first, num_rows = tensors[0], sum(tensor.shape[0] for tensor in tensors)
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    adjacent = all(tensor.data_ptr() == end for tensor, end in zip(tensors[1:], ends, strict=False))
    one_storage = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    if adjacent and one_storage and all(tensor.is_contiguous() for tensor in tensors):
        return first.as_strided((num_rows, *first.shape[1:]), first.stride())
    joined = torch.cat(tensors)
    views = joined.split([tensor.shape[0] for tensor in tensors])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view
    return joined


def warm_up_rows(weights: Sequence[LinearWeight], most: int) -> list[int]:
    """Numbers of rows, up to `most`, that make these weights' linears compile kernels of their own; ascending."""
    if INTERPRETED:
        return []
    rows = {1, most}
    for prepared in weights:
        weight = prepared.weight
        if isinstance(weight, PlanarInt4):
            tiles = configs.int4_tiles(configs.table_of(weight.words.device), weight.scales.dtype, weight.group_size)
            rows |= {last + 1 for last, _ in tiles if last is not None and last < most}
        else:
            gated = isinstance(prepared.activation, str)
            out_features = weight.shape[0] // (1 + gated)
            rows |= set(
                configs.row_thresholds(configs.table_of(weight.device), weight.dtype, gated, out_features, most)
            )
    return sorted(rows)


# --- primitives that need more than a kernel -------------------------------------------------------------------------


def linear(x: Tensor, weight: LinearWeight, generated: bool = False) -> Tensor:
    """x [num_tokens, in_features] times all parts of `weight` -> [num_tokens, sum of out_features], in x's dtype.

    Args:
        generated: whether the rows are generated tokens (see Batch), which may take a route of their own.
    """
    return _linear(x, weight, generated)


def _linear(x: Tensor, weight: LinearWeight, generated: bool, **epilogue: Any) -> Tensor:
    """The kernel of a weight and a role: nothing else may choose, least of all the number of rows."""
    if isinstance(weight.weight, PlanarInt4):
        by_extension = generated and weight.by_extension
        kernel = cuda_extension.int4_linear if by_extension else int4_kernel.int4_linear
        return kernel(x, weight.weight, **epilogue)
    return linear_kernel.linear(x, weight.weight, weight.bias, **epilogue)


def silu_mul(gate_up: Tensor, activation: str | Activation = "silu") -> Tensor:
    """activation(gate) * up in fp32, rounded once.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first.
        activation: a name of `ACTIVATIONS` or an elementwise function, which PyTorch runs.

    Returns:
        [num_tokens, intermediate_size] in gate_up's dtype.

    Source: SwiGLU, arXiv:2002.05202.
    """
    if isinstance(activation, str):
        return silu_mul_kernel(gate_up, activation)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (activation(gate) * up).to(gate_up.dtype)


# --- ops of the graph ------------------------------------------------------------------------------------------------


def norm_qkv_rope_cache(x: Tensor, norm: Norm, qkv: LinearWeight, batch: Batch, pages: LayerPages) -> Tensor:
    """RMSNorm, q/k/v projection, RoPE, cache write: x [num_tokens, hidden_size] -> q [num_tokens, heads, head_dim]."""
    packed = linear(rms_norm(x, norm.weight, norm.eps), qkv, batch.generated)
    num_kv_heads, head_dim = pages.k.shape[1], pages.k.shape[3]
    heads = packed.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    return rope_and_cache(q, k, v, batch, pages)


def linear_residual(x: Tensor, weight: LinearWeight, residual: Tensor, batch: Batch) -> Tensor:
    """residual + linear(x), the projection rounded before the add: [num_tokens, hidden_size]."""
    return _linear(x, weight, batch.generated, residual=residual)


def norm_gate_up_act(x: Tensor, norm: Norm, gate_up: LinearWeight, batch: Batch) -> Tensor:
    """RMSNorm, gate and up projection, activation(gate) * up -> [num_tokens, intermediate_size]."""
    normed = rms_norm(x, norm.weight, norm.eps)
    activation = gate_up.activation or "silu"
    if isinstance(activation, str):
        return _linear(normed, gate_up, batch.generated, activation=activation)
    return silu_mul(linear(normed, gate_up, batch.generated), activation)


def norm_lm_head(x: Tensor, norm: Norm, lm_head: LinearWeight) -> Tensor:
    """Final RMSNorm and LM head: x [num_tokens, hidden_size] -> logits [num_tokens, vocab_size], fp32."""
    normed = rms_norm(x, norm.weight, norm.eps)
    # Rows of both roles are alike here, and generated ones are most: their kernel serves both.
    return _linear(normed, lm_head, True, out_dtype=torch.float32)

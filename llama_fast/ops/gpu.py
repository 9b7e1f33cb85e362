"""The GPU backend: the Triton kernels, composed into the ops of the graph.

Prompt and generated tokens (`Batch.generated`) take an attention kernel each, in two runs of the graph, and where the
CUDA extension is in use (cuda_extension.py) a linear each; they share all others. On CPU tensors the kernels run in
Triton's interpreter, where TRITON_INTERPRET=1 was set before the start: slow, for tests and debugging.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llama_fast.errors import RequestError
from llama_fast.kernels import batch_checks, configs
from llama_fast.kernels import linear as linear_kernel
from llama_fast.kernels.advance import advance
from llama_fast.kernels.arguments import INTERPRETED
from llama_fast.kernels.attention import MAX_HEAD_DIM, attention, page_size_problem
from llama_fast.kernels.log_probs import log_probs
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.kernels.rope_and_cache import rope_and_cache
from llama_fast.kernels.sample import sample
from llama_fast.kernels.silu_mul import silu_mul as silu_mul_kernel
from llama_fast.ops import cuda_extension
from llama_fast.ops.activations import Activation
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
        parts: the checkpoint's parameters; their data are views of `weight` and `bias` where there are several.
        weight: [out_features, in_features], the parts' rows in their order.
        bias: [out_features] or None.
        activation: of gate and up.
        by_extension: whether generated rows go to the CUDA extension, however many; prompt rows never do.
    """

    parts: tuple[LinearPart, ...]
    weight: Tensor
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


def prepare_linear(parts: Sequence[nn.Linear], activation: str | Activation | None = None) -> LinearWeight:
    """Make one matrix of several projections of the same input (q, k, v; gate, up).

    The parts' parameters become views of it, so that the weights are in memory once.

    Args:
        parts: modules with `weight` [out_features, in_features] and `bias` [out_features] or None.
        activation: for gate and up: a name of `ACTIVATIONS` or an elementwise function.
    """
    weight = _joined([part.weight for part in parts])
    biases = [part.bias for part in parts]
    bias = None if biases[0] is None else _joined([bias for bias in biases if bias is not None])
    # A function of its own runs on what a plain linear gives.
    by_extension = cuda_extension.serves(weight, activation if isinstance(activation, str) else None)
    linear_parts = tuple(LinearPart(part.weight, part.bias) for part in parts)
    return LinearWeight(linear_parts, weight, bias, activation, by_extension)


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
    for weight in weights:
        gated = isinstance(weight.activation, str)
        out_features = weight.weight.shape[0] // (1 + gated)
        table = configs.table_of(weight.weight.device)
        rows |= set(configs.row_thresholds(table, weight.weight.dtype, gated, out_features, most))
    return sorted(rows)


# --- primitives that need more than a kernel -------------------------------------------------------------------------


def linear(x: Tensor, weight: LinearWeight, generated: bool = False) -> Tensor:
    """x [num_tokens, in_features] times all parts of `weight` -> [num_tokens, sum of out_features], in x's dtype.

    Args:
        generated: whether the rows are generated tokens (see Batch), which may take a route of their own.
    """
    return _linear_of(weight, generated)(x, weight.weight, weight.bias)


def _linear_of(weight: LinearWeight, generated: bool) -> Callable[..., Tensor]:
    """The kernel of a role: nothing else may choose, least of all the number of rows."""
    return cuda_extension.linear if generated and weight.by_extension else linear_kernel.linear


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
    return _linear_of(weight, batch.generated)(x, weight.weight, weight.bias, residual=residual)


def norm_gate_up_act(x: Tensor, norm: Norm, gate_up: LinearWeight, batch: Batch) -> Tensor:
    """RMSNorm, gate and up projection, activation(gate) * up -> [num_tokens, intermediate_size]."""
    normed = rms_norm(x, norm.weight, norm.eps)
    activation = gate_up.activation or "silu"
    if isinstance(activation, str):
        kernel = _linear_of(gate_up, batch.generated)
        return kernel(normed, gate_up.weight, gate_up.bias, activation=activation)
    return silu_mul(linear(normed, gate_up, batch.generated), activation)


def norm_lm_head(x: Tensor, norm: Norm, lm_head: LinearWeight) -> Tensor:
    """Final RMSNorm and LM head: x [num_tokens, hidden_size] -> logits [num_tokens, vocab_size], fp32."""
    normed = rms_norm(x, norm.weight, norm.eps)
    return linear_kernel.linear(normed, lm_head.weight, lm_head.bias, out_dtype=torch.float32)

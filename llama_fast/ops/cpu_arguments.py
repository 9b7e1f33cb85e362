"""What the native kernels refuse: they get addresses, so every dtype, shape, stride and place is checked before."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llama_fast.errors import KernelArgumentError

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

# In the order of csrc/cpu/calls.h.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def check(op: str, name: str, tensor: Tensor, dtype: torch.dtype, ndim: int) -> None:
    """Refuse what an address of `dtype` numbers in CPU memory cannot stand for.

    Raises:
        KernelArgumentError: dtype, number of dimensions or device, or a gradient is wanted.
    """
    if not (tensor.dtype is dtype and dtype in DTYPES):
        accepted = str(dtype) if dtype in DTYPES else ", ".join(map(str, DTYPES))
        raise KernelArgumentError(f"{op}: {name} has dtype {tensor.dtype}; accepted: {accepted}")
    if tensor.ndim != ndim:
        raise KernelArgumentError(f"{op}: {name} must have {ndim} dimensions; got shape {tuple(tensor.shape)}")
    if not tensor.is_cpu:
        raise KernelArgumentError(f"{op}: {name} is on {tensor.device}; the CPU kernels read CPU tensors")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise KernelArgumentError(f"{op}: {name} requires grad; kernels are inference-only, use backend='reference'")
    if tensor.is_neg():
        raise KernelArgumentError(f"{op}: {name} is a negated view of other memory; pass {name}.resolve_neg()")


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    # What nearly every call is given, found out with as little as a decoding step of a small model can afford.
    return tensor.dtype is dtype and tensor.is_cpu and not tensor.requires_grad and not tensor.is_neg()


def rows(op: str, name: str, tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """`tensor` [num_tokens, width] with contiguous columns; rows may be strided."""
    if _plain(tensor, dtype) and tensor.ndim == 2 and tensor.shape[1] == width and tensor.is_contiguous():
        return tensor
    check(op, name, tensor, dtype, 2)
    if tensor.shape[1] != width:
        raise KernelArgumentError(f"{op}: {name} must be [num_tokens, {width}]; got {tuple(tensor.shape)}")
    return tensor if width <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def norm_weight_of(op: str, weight: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """`weight` [width], contiguous."""
    if _plain(weight, dtype) and weight.shape == (width,) and weight.is_contiguous():
        return weight
    check(op, "norm weight", weight, dtype, 1)
    if weight.shape[0] != width:
        raise KernelArgumentError(f"{op}: norm weight must be [{width}]; got {tuple(weight.shape)}")
    return weight.contiguous()


def contiguous(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` without gaps; only floats are converted."""
    if _plain(tensor, dtype) and tensor.is_contiguous():
        return tensor
    if not tensor.is_cpu or (
        tensor.dtype is not dtype and not (tensor.is_floating_point() and dtype.is_floating_point)
    ):
        raise KernelArgumentError(f"{op}: {name} must be {dtype} on the CPU; got {tensor.dtype} on {tensor.device}")
    return tensor.to(dtype).contiguous().resolve_neg()


def heads(op: str, name: str, tensor: Tensor, dtype: torch.dtype, num_tokens: int, head_dim: int) -> Tensor:
    """`tensor` [num_tokens, heads, head_dim] with contiguous heads; rows may be strided."""
    if _plain(tensor, dtype) and tensor.shape[::2] == (num_tokens, head_dim) and tensor.is_contiguous():
        return tensor
    check(op, name, tensor, dtype, 3)
    if tensor.shape[0] != num_tokens or tensor.shape[2] != head_dim:
        raise KernelArgumentError(
            f"{op}: {name} must be [{num_tokens}, heads, {head_dim}], tokens of the batch and head_dim of the cache; "
            f"got {tuple(tensor.shape)}"
        )
    return tensor if tensor.stride()[1:] == (head_dim, 1) else tensor.contiguous()


def rotation(op: str, batch: Batch, num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The batch's cos and sin [num_tokens, rotary_dim] in fp32, contiguous; checked once a run."""
    kept = batch.kept.get("rotation")
    if kept is not None and kept[0] == head_dim:
        return kept[1]
    for name, tensor in (("cos", batch.cos), ("sin", batch.sin)):
        check(op, name, tensor, torch.float32, 2)
        rotary_dim = tensor.shape[1]
        if tensor.shape[0] != num_tokens or rotary_dim > head_dim or rotary_dim % 2 or tensor.shape != batch.cos.shape:
            raise KernelArgumentError(
                f"{op}: cos and sin must both be [{num_tokens}, an even number up to {head_dim}]; got "
                f"{tuple(batch.cos.shape)} and {tuple(batch.sin.shape)}"
            )
    tensors = batch.cos.contiguous(), batch.sin.contiguous()
    batch.kept["rotation"] = (head_dim, tensors)
    return tensors


def pages_of(module: ModuleType, op: str, pages: LayerPages, dtype: torch.dtype) -> tuple[Any, int, int]:
    """One layer's cache as the kernels take it, num_kv_heads and head_dim; checked once for all runs on this memory."""
    k, v = pages.k, pages.v
    key = (k.data_ptr(), v.data_ptr(), dtype)
    kept = pages.kept.get("cpu")
    if kept is not None and kept[0] == key and kept[1] is k and kept[2] is v:
        return kept[3]
    check(op, "the cache's k", k, dtype, 4)
    check(op, "the cache's v", v, dtype, 4)
    strides, (num_pages, num_kv_heads, page_size, head_dim) = k.stride(), k.shape
    if v.shape != k.shape or v.stride() != strides or strides[2:] != (head_dim, 1) or page_size < 1 or head_dim < 1:
        raise KernelArgumentError(
            f"{op}: k and v of the cache must be [num_pages, num_kv_heads, page_size, head_dim] in one layout with "
            f"contiguous slots; got {tuple(k.shape)} with strides {strides} and {tuple(v.shape)} with {v.stride()}"
        )
    sizes = (strides[0], strides[1], num_pages, num_kv_heads, page_size, head_dim)
    native = module.Pages(k.data_ptr(), v.data_ptr(), *sizes), num_kv_heads, head_dim
    pages.kept["cpu"] = (key, k, v, native)
    return native


def places_of(module: ModuleType, op: str, batch: Batch, pages: LayerPages) -> tuple[Any, int]:
    """The batch's places as the kernels take them and num_tokens; checked once a run, since every layer has them."""
    shape = pages.k.shape
    kept = batch.kept.get("places")
    if kept is not None and kept[0] == shape:
        return kept[1]
    num_tokens, num_seqs, max_pages = batch.slots.numel(), batch.seq_lens.numel(), batch.page_table.shape[-1:].numel()
    shapes = {
        "slots": (num_tokens,),
        "seq_ids": (num_tokens,),
        "query_starts": (num_seqs + 1,),
        "seq_lens": (num_seqs,),
        "page_table": (num_seqs, max_pages),
    }
    tensors = []
    for name, expected in shapes.items():
        tensor = getattr(batch, name)
        if tensor.dtype is not torch.int64 or not tensor.is_cpu or tensor.shape != expected:
            raise KernelArgumentError(
                f"{op}: {name} must be int64 {expected} on the CPU; got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
        tensors.append(tensor.contiguous())
    if len(shape) != 4 or shape[2] < 1:
        raise KernelArgumentError(
            f"{op}: the cache must be [num_pages, num_kv_heads, page_size, head_dim]; got {tuple(shape)}"
        )
    places = module.Places(num_tokens, num_seqs, max_pages, *(tensor.data_ptr() for tensor in tensors))
    problem = places.problem(shape[0], shape[2])
    if problem:
        raise KernelArgumentError(f"{op}: {problem}")
    # With the tensors, so that the addresses stay good.
    batch.kept["places"] = (shape, (places, num_tokens), tensors)
    return places, num_tokens

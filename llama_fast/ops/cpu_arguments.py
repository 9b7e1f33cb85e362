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
    if tensor.dtype is dtype and tensor.ndim == ndim and tensor.is_cpu and not tensor.requires_grad and dtype in DTYPES:
        return
    if tensor.dtype is not dtype or dtype not in DTYPES:
        accepted = str(dtype) if dtype in DTYPES else ", ".join(map(str, DTYPES))
        raise KernelArgumentError(f"{op}: {name} has dtype {tensor.dtype}; accepted: {accepted}")
    if tensor.ndim != ndim:
        raise KernelArgumentError(f"{op}: {name} must have {ndim} dimensions; got shape {tuple(tensor.shape)}")
    if not tensor.is_cpu:
        raise KernelArgumentError(f"{op}: {name} is on {tensor.device}; the CPU kernels read CPU tensors")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise KernelArgumentError(f"{op}: {name} requires grad; kernels are inference-only, use backend='reference'")


def rows(op: str, name: str, tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """`tensor` [num_tokens, width] with contiguous columns; rows may be strided."""
    check(op, name, tensor, dtype, 2)
    if tensor.shape[1] != width:
        raise KernelArgumentError(f"{op}: {name} must be [num_tokens, {width}]; got {tuple(tensor.shape)}")
    return tensor if width <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def norm_weight_of(op: str, weight: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """`weight` [width], contiguous."""
    check(op, "norm weight", weight, dtype, 1)
    if weight.shape[0] != width:
        raise KernelArgumentError(f"{op}: norm weight must be [{width}]; got {tuple(weight.shape)}")
    return weight.contiguous()


def contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` without gaps."""
    return tensor if tensor.dtype is dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def heads(op: str, name: str, tensor: Tensor, dtype: torch.dtype, num_tokens: int, head_dim: int) -> Tensor:
    """`tensor` [num_tokens, heads, head_dim] with contiguous heads; rows may be strided."""
    check(op, name, tensor, dtype, 3)
    if tensor.shape[0] != num_tokens or tensor.shape[2] != head_dim:
        raise KernelArgumentError(
            f"{op}: {name} must be [{num_tokens}, heads, {head_dim}], tokens of the batch and head_dim of the cache; "
            f"got {tuple(tensor.shape)}"
        )
    return tensor if tensor.stride()[1:] == (head_dim, 1) else tensor.contiguous()


def rotation(op: str, batch: Batch, num_tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [num_tokens, rotary_dim] in fp32, contiguous; checked once a run."""
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


def pages_of(module: ModuleType, op: str, pages: LayerPages, dtype: torch.dtype) -> Any:
    """One layer's cache as the kernels take it; checked once for all runs on the same tensors."""
    k, v = pages.k, pages.v
    kept = pages.kept.get("cpu")
    if kept is not None and kept[0] is k and kept[1] is v and kept[2] is dtype:
        return kept[3]
    check(op, "the cache's k", k, dtype, 4)
    check(op, "the cache's v", v, dtype, 4)
    strides, (num_pages, num_kv_heads, page_size, head_dim) = k.stride(), k.shape
    if v.shape != k.shape or v.stride() != strides or strides[2:] != (head_dim, 1):
        raise KernelArgumentError(
            f"{op}: k and v of the cache must have one layout and contiguous slots; got {tuple(k.shape)} with strides "
            f"{strides} and {tuple(v.shape)} with strides {v.stride()}"
        )
    sizes = (strides[0], strides[1], num_pages, num_kv_heads, page_size, head_dim)
    native = module.Pages(k.data_ptr(), v.data_ptr(), *sizes)
    pages.kept["cpu"] = (k, v, dtype, native)
    return native


def places_of(module: ModuleType, op: str, batch: Batch, pages: LayerPages) -> Any:
    """The batch's places as the kernels take them; checked once a run, since every layer has them."""
    kept = batch.kept.get("places")
    if kept is not None and kept[0] == pages.k.shape:
        return kept[1]
    num_tokens, num_seqs, max_pages = batch.slots.shape[0], batch.seq_lens.shape[0], batch.page_table.shape[-1]
    shapes = {
        "slots": (num_tokens,),
        "seq_ids": (num_tokens,),
        "query_starts": (num_seqs + 1,),
        "seq_lens": (num_seqs,),
        "page_table": (num_seqs, max_pages),
    }
    tensors = []
    for name, shape in shapes.items():
        tensor = getattr(batch, name)
        if tensor.dtype is not torch.int64 or not tensor.is_cpu or tensor.shape != shape:
            raise KernelArgumentError(
                f"{op}: {name} must be int64 {shape} on the CPU; got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
        tensors.append(tensor.contiguous())
    places = module.Places(num_tokens, num_seqs, max_pages, *(tensor.data_ptr() for tensor in tensors))
    problem = places.problem(pages.k.shape[0], pages.page_size)
    if problem:
        raise KernelArgumentError(f"{op}: {problem}")
    # With the tensors, so that the addresses stay good.
    batch.kept["places"] = (pages.k.shape, places, tensors)
    return places

"""F: tensors that the native CPU kernels must not get, and machines where they cannot run.

The kernels read addresses: what is not refused here reads or writes somewhere. F08 and F13's guard bytes stand in
tests/ops/test_cpu_accuracy.py and test_cpu_sample.py, what needs a process of its own in tests/ops/test_native.py.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from llama_fast import _C, ops
from llama_fast.errors import BackendError, KernelArgumentError
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import cpu, reference
from llama_fast.ops.int4 import Int4Linear
from llama_fast.ops.native import ISA_VARIABLE, native
from llama_fast.ops.reference_sample import SamplingBatch
from tests.bad_inputs.harness import check, refused
from tests.ops.cpu_cases import projection

HEADS, KV_HEADS, HEAD_DIM, PAGE, NUM_PAGES = 4, 2, 16, 16, 6
HIDDEN, OUTS, VOCAB = 32, 8, 50
LENGTHS, STARTS = (3, 2), (14, 0)  # one sequence crosses a page
NUM_TOKENS = sum(LENGTHS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch(**changes: Any) -> Batch:
    fields: dict[str, Any] = {
        "slots": torch.tensor([14, 15, 16, 0, 1]),
        "seq_ids": torch.tensor([0, 0, 0, 1, 1]),
        "query_starts": torch.tensor([0, 3, 5]),
        "seq_lens": torch.tensor([17, 2]),
        "page_table": torch.tensor([[4, 1], [2, 0]]),
        "cos": normal(NUM_TOKENS, HEAD_DIM),
        "sin": normal(NUM_TOKENS, HEAD_DIM),
        "split_size": 32,
    }
    return Batch(ops=cpu, token_ids=torch.zeros(NUM_TOKENS, dtype=torch.int64), **{**fields, **changes})


ANY = batch()


def pages() -> LayerPages:
    shape = (NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM)
    return LayerPages(normal(*shape), normal(*shape).flip(0))


def sampling(**changes: Any) -> SamplingBatch:
    rows = 2
    floats = {name: torch.ones(rows) for name in ("temperature", "top_p", "repetition_penalty")}
    floats |= {name: torch.zeros(rows) for name in ("min_p", "frequency_penalty", "presence_penalty")}
    int32 = {name: torch.zeros(rows, dtype=torch.int32) for name in ("top_k", "sample_index")}
    int64 = {name: torch.arange(rows) for name in ("seeds", "position")}
    tables = {
        "prompt_mask": torch.zeros(rows, VOCAB, dtype=torch.bool),
        "output_counts": torch.zeros(rows, VOCAB, dtype=torch.int32),
        "bias": torch.zeros(rows, VOCAB),
    }
    return SamplingBatch(**{**floats, **int32, **int64, **tables, **changes})


def norm_of(weight: Tensor) -> Any:
    return SimpleNamespace(weight=weight, eps=1e-5)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cpu.linear(x, cpu.prepare_linear([projection(weight, bias)]))


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return cpu.linear_residual(x, cpu.prepare_linear([projection(weight)]), residual, ANY)


def norm_gate_up_act(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    gate_up = cpu.prepare_linear([projection(gate), projection(up)], "silu")
    return cpu.norm_gate_up_act(x, norm_of(norm), gate_up, ANY)


def norm_lm_head(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    return cpu.norm_lm_head(x, norm_of(norm), cpu.prepare_linear([projection(weight)]))


def norm_qkv_rope_cache(x: Tensor, norm: Tensor, weight: Tensor, batch: Batch, pages: LayerPages) -> Tensor:
    sizes = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    parts = [projection(part) for part in (weight.split(sizes) if weight.shape == (sum(sizes), HIDDEN) else [weight])]
    return cpu.norm_qkv_rope_cache(x, norm_of(norm), cpu.prepare_linear(parts), batch, pages)


@dataclass(frozen=True)
class Op:
    """An op, its legal arguments, and the names of those that are floating-point tensors of one dtype."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    tensors: tuple[str, ...]


def all_ops() -> dict[str, Op]:
    x, norm = normal(NUM_TOKENS, HIDDEN), normal(HIDDEN)
    q, k = normal(NUM_TOKENS, HEADS, HEAD_DIM), normal(NUM_TOKENS, KV_HEADS, HEAD_DIM)
    weight, place = normal(OUTS, HIDDEN), {"batch": batch(), "pages": pages()}
    qkv = normal((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
    return {
        "rms_norm": Op(cpu.rms_norm, {"x": x, "weight": norm, "eps": 1e-5}, ("x", "weight")),
        "silu_mul": Op(cpu.silu_mul, {"gate_up": normal(3, 64)}, ("gate_up",)),
        "linear": Op(linear, {"x": x, "weight": weight, "bias": normal(OUTS)}, ("x", "weight", "bias")),
        "linear_residual": Op(
            linear_residual,
            {"x": x, "weight": weight, "residual": normal(NUM_TOKENS, OUTS)},
            ("x", "weight", "residual"),
        ),
        "norm_gate_up_act": Op(
            norm_gate_up_act,
            {"x": x, "norm": norm, "gate": weight, "up": weight.flip(0)},
            ("x", "norm", "gate", "up"),
        ),
        "norm_lm_head": Op(norm_lm_head, {"x": x, "norm": norm, "weight": weight}, ("x", "norm", "weight")),
        "norm_qkv_rope_cache": Op(
            norm_qkv_rope_cache, {"x": x, "norm": norm, "weight": qkv, **place}, ("x", "norm", "weight")
        ),
        "rope_and_cache": Op(cpu.rope_and_cache, {"q": q, "k": k, "v": k.flip(0), **place}, ("q", "k", "v")),
        "attention": Op(cpu.attention, {"q": q, **place}, ("q",)),
        "sample": Op(cpu.sample, {"logits": normal(2, VOCAB), "batch": sampling()}, ("logits",)),
        "log_probs": Op(
            cpu.log_probs, {"logits": normal(2, VOCAB), "token_ids": torch.tensor([1, 2]), "num_top": 3}, ("logits",)
        ),
    }


PAGED = ("norm_qkv_rope_cache", "rope_and_cache", "attention")
LOGITS = ("sample", "log_probs")  # any floating-point dtype, as the reference


def call(name: str, **changes: Any) -> Any:
    """The op's result on fresh legal arguments with some of them changed."""
    op = all_ops()[name]
    return op.call(**{**op.arguments, **changes})


def refuse_call(name: str, *needles: str, **changes: Any) -> None:
    """The changed arguments are refused, and nothing is written into the cache."""
    cache, before = changes.get("pages", pages()), pages()
    if name in PAGED:
        changes["pages"] = cache
    refused(KernelArgumentError, partial(call, name, **changes), *needles)
    for tensor, untouched in ((cache.k, before.k), (cache.v, before.v)):
        if (tensor.shape, tensor.dtype, tensor.device) == (untouched.shape, untouched.dtype, untouched.device):
            check(torch.equal(tensor, untouched), f"{name} wrote into the cache")


def each_tensor() -> list[tuple[str, str, Tensor]]:
    return [(name, argument, op.arguments[argument]) for name, op in all_ops().items() for argument in op.tensors]


def F01_native_dtypes(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        for dtype in (torch.int32, torch.bool, torch.complex64):
            refuse_call(name, **{argument: tensor.to(dtype)})
        if name not in LOGITS:
            refuse_call(name, "torch.float64", **{argument: tensor.double()})
        if name not in (*LOGITS, "silu_mul"):  # these take one tensor of any of them
            refuse_call(name, "torch.float16", **{argument: tensor.half()})
    for name in PAGED:
        cache = pages()
        for broken in (LayerPages(cache.k.half(), cache.v.half()), LayerPages(cache.k, cache.v.double())):
            refuse_call(name, name, "cache", pages=broken)


def F01_native_indices_of_another_width(_: Path) -> None:
    for name in PAGED:
        for field in ("slots", "seq_ids", "query_starts", "seq_lens", "page_table"):
            for dtype in (torch.int32, torch.float32, torch.bool):
                refuse_call(name, field, "int64", batch=batch(**{field: getattr(batch(), field).to(dtype)}))
        if name != "attention":
            for field in ("cos", "sin"):
                for dtype in (torch.float64, torch.float16, torch.bfloat16):
                    refuse_call(name, field, "float32", batch=batch(**{field: getattr(batch(), field).to(dtype)}))
    for dtype in (torch.int32, torch.float32, torch.bool):
        refuse_call("log_probs", "token_ids", "int64", token_ids=torch.zeros(2, dtype=dtype))
    good = sampling()
    for field in ("seeds", "position", "top_k", "sample_index", "output_counts", "prompt_mask"):
        refuse_call("sample", field, batch=replace(good, **{field: getattr(good, field).float()}))


def F02_native_shapes_of_linear(_: Path) -> None:
    refuse_call("rms_norm", weight=normal(HIDDEN - 1))
    refuse_call("silu_mul", "even", gate_up=normal(3, 63))
    refuse_call("linear", weight=normal(OUTS, HIDDEN - 1))
    refuse_call("linear", "bias", bias=normal(OUTS - 1))
    for rows, outs in ((NUM_TOKENS - 1, OUTS), (NUM_TOKENS, OUTS + 1), (1, OUTS), (NUM_TOKENS, 1)):
        refuse_call("linear_residual", "residual", residual=normal(rows, outs))
    for name in ("norm_gate_up_act", "norm_lm_head", "norm_qkv_rope_cache"):
        refuse_call(name, "norm weight", norm=normal(HIDDEN + 1))
    two = [projection(normal(OUTS, HIDDEN)), projection(normal(OUTS, HIDDEN - 1))]
    refused(KernelArgumentError, lambda: cpu.prepare_linear(two), "one input")


def quantized(outs: int = OUTS, ins: int = 64, group_size: int = 32, **changes: Any) -> Int4Linear:
    """A projection of 4-bit integers with some parameters in another's place."""
    module = Int4Linear(ins, outs, group_size=group_size, symmetric=False, bias=True)
    generator = torch.Generator().manual_seed(outs)
    fields: dict[str, Any] = {
        "weight_packed": torch.randint(-(2**31), 2**31, (outs, ins // 8), dtype=torch.int32, generator=generator),
        "weight_scale": normal(outs, ins // group_size),
        "weight_zero_point": torch.full((outs, ins // group_size), 7, dtype=torch.uint8),
        "bias": normal(outs),
    }
    for name, tensor in {**fields, **changes}.items():
        setattr(module, name, None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False))
    return module


def refuse_int4(*needles: str, beside: tuple[Any, ...] = (), **changes: Any) -> None:
    parts = [*beside, quantized(**changes)]
    refused(KernelArgumentError, lambda: cpu.prepare_linear(parts), "prepare_linear", *needles)


def F01_native_int4_dtypes(_: Path) -> None:
    good = quantized()
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bool):
        refuse_int4("weight_packed", "torch.int32", weight_packed=good.weight_packed.to(dtype))
    for dtype in (torch.float64, torch.int32, torch.complex64, torch.bool):
        refuse_int4("weight_scale", str(dtype), weight_scale=good.weight_scale.to(dtype))
    for dtype in (torch.int8, torch.int32, torch.float32):
        refuse_int4("weight_zero_point", "torch.uint8", weight_zero_point=good.weight_zero_point.to(dtype))
    refuse_int4("bias", "torch.float16", bias=good.bias.half())
    refuse_int4("weight_scale", "torch.float16", beside=(good,), weight_scale=good.weight_scale.half(), bias=None)
    refused(KernelArgumentError, lambda: cpu.linear(normal(3, 64).half(), cpu.prepare_linear([good])), "torch.float16")


def F02_native_int4_shapes(_: Path) -> None:
    good = quantized()
    for name in ("weight_packed", "weight_scale", "weight_zero_point"):
        tensor = getattr(good, name)
        for bad in (tensor[:-1], tensor[:, :-1], tensor[None], tensor[0], torch.cat((tensor, tensor), 1), tensor[:0]):
            refuse_int4(name, "(8, 64)", **{name: bad})
    for bad in (good.bias[:-1], good.bias[None]):
        refuse_int4("bias", bias=bad)
    refuse_int4("one input", beside=(good,), ins=96)
    refuse_int4("groups of 64 beside 32", beside=(good,), group_size=64)
    odd = quantized()
    odd.group_size = 16
    refused(KernelArgumentError, lambda: cpu.prepare_linear([odd]), "groups of 16", "32, 64, 128")
    for dense in ((good, projection(normal(OUTS, 64))), (projection(normal(OUTS, 64)), good)):
        refused(KernelArgumentError, lambda dense=dense: cpu.prepare_linear(dense), "1 of 2 parts are quantized")
    refused(KernelArgumentError, lambda: cpu.linear(normal(3, 96), cpu.prepare_linear([good])), "64")


def F03_native_int4_meta(_: Path) -> None:
    good = quantized()
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "bias"):
        refuse_int4("meta", **{name: getattr(good, name).to("meta")})


def F06_native_int4_nothing(_: Path) -> None:
    """No tokens, no outputs."""
    for outs, rows in ((OUTS, 0), (0, 3), (0, 0)):
        got = cpu.linear(normal(rows, 64), cpu.prepare_linear([quantized(outs)]))
        check(got.shape == (rows, outs), f"{tuple(got.shape)}")


def F10_native_int4_zeros(_: Path) -> None:
    """A zero is a place in a table."""
    for value in (17, 255):
        zeros = torch.full((OUTS, 2), 7, dtype=torch.uint8)
        zeros[-1, -1] = value
        refuse_int4("weight_zero_point", str(value), "0 to 16", weight_zero_point=zeros)
    weight = cpu.prepare_linear([changed := quantized()])
    changed.weight_zero_point.data.fill_(255)  # behind the kernel's back: a wrong result, but not another's memory
    check(cpu.linear(normal(3, 64), weight).isfinite().all().item(), "not finite")


def F02_native_gate_and_up(_: Path) -> None:
    """They are multiplied with each other: halves of whatever the parts give together, or a refusal."""
    x, norm = normal(NUM_TOKENS, HIDDEN), norm_of(normal(HIDDEN))
    for heights in ((OUTS, OUTS), (OUTS, OUTS - 2), (2, OUTS), (2 * OUTS,), (OUTS, OUTS, OUTS), (0, OUTS)):
        parts = [projection(normal(height, HIDDEN)) for height in heights]
        got, plain = (
            ops.norm_gate_up_act(x, norm, ops.prepare_linear(parts, "silu"), batch()) for ops in (cpu, reference)
        )
        check(got.shape == (NUM_TOKENS, sum(heights) // 2), f"{heights}: {tuple(got.shape)}")
        check(torch.allclose(got, plain, rtol=1e-4, atol=1e-4), f"{heights}: not the reference's")
    odd = cpu.prepare_linear([projection(normal(height, HIDDEN)) for height in (OUTS, OUTS - 1)], "silu")
    refused(KernelArgumentError, lambda: cpu.norm_gate_up_act(x, norm, odd, batch()), "even")


def F02_native_ranks(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        refuse_call(name, **{argument: tensor.flatten() if tensor.ndim > 1 else tensor[None]})
        refuse_call(name, **{argument: tensor[None]})
        refuse_call(name, **{argument: tensor.flatten()[0]})


def F02_native_shapes_of_attention(_: Path) -> None:
    refuse_call("rope_and_cache", k=normal(NUM_TOKENS, KV_HEADS, HEAD_DIM - 2))
    refuse_call("rope_and_cache", k=normal(NUM_TOKENS, KV_HEADS + 1, HEAD_DIM))
    refuse_call("rope_and_cache", v=normal(NUM_TOKENS, 1, HEAD_DIM))
    refuse_call("rope_and_cache", q=normal(NUM_TOKENS + 1, HEADS, HEAD_DIM))
    refuse_call("attention", q=normal(NUM_TOKENS, 3, HEAD_DIM))  # 2 KV heads do not divide 3
    refuse_call("attention", q=normal(NUM_TOKENS, HEADS, 2 * HEAD_DIM))
    refuse_call("attention", q=normal(NUM_TOKENS - 1, HEADS, HEAD_DIM))
    for size in (31, 24, 8, 0, -32, -16):
        refuse_call("attention", f"split_size={size}", batch=batch(split_size=size))
    for rows, width in ((NUM_TOKENS, HEAD_DIM + 2), (NUM_TOKENS, 7), (NUM_TOKENS - 1, HEAD_DIM), (1, HEAD_DIM)):
        for field in ("cos", "sin"):
            refuse_call("rope_and_cache", field, batch=batch(**{field: normal(rows, width)}))
    refuse_call("rope_and_cache", "cos", batch=batch(cos=normal(NUM_TOKENS, 8)))
    heads = normal((HEADS + 2 * KV_HEADS) * HEAD_DIM + 8, HIDDEN)
    for weight in (heads, heads[: KV_HEADS * HEAD_DIM]):
        refuse_call("norm_qkv_rope_cache", weight=weight)


def F02_native_caches(_: Path) -> None:
    cache = pages()
    broken = {
        "three dimensions": LayerPages(cache.k[0], cache.v[0]),
        "five dimensions": LayerPages(cache.k[None], cache.v[None]),
        "v is smaller": LayerPages(cache.k, cache.v[:-1]),
        "v has fewer heads": LayerPages(cache.k, cache.v[:, :1]),
        "v has shorter pages": LayerPages(cache.k, cache.v[:, :, :8]),
        "no slots": LayerPages(cache.k[:, :, :0], cache.v[:, :, :0]),
        "no heads": LayerPages(cache.k[:, :0], cache.v[:, :0]),
        "no pages": LayerPages(cache.k[:0], cache.v[:0]),
        "no numbers": LayerPages(cache.k[..., :0], cache.v[..., :0]),
        "slots apart": LayerPages(*(x.repeat_interleave(2, 2)[:, :, ::2] for x in (cache.k, cache.v))),
        "numbers apart": LayerPages(*(x.repeat_interleave(2, 3)[..., ::2] for x in (cache.k, cache.v))),
        "heads inside": LayerPages(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.k, cache.v))),
        "two layouts": LayerPages(cache.k, cache.v.transpose(0, 1).contiguous().transpose(0, 1)),
    }
    for what, cache in broken.items():
        for name in PAGED:
            if (what, name) != ("no heads", "norm_qkv_rope_cache"):  # then all outputs are queries
                refuse_call(name, pages=cache)


def F02_native_shapes_of_places(_: Path) -> None:
    good = batch()
    for name in PAGED:
        for field in ("slots", "seq_ids", "query_starts", "seq_lens", "page_table"):
            tensor = getattr(good, field)
            for bad in (tensor[:-1], tensor[None], tensor.flatten()[0], torch.cat((tensor, tensor[-1:]))):
                refuse_call(name, batch=batch(**{field: bad}))
        refuse_call(name, "page_table", batch=batch(page_table=good.page_table[:, :1]))
        refuse_call(name, "page_table", batch=batch(page_table=good.page_table[:, :0]))


def F02_native_shapes_of_sampling(_: Path) -> None:
    good = sampling()
    for shape in ((3, VOCAB), (2, VOCAB + 1), (2, 0)):
        refuse_call("sample", logits=normal(*shape))
    for name, tensor in vars(good).items():
        for bad in (tensor[:1], tensor[None], tensor.flatten()[0], torch.cat((tensor, tensor))):
            refuse_call("sample", name, batch=replace(good, **{name: bad}))
    for shape in ((3,), (1,), (2, 1), ()):
        refuse_call("log_probs", "token_ids", token_ids=torch.zeros(shape, dtype=torch.int64))
    refuse_call("log_probs", logits=normal(2, 0))
    refuse_call("log_probs", "num_top", num_top=-1)


def F03_native_meta_tensors_and_gradients(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        refuse_call(name, **{argument: tensor.to("meta")})
        leaf = tensor.clone().requires_grad_()
        # prepare_linear detaches its weights, and nothing is differentiated through a draw.
        if argument in ("x", "q", "k", "v", "residual", "gate_up"):
            refuse_call(name, "requires grad", **{argument: leaf})
        with torch.no_grad():
            call(name, **{argument: leaf})


def F03_native_gradients_of_weights(_: Path) -> None:
    """A weight that is being trained: its gradient would be lost."""
    x, norm = normal(NUM_TOKENS, HIDDEN), norm_of(normal(HIDDEN))
    for trained in ("weight", "bias"):
        part = projection(normal(OUTS, HIDDEN), normal(OUTS))
        getattr(part, trained).requires_grad_()
        weight, both = cpu.prepare_linear([part]), cpu.prepare_linear([part, part])
        calls = {
            "linear": lambda weight=weight: cpu.linear(x, weight),
            "linear_residual": lambda weight=weight: cpu.linear_residual(x, weight, normal(NUM_TOKENS, OUTS), batch()),
            "norm_lm_head": lambda weight=weight: cpu.norm_lm_head(x, norm, weight),
            "norm_gate_up_act": lambda both=both: cpu.norm_gate_up_act(x, norm, both, batch()),
        }
        for name, one in calls.items():
            refused(KernelArgumentError, one, name, "requires grad", "backend='reference'")
            with torch.no_grad():
                one()


def F03_native_default_device(_: Path) -> None:
    """Outputs lie in this memory, wherever new tensors lie otherwise."""
    for name in all_ops():
        op, expected = all_ops()[name], _tuple(call(name))
        with torch.device("meta"):
            got = _tuple(op.call(**op.arguments))
        check(all(map(torch.equal, got, expected)), f"{name} follows the default device")


def F03_native_meta_places(_: Path) -> None:
    for name in PAGED:
        cache = pages()
        for broken in (LayerPages(cache.k.to("meta"), cache.v), LayerPages(cache.k, cache.v.to("meta"))):
            refuse_call(name, "meta", pages=broken)
        for field in ("slots", "seq_ids", "query_starts", "seq_lens", "page_table"):
            refuse_call(name, field, "meta", batch=batch(**{field: getattr(batch(), field).to("meta")}))
        if name != "attention":
            for field in ("cos", "sin"):
                refuse_call(name, field, "meta", batch=batch(**{field: getattr(batch(), field).to("meta")}))


def F03_native_meta_fields_of_sampling(_: Path) -> None:
    good = sampling()
    for name, tensor in vars(good).items():
        refuse_call("sample", name, "meta", batch=replace(good, **{name: tensor.to("meta")}))
    refuse_call("log_probs", "token_ids", "meta", token_ids=torch.zeros(2, dtype=torch.int64, device="meta"))


def _same_or_refused(name: str, argument: str, view: Tensor) -> None:
    """A view with the argument's values gives the argument's bits, or is refused."""
    expected = call(name)
    try:
        got = call(name, **{argument: view})
    except KernelArgumentError as error:
        check("contiguous" in str(error) or "negated" in str(error), f"{name}, {argument}: {error}")
        return
    for one, other in zip(_tuple(got), _tuple(expected), strict=True):
        check(torch.equal(one, other), f"{name}: another layout of {argument} gives other bits")


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _apart(tensor: Tensor) -> Tensor:
    """The same numbers, the last dimension strided, NaN between them."""
    floating = tensor.is_floating_point()
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan if floating else 7)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def F04_native_layouts(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        rows = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), torch.nan)
        rows[::2] = tensor
        views = [_apart(tensor), rows[::2]]
        views += [tensor.transpose(0, 1).contiguous().transpose(0, 1)] if tensor.ndim > 1 else []
        for view in views:
            _same_or_refused(name, argument, view)
    for name in PAGED:
        good = batch()
        fields = ("slots", "seq_ids", "query_starts", "seq_lens", "page_table", "cos", "sin")
        moved = {field: _apart(getattr(good, field)) for field in fields}
        check(torch.equal(call(name, batch=batch(**moved)), call(name)), f"{name}: strided places give other bits")
    fields = {name: _apart(tensor) for name, tensor in vars(sampling()).items()}
    check(torch.equal(call("sample", batch=SamplingBatch(**fields)), call("sample")), "strided fields")


def F04_native_negated_views(_: Path) -> None:
    """Tensors whose sign is a note beside their memory, as the imaginary part of a conjugate."""
    for name, argument, tensor in each_tensor():
        view = torch._neg_view(-tensor)
        check(view.is_neg() and torch.equal(view, tensor), "not a negated view")
        _same_or_refused(name, argument, view)


def F04_native_one_row_for_all(_: Path) -> None:
    """Stride 0."""
    for name, argument in (("rms_norm", "x"), ("linear", "x"), ("norm_lm_head", "x"), ("linear_residual", "residual")):
        one = all_ops()[name].arguments[argument][:1].expand(NUM_TOKENS, -1)
        check(torch.equal(call(name, **{argument: one}), call(name, **{argument: one.clone()})), name)
    flat = normal(1).expand(NUM_TOKENS, HIDDEN)
    check(torch.equal(call("linear", x=flat), call("linear", x=flat.clone())), "both strides 0")


def F05_native_addresses(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        for offset in (1, 2, 3, 5):
            storage = torch.full((tensor.numel() + offset,), torch.nan)
            view = storage[offset:].view(tensor.shape)
            view.copy_(tensor)
            _same_or_refused(name, argument, view)


def F06_native_nothing(_: Path) -> None:
    for name, width in (("rms_norm", HIDDEN), ("linear", OUTS), ("norm_gate_up_act", OUTS), ("norm_lm_head", OUTS)):
        check(call(name, x=normal(0, HIDDEN)).shape == (0, width), f"{name}, no tokens")
    none = {"x": normal(0, HIDDEN), "residual": normal(0, OUTS)}
    check(call("linear_residual", **none).shape == (0, OUTS), "linear_residual, no tokens")
    check(call("silu_mul", gate_up=normal(0, 64)).shape == (0, 32), "silu_mul, no tokens")
    check(call("silu_mul", gate_up=normal(3, 0)).shape == (3, 0), "silu_mul, no width")
    check(call("rms_norm", x=normal(3, 0), weight=normal(0)).shape == (3, 0), "rms_norm, no width")
    check(call("linear", weight=normal(0, HIDDEN), bias=normal(0)).shape == (NUM_TOKENS, 0), "linear, no outputs")
    bias = normal(OUTS)
    without_inputs = call("linear", x=normal(3, 0), weight=normal(OUTS, 0), bias=bias)
    check(torch.equal(without_inputs, bias.expand(3, -1)), "linear, no inputs: the empty sum and its bias")
    for num_seqs in (0, 2):
        empty = batch(
            slots=torch.zeros(0, dtype=torch.int64),
            seq_ids=torch.zeros(0, dtype=torch.int64),
            query_starts=torch.zeros(num_seqs + 1, dtype=torch.int64),
            seq_lens=torch.zeros(num_seqs, dtype=torch.int64),
            page_table=torch.zeros(num_seqs, 2, dtype=torch.int64),
            cos=normal(0, HEAD_DIM),
            sin=normal(0, HEAD_DIM),
        )
        before, cache = pages(), pages()
        q, k = normal(0, HEADS, HEAD_DIM), normal(0, KV_HEADS, HEAD_DIM)
        check(cpu.rope_and_cache(q, k, k, empty, cache).shape == q.shape, "rope_and_cache")
        check(cpu.attention(q, cache, empty).shape == (0, HEADS * HEAD_DIM), "attention")
        got = call("norm_qkv_rope_cache", x=normal(0, HIDDEN), batch=empty, pages=cache)
        check(got.shape == q.shape, "norm_qkv_rope_cache")
        check(torch.equal(cache.k, before.k) and torch.equal(cache.v, before.v), "a page was written")
    none = SamplingBatch(**{name: value[:0] for name, value in vars(sampling()).items()})
    check(cpu.sample(normal(0, VOCAB), none).shape == (0,), "sample")
    shapes = [result.shape for result in cpu.log_probs(normal(0, VOCAB), torch.zeros(0, dtype=torch.int64), 3)]
    check(shapes == [(0,), (0,), (0, 3), (0, 3)], f"log_probs: {shapes}")
    check(call("log_probs", num_top=0)[2].shape == (2, 0), "log_probs, nothing at the top")


def F06_native_no_heads(_: Path) -> None:
    q = normal(NUM_TOKENS, 0, HEAD_DIM)
    check(call("attention", q=q).shape == (NUM_TOKENS, 0), "attention without heads")
    check(call("rope_and_cache", q=q).shape == q.shape, "rope_and_cache without query heads")


def F07_native_odd_sizes(_: Path) -> None:
    """Within a few roundings of fp64, as round sizes are."""
    for size in (1, 2, 3, 31, 33, 111, 127, 129, 989, 8191):
        x, weight, norm, bias = normal(3, size), normal(5, size), normal(size), torch.zeros(5)
        bound = 4 * size**0.5 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T) + 1e-30
        check(((linear(x, weight, bias) - x.double() @ weight.double().T).abs() <= bound).all(), f"linear, {size}")
        exact = reference.rms_norm(x.double(), norm.double(), 1e-5)
        check(((cpu.rms_norm(x, norm, 1e-5) - exact).abs() <= 8 * 2.0**-24 * exact.abs() + 1e-7).all(), f"norm, {size}")
        both = torch.cat((x, x), 1)
        exact = reference.silu_mul(both.double())
        check(((cpu.silu_mul(both) - exact).abs() <= 8 * 2.0**-24 * exact.abs() + 1e-7).all(), f"silu_mul, {size}")
        logits = normal(2, size)
        greedy = {name: value for name, value in vars(sampling(temperature=torch.zeros(2))).items() if value.ndim == 1}
        check(torch.equal(cpu.sample(logits, SamplingBatch(**greedy)), logits.argmax(-1)), f"sample, {size}")


def F10_native_indices_out_of_range(_: Path) -> None:
    good = batch()
    changes = {
        "slots": [good.slots.index_fill(0, torch.tensor(2), value) for value in (-1, 17, 32, 2**62, -(2**63))],
        "page_table": [good.page_table.masked_fill(good.page_table == 4, bad) for bad in (-1, NUM_PAGES, 2**62)],
        "seq_lens": [good.seq_lens - 1, good.seq_lens - 100, torch.zeros_like(good.seq_lens)],
        "seq_ids": [good.seq_ids + 1, good.seq_ids - 1, good.seq_ids.flip(0), torch.full_like(good.seq_ids, 2**62)],
    }
    for name in PAGED:
        for field, values in changes.items():
            for value in values:
                refuse_call(name, field if field != "seq_lens" else "slots", batch=batch(**{field: value}))
        falling = batch(slots=torch.tensor([14, 16, 15, 0, 1]))
        refuse_call(name, "slots of a sequence must rise", batch=falling)
        refuse_call(name, "slots", batch=batch(slots=torch.tensor([14, 14, 15, 0, 1])))
    # What a sequence does not use may hold anything.
    unused = batch(page_table=torch.tensor([[4, 1, -7], [2, 2**62, 99]]))
    check(torch.equal(call("attention", batch=unused), call("attention")), "an entry that nobody uses was read")


def F10_native_changed_places(_: Path) -> None:
    """A batch made from another by a change is looked at anew: the check is kept for a batch's layers only."""
    for name in PAGED:
        op = all_ops()[name]
        used = op.arguments["batch"]
        op.call(**op.arguments)
        changed = replace(used, page_table=torch.tensor([[5, 3], [2, 0]]))
        got, cache = op.call(**{**op.arguments, "batch": changed, "pages": pages()}), pages()
        fresh = all_ops()[name]
        expected = fresh.call(**{**fresh.arguments, "batch": batch(page_table=changed.page_table), "pages": cache})
        check(torch.equal(got, expected), f"{name}: a changed batch went by its old places")
        bad = replace(used, page_table=torch.full((2, 2), NUM_PAGES))
        refuse_call(name, "page_table", batch=bad)


def F10_native_tokens_outside_the_vocabulary(_: Path) -> None:
    for token_id in (-1, VOCAB, 2**31, 2**62, -(2**63)):
        refuse_call("log_probs", "token_ids", token_ids=torch.tensor([1, token_id]))


def F11_native_cumulative_lengths(_: Path) -> None:
    for name in PAGED:
        for starts in ([0, 6, 5], [0, 3, 4], [0, 3, 6], [1, 3, 5], [-1, 3, 5], [0, -1, 5], [0, 2**62, 5], [0, 2, 5]):
            needle = "query_starts" if starts != [0, -1, 5] else "query_starts must not fall"
            refuse_call(name, needle, batch=batch(query_starts=torch.tensor(starts)))


MAX_FLOAT = torch.finfo(torch.float32).max
SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, -1e-40, MAX_FLOAT, -MAX_FLOAT]


def F12_native_special_values(_: Path) -> None:
    """NaN stands where the reference has it, whatever special value one input holds; other rows keep their bits."""

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.linear(x, reference.prepare_linear([projection(weight, bias)]))

    twins = {"rms_norm": reference.rms_norm, "silu_mul": reference.silu_mul, "linear": plain}
    for name, twin in twins.items():
        healthy = call(name)
        for value in SPECIAL:
            op = all_ops()[name]
            op.arguments[op.tensors[0]][1, 5] = value
            got, expected = op.call(**op.arguments), twin(**op.arguments)
            check(torch.equal(got.isnan(), expected.isnan()), f"{name}: NaN elsewhere than the reference for {value}")
            for row in (0, 2):
                check(torch.equal(got[row], healthy[row]), f"{name}: row {row} changed for {value} in row 1")


def F12_native_special_values_in_attention(_: Path) -> None:
    for value in SPECIAL:
        for which in ("q", "k", "v"):
            op = all_ops()["rope_and_cache"]
            op.arguments[which][1, 1, 3] = value
            results = []
            for backend in (cpu, reference):
                cache = pages()
                rotated = backend.rope_and_cache(**{**op.arguments, "pages": cache})
                results.append(backend.attention(rotated, cache, op.arguments["batch"]))
            check(torch.equal(results[0].isnan(), results[1].isnan()), f"NaN elsewhere for {value} in {which}")


def F12_native_rows_that_cannot_be_sampled(_: Path) -> None:
    for value, column in ((torch.nan, 7), (torch.inf, 7), (torch.nan, VOCAB - 1), (torch.inf, VOCAB - 1)):
        logits = normal(2, VOCAB)
        logits[0, column] = value
        got = call("sample", logits=logits)
        check(got[0] == -1 and got[1] == call("sample")[1], f"{got}")
    nothing = sampling(bias=torch.full((2, VOCAB), -torch.inf))
    check(call("sample", batch=nothing).tolist() == [-1, -1], "every token is forbidden")


def F13_native_every_element_is_written(_: Path) -> None:
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(-999)

    with mock.patch.object(torch, "empty", poisoned):
        for name, op in all_ops().items():
            for result in _tuple(op.call(**op.arguments)):
                unwritten = result.isnan() if result.is_floating_point() else result == -999
                check(not unwritten.any(), f"{name} leaves elements unwritten")


def F14_native_from_several_threads(_: Path) -> None:
    """Each of four Python threads gets the bits that one gets alone."""
    expected = {name: _tuple(call(name)) for name in all_ops()}
    wrong: list[str] = []
    threads = len(os.listdir("/proc/self/task"))

    def work() -> None:
        for _ in range(20):
            for name, one in expected.items():
                if not all(map(torch.equal, _tuple(call(name)), one)):
                    wrong.append(name)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    while len(os.listdir("/proc/self/task")) > threads:  # a joined thread may be about to end
        time.sleep(0.001)
    check(not wrong, f"other bits from several threads: {sorted(set(wrong))}")


def F16_native_kernels_that_cannot_run_here(_: Path) -> None:
    """Not built, of another ABI, on an old processor, an unknown set: one warning and the reference, or an error."""
    device, name = torch.device("cpu"), "llama_fast._C"

    class Broken:
        """Finds nothing but an extension that cannot be loaded."""

        def find_spec(self, module: str, *_: Any) -> None:
            if module == name:
                raise ImportError("undefined symbol: PyFoo", name="PyFoo")

    environment = {key: value for key, value in os.environ.items() if key != ISA_VARIABLE}
    _machine(mock.patch.dict(sys.modules, {name: None}), "was not built", device)
    with mock.patch.object(sys, "meta_path", [Broken(), *sys.meta_path]):
        without = {key: value for key, value in sys.modules.items() if key != name}
        _machine(mock.patch.dict(sys.modules, without, clear=True), "cannot be loaded (undefined symbol", device)
    _machine(mock.patch.object(_C, "interface", 0), "of another version of llama_fast", device)
    _machine(mock.patch.object(_C, "instruction_sets", list), "this processor lacks AVX2, FMA or F16C", device)
    for wrong in ("avx1024", "AVX2", " "):
        with mock.patch.dict(os.environ, {**environment, ISA_VARIABLE: wrong}, clear=True):
            _machine(mock.patch.dict(os.environ), f"LLAMA_FAST_CPU_ISA={wrong!r}", device)
    native.cache_clear()
    check(ops.select_backend("auto", device, torch.float32) is cpu, "no recovery")


def _machine(change: Any, reason: str, device: torch.device) -> None:
    """What selecting a backend does while `change` is made."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("llama_fast.ops")
    log.addHandler(handler)
    native.cache_clear()
    try:
        with change:
            for _attempt in range(3):
                check(ops.select_backend("auto", device, torch.float32) is reference, f"no fallback: {reason}")
            check(len(records) == 1 and reason in records[0].getMessage(), f"{[r.getMessage() for r in records]}")
            refused(BackendError, lambda: ops.select_backend("cpu", device), reason, "backend='reference'")
    finally:
        native.cache_clear()
        log.removeHandler(handler)

"""Which kernels Llama models launch, with which arguments: recorded from the launchers themselves, without a GPU.

The launchers run on meta tensors, which have a shape and no memory: what gets through reads nothing from the device.
Triton binds and specialises the arguments as it does for a GPU; its hook before compilation takes the result and stops
there. So no list of configurations can differ from what runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llama_fast.kernels import arguments, configs
from llama_fast.kernels.advance import advance
from llama_fast.kernels.attention import attention
from llama_fast.kernels.int4_linear import GROUP_SIZES, PlanarInt4, int4_linear
from llama_fast.kernels.linear import linear
from llama_fast.kernels.log_probs import log_probs
from llama_fast.kernels.machine_code import OPTIONS
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.kernels.rope_and_cache import rope_and_cache
from llama_fast.kernels.sample import sample
from llama_fast.kernels.silu_mul import silu_mul

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Sequences of the largest batch that is looked at; kernels differ by the power of two.
_MOST_SEQUENCES = 256
_MOST_ROWS = 4096
# model/kv_cache.py's; importing it here would point upwards.
_PAGE_SIZE, _SPLIT_SIZE = 64, 256
_MAX_PAGES = 32


@dataclass(frozen=True)
class Shape:
    """What the kernels see of a model."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 128256


MODELS = {
    "1b": Shape(2048, 8192, 32, 8, 64),
    "8b": Shape(4096, 14336, 32, 8, 128),
    "70b": Shape(8192, 28672, 64, 8, 128),
}


@dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it for one launch, in Triton's own words.

    Attributes:
        arch: 90 for sm_90.
        module, name: of the @triton.jit function.
        data: what JITFunction.preload compiles from: signature, constants, attributes and options.
    """

    arch: int
    module: str
    name: str
    data: str

    @property
    def kernel(self) -> Any:
        """The @triton.jit function."""
        return getattr(importlib.import_module(self.module), self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every argument: a constant's value or a type (":16" where a multiple of 16 is counted on); then options."""
        data = json.loads(self.data)
        constants = {key[0]: value for key, value in zip(data["constant_keys"], data["constant_vals"], strict=True)}
        divisible = {key[0] for key, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True) if value}
        config = {}
        for index, (name, kind) in enumerate(data["signature"].items()):
            config[name] = constants[index] if index in constants else kind + ":16" * (index in divisible)
        return config | {option: data["options"][option] for option in OPTIONS}


@dataclass(frozen=True)
class Use:
    """What a launch is for; `rows` is tokens, or rows of logits."""

    model: str
    route: str
    rows: int


class _Chip:
    """As much of a Triton driver as it takes to specialise and compile for a chip that is not here."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        # Triton keeps what it knows of a kernel by device: each chip is one.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)


def set_chip(arch: int) -> None:
    """Make Triton compile for a chip, from here to the end of the process: for processes that launch nothing."""
    driver.set_active(_Chip(arch))


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launchers called inside take meta tensors, configure as on `arch` and launch nothing; what they would have
    launched is in the list."""
    launches: list[Launch] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(Launch(arch, fn.module, fn.name, compile["specialization_data"]))
        return True  # compile and launch nothing

    set_chip(arch)
    with (
        triton.knobs.runtime.scope(),
        mock.patch.object(arguments, "_DEVICE_TYPE", "meta"),
        mock.patch.object(configs, "table_of", return_value=configs.TABLES[arch]),
    ):
        triton.knobs.runtime.jit_cache_hook = record
        yield launches


def model_launches(
    arch: int, models: Sequence[str], dtypes: Sequence[str], quick: bool = False
) -> dict[Launch, list[Use]]:
    """Every different launch of the models, and what for."""
    found: dict[Launch, list[Use]] = {}
    for model in models:
        for dtype in dtypes:
            for route, rows, call in _calls(arch, MODELS[model], DTYPES[dtype], quick):
                with recording(arch) as launches:
                    call()
                for launch in launches:
                    found.setdefault(launch, []).append(Use(model, route, rows))
    return found


def source_hash(kernel: Any) -> str:
    """Of a @triton.jit function and those of ours that it calls.

    Triton's own cache key also changes when a line is added above the function.
    """
    sources: dict[str, str] = {}

    def visit(function: Any) -> None:
        key = f"{function.__module__}.{function.__name__}"
        if key in sources or not key.startswith("llama_fast."):
            return
        sources[key] = function.src
        for name in function.fn.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, triton.JITFunction):
                visit(value)
            elif isinstance(value, triton.language.constexpr):
                sources[f"{key}.{name}"] = str(value.value)

    visit(kernel)
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:16]


def _calls(arch: int, shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, int, Any]]:
    """(route, rows, a function that calls a launcher)."""
    for generated, rows, num_seqs, max_pages in _batches(quick):
        batch = _batch(shape, rows, num_seqs, max_pages, generated)
        for route, call in _batch_calls(shape, dtype, batch):
            yield route, rows, call
    yield from _linear_calls(configs.TABLES[arch], shape, dtype, quick)
    for rows in (1, 16):
        logits, ids = _empty(torch.float32, rows, shape.vocab_size), _empty(torch.int64, rows)
        yield "log_probs", rows, lambda logits=logits, ids=ids: log_probs(logits, ids, 5)
        for sampling in _sampling_batches(rows, shape.vocab_size, quick):
            yield "sample", rows, lambda logits=logits, sampling=sampling: sample(logits, sampling)
        for indices in (None, ids):
            for counted in (False, True):
                arguments = (ids, indices, _decode_rows(rows, shape.vocab_size), counted)
                yield "advance", rows, lambda arguments=arguments: advance(*arguments)


def _batches(quick: bool) -> Iterator[tuple[bool, int, int, int]]:
    """(generated, num_tokens, num_seqs, max_pages)."""
    yield False, 4096, 1, _MAX_PAGES
    for count in [16] if quick else [2**i for i in range(_MOST_SEQUENCES.bit_length())]:
        yield True, count, count, _MAX_PAGES
        if not quick:
            yield False, 4 * count, count, _MAX_PAGES
    # A page table has the width that its longest sequence needs: 1, or no multiple of 16.
    for max_pages in () if quick else (1, _MAX_PAGES + 1):
        yield True, 4, 4, max_pages
        yield False, 64, 4, max_pages


def _batch_calls(shape: Shape, dtype: torch.dtype, batch: Any) -> Iterator[tuple[str, Any]]:
    """What a layer runs except linears, each with its input as the op before leaves it."""
    rows = batch.slots.shape[0]
    x = _empty(dtype, rows, shape.hidden_size)
    yield "rms_norm", lambda: rms_norm(x, _empty(dtype, shape.hidden_size), 1e-5)
    packed = _empty(dtype, rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
    q, k, v = packed.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
    pool = _empty(dtype, 2, 2, 8, shape.num_kv_heads, _PAGE_SIZE, shape.head_dim)
    pages: Any = SimpleNamespace(k=pool[1, 0], v=pool[1, 1], page_size=_PAGE_SIZE)
    yield "rope_and_cache", lambda: rope_and_cache(q, k, v, batch, pages)
    rotated = _empty(dtype, rows, shape.num_heads, shape.head_dim)
    yield f"attention {'generated' if batch.generated else 'prompt'}", lambda: attention(rotated, pages, batch)
    yield "silu_mul", lambda: silu_mul(_empty(dtype, rows, 2 * shape.intermediate_size))


def _linear_calls(table: int, shape: Shape, dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, int, Any]]:
    """Each linear as ops/gpu.py calls it, on both sides of every number of rows at which its tile changes."""
    hidden, inner, q_size = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    linears = (
        (q_size, hidden, "residual"),
        (hidden, 2 * inner, "activation"),
        (inner, hidden, "residual"),
        (hidden, q_size + 2 * shape.num_kv_heads * shape.head_dim, ""),
        (hidden, shape.vocab_size, "logits"),
    )
    for in_features, out_features, epilogue in linears[: 2 if quick else None]:
        gated = epilogue == "activation"
        weight = _empty(dtype, out_features, in_features)
        starts = configs.row_thresholds(table, dtype, gated, out_features // (1 + gated), _MOST_ROWS)
        for rows in _both_sides(starts, quick):
            x, options = _empty(dtype, rows, in_features), _epilogue(epilogue, dtype, rows, out_features)
            yield "linear", rows, lambda x=x, w=weight, o=options: linear(x, w, **o)
        for packed in _int4_weights(dtype, out_features, in_features, quick):
            tiles = configs.int4_tiles(table, dtype, packed.group_size)
            for rows in _both_sides([most + 1 for most, _ in tiles if most is not None], quick):
                x, options = _empty(dtype, rows, in_features), _epilogue(epilogue, dtype, rows, out_features)
                yield "int4_linear", rows, lambda x=x, w=packed, o=options: int4_linear(x, w, **o)


def _both_sides(starts: list[int], quick: bool) -> list[int]:
    return [16, _MOST_ROWS] if quick else sorted({1, _MOST_ROWS, *starts, *(start - 1 for start in starts)})


def _epilogue(name: str, dtype: torch.dtype, rows: int, out_features: int) -> dict[str, Any]:
    if name == "residual":
        return {"residual": _empty(dtype, rows, out_features)}
    if name == "activation":
        return {"activation": "silu"}
    return {"out_dtype": torch.float32} if name == "logits" else {}


def _batch(shape: Shape, rows: int, num_seqs: int, max_pages: int, generated: bool) -> Any:
    """The fields of model/batch.py's Batch that kernels read."""
    return SimpleNamespace(
        slots=_empty(torch.int64, rows),
        seq_ids=_empty(torch.int64, rows),
        query_starts=_empty(torch.int64, num_seqs + 1),
        seq_lens=_empty(torch.int64, num_seqs),
        page_table=_empty(torch.int64, num_seqs, max_pages),
        cos=_empty(torch.float32, rows, shape.head_dim),
        sin=_empty(torch.float32, rows, shape.head_dim),
        split_size=_SPLIT_SIZE,
        generated=generated,
    )


def _int4_weights(dtype: torch.dtype, out_features: int, in_features: int, quick: bool) -> Iterator[PlanarInt4]:
    for group_size in (128,) if quick else GROUP_SIZES:
        scales = _empty(dtype, in_features // group_size, out_features)
        words = _empty(torch.int32, in_features // 128, out_features, 16)
        for zeros in (None,) if quick else (None, _empty(dtype, *scales.shape)):
            yield PlanarInt4(words, scales, zeros, None, in_features)


def _sampling_batches(rows: int, vocab_size: int, quick: bool) -> Iterator[Any]:
    """SamplingBatch as ops/reference_sample.py has it: without tables, with each of them, with all."""
    per_row = {name: _empty(torch.float32, rows) for name in ("temperature", "top_p", "min_p")}
    per_row |= {f"{name}_penalty": _empty(torch.float32, rows) for name in ("repetition", "frequency", "presence")}
    per_row |= {name: _empty(torch.int32, rows) for name in ("top_k", "sample_index")}
    per_row |= {name: _empty(torch.int64, rows) for name in ("seeds", "position")}
    tables = {"prompt_mask": torch.bool, "output_counts": torch.int32, "bias": torch.float32}
    none = dict.fromkeys(tables)
    all_tables = {name: _empty(dtype, rows, vocab_size) for name, dtype in tables.items()}
    for given in ((), tables) if quick else ((), *((name,) for name in tables), tables):
        yield SimpleNamespace(**per_row, **none | {name: all_tables[name] for name in given})


def _decode_rows(rows: int, vocab_size: int) -> Any:
    """The fields of engine/decode_rows.py's DecodeRows that kernels read."""
    names = ("token_ids", "slots", "seq_lens", "limits", "done")
    return SimpleNamespace(
        **{name: _empty(torch.int64, rows) for name in names},
        page_table=_empty(torch.int64, rows, _MAX_PAGES),
        stop_mask=_empty(torch.bool, rows, vocab_size),
        output_counts=_empty(torch.int32, rows, vocab_size),
        spare_page=8,
    )


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

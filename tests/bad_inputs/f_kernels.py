"""F: tensors that a kernel must not be launched on. These entries run in the interpreter (see server.py).

F08, F09 and F13's guard bytes stand in tests/kernels, by the same ids: they need sparse gigabytes or many launches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast import ops
from llama_fast.engine.engine import Engine
from llama_fast.engine.page_allocator import PageAllocator
from llama_fast.errors import BackendError, KernelArgumentError, RequestError
from llama_fast.kernels import silu_mul as silu_mul_module
from llama_fast.kernels.attention import attention
from llama_fast.kernels.int4_linear import int4_linear, pack_int4
from llama_fast.kernels.linear import linear
from llama_fast.kernels.log_probs import log_probs
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.kernels.rope_and_cache import rope_and_cache
from llama_fast.kernels.sample import sample
from llama_fast.kernels.silu_mul import silu_mul
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import reference
from llama_fast.ops.int4 import Int4Weight
from llama_fast.ops.reference_sample import SamplingBatch
from tests.bad_inputs.harness import check, refused
from tests.tiny import make_model, make_request

HEADS, KV_HEADS, HEAD_DIM, PAGE, NUM_PAGES = 4, 2, 16, 16, 6
LENGTHS, STARTS = (3, 2), (14, 0)  # one sequence crosses a page
NUM_TOKENS = sum(LENGTHS)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch() -> Batch:
    return Batch(
        ops=reference,
        token_ids=torch.zeros(NUM_TOKENS, dtype=torch.int64),
        slots=torch.tensor([14, 15, 16, 0, 1]),
        seq_ids=torch.tensor([0, 0, 0, 1, 1]),
        query_starts=torch.tensor([0, 3, 5]),
        seq_lens=torch.tensor([17, 2]),
        page_table=torch.tensor([[4, 1], [2, 0]]),
        cos=normal(NUM_TOKENS, HEAD_DIM),
        sin=normal(NUM_TOKENS, HEAD_DIM),
        split_size=32,
    )


def pages() -> LayerPages:
    shape = (NUM_PAGES, KV_HEADS, PAGE, HEAD_DIM)
    return LayerPages(normal(*shape), normal(*shape).flip(0))


def sampling() -> SamplingBatch:
    rows = 2
    floats = {name: torch.ones(rows) for name in ("temperature", "top_p", "repetition_penalty")}
    floats |= {name: torch.zeros(rows) for name in ("min_p", "frequency_penalty", "presence_penalty")}
    int32 = {name: torch.zeros(rows, dtype=torch.int32) for name in ("top_k", "sample_index")}
    int64 = {name: torch.arange(rows) for name in ("seeds", "position")}
    return SamplingBatch(**floats, **int32, **int64)


def int4_weight() -> Any:
    values = (torch.arange(32 * 128).view(32, 128) % 16).to(torch.uint8)
    return pack_int4(Int4Weight(values, normal(32, 4).abs(), None, None))


@dataclass(frozen=True)
class Op:
    """An op, its legal arguments, and the names of those that are floating-point tensors of one dtype."""

    call: Callable[..., Tensor]
    arguments: dict[str, Any]
    tensors: tuple[str, ...]


def all_ops() -> dict[str, Op]:
    q, k = normal(NUM_TOKENS, HEADS, HEAD_DIM), normal(NUM_TOKENS, KV_HEADS, HEAD_DIM)
    return {
        "rms_norm": Op(rms_norm, {"x": normal(3, 32), "weight": normal(32), "eps": 1e-5}, ("x", "weight")),
        "silu_mul": Op(silu_mul, {"gate_up": normal(3, 64)}, ("gate_up",)),
        "linear": Op(linear, {"x": normal(3, 32), "weight": normal(8, 32)}, ("x", "weight")),
        "int4_linear": Op(int4_linear, {"x": normal(3, 128), "packed": int4_weight()}, ("x",)),
        "rope_and_cache": Op(
            rope_and_cache, {"q": q, "k": k, "v": k.flip(0), "batch": batch(), "pages": pages()}, ("q", "k", "v")
        ),
        "attention": Op(attention, {"q": q, "pages": pages(), "batch": batch()}, ("q",)),
        "sample": Op(sample, {"logits": normal(2, 50), "batch": sampling()}, ("logits",)),
        "log_probs": Op(
            log_probs, {"logits": normal(2, 50), "token_ids": torch.tensor([1, 2]), "num_top": 3}, ("logits",)
        ),
    }


def call(name: str, **changes: Any) -> Any:
    """The op's result on fresh legal arguments with some of them changed."""
    op = all_ops()[name]
    return op.call(**{**op.arguments, **changes})


def refuse_call(name: str, *needles: str, **changes: Any) -> None:
    """The changed arguments are refused by a message that names the op."""
    refused(KernelArgumentError, partial(call, name, **changes), name, *needles)


def refuse_tensor(name: str, argument: str, bad: Tensor) -> None:
    refuse_call(name, **{argument: bad})


def each_tensor() -> list[tuple[str, str, Tensor]]:
    return [(name, argument, op.arguments[argument]) for name, op in all_ops().items() for argument in op.tensors]


def F01_wrong_dtypes(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        for dtype in (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64):
            refuse_tensor(name, argument, tensor.to(dtype))
        if name not in ("silu_mul", "sample", "log_probs", "int4_linear"):  # these take one tensor of any of them
            refuse_tensor(name, argument, tensor.half())


def F01_indices_of_another_width(_: Path) -> None:
    for name in ("rope_and_cache", "attention"):
        fields = ("slots", "page_table") if name == "rope_and_cache" else ("slots", "query_starts", "seq_lens")
        for field in fields:
            refuse_call(name, field, "int64", batch=replace(batch(), **{field: getattr(batch(), field).int()}))
    good = sampling()
    for field in ("seeds", "position", "top_k"):
        refuse_call("sample", field, batch=replace(good, **{field: getattr(good, field).float()}))


def F02_ranks_and_shapes(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        refuse_tensor(name, argument, tensor.flatten() if tensor.ndim > 1 else tensor[None])
        refuse_tensor(name, argument, tensor[None])
    refuse_tensor("rms_norm", "weight", normal(31))
    refuse_tensor("linear", "weight", normal(8, 31))
    refuse_tensor("silu_mul", "gate_up", normal(3, 63))
    refuse_tensor("int4_linear", "x", normal(3, 96))
    refuse_tensor("rope_and_cache", "k", normal(NUM_TOKENS, KV_HEADS, HEAD_DIM - 2))
    refuse_tensor("attention", "q", normal(NUM_TOKENS, 3, HEAD_DIM))  # 2 KV heads do not divide 3
    refuse_tensor("attention", "q", normal(NUM_TOKENS, HEADS, 2 * HEAD_DIM))
    refuse_tensor("sample", "logits", normal(3, 50))


def F03_meta_tensors_and_gradients(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        refuse_tensor(name, argument, tensor.to("meta"))
        if name in ("sample", "log_probs"):
            continue  # nothing is differentiated through a draw
        leaf = tensor.clone().requires_grad_()
        refuse_tensor(name, argument, leaf)
        with torch.no_grad():
            call(name, **{argument: leaf})


def _same_or_refused(name: str, argument: str, view: Tensor) -> None:
    """A view with the argument's values gives the argument's bits, or is refused."""
    expected = call(name)
    try:
        got = call(name, **{argument: view})
    except KernelArgumentError as error:
        check("contiguous" in str(error), f"{name}, {argument}: {error}")
        return
    for one, other in zip(_tuple(got), _tuple(expected), strict=True):
        check(torch.equal(one, other), f"{name}: another layout of {argument} gives other bits")


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def F04_layouts(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        wide[..., ::2] = tensor
        _same_or_refused(name, argument, wide[..., ::2])  # every other column
        rows = torch.full((2 * tensor.shape[0], *tensor.shape[1:]), torch.nan)
        rows[::2] = tensor
        _same_or_refused(name, argument, rows[::2])  # every other row
        if tensor.ndim > 1:
            _same_or_refused(name, argument, tensor.transpose(0, 1).contiguous().transpose(0, 1))
    expanded = normal(1, 32).expand(3, 32)  # stride 0
    check(torch.equal(rms_norm(expanded, normal(32), 1e-5), rms_norm(expanded.clone(), normal(32), 1e-5)), "rms_norm")
    check(torch.equal(linear(expanded, normal(8, 32)), linear(expanded.clone(), normal(8, 32))), "linear")


def F05_addresses(_: Path) -> None:
    for name, argument, tensor in each_tensor():
        for offset in (1, 2, 3):
            storage = torch.full((tensor.numel() + offset,), torch.nan)
            view = storage[offset:].view(tensor.shape)
            view.copy_(tensor)
            _same_or_refused(name, argument, view)


def F06_nothing(_: Path) -> None:
    check(rms_norm(normal(0, 32), normal(32), 1e-5).shape == (0, 32), "rms_norm")
    check(silu_mul(normal(0, 64)).shape == (0, 32), "silu_mul, no tokens")
    check(silu_mul(normal(3, 0)).shape == (3, 0), "silu_mul, no width")
    check(linear(normal(0, 32), normal(8, 32)).shape == (0, 8), "linear, no tokens")
    check(linear(normal(3, 32), normal(0, 32)).shape == (3, 0), "linear, no outputs")
    check(int4_linear(normal(0, 128), int4_weight()).shape == (0, 32), "int4_linear")
    empty = replace(
        batch(),
        slots=torch.zeros(0, dtype=torch.int64),
        seq_ids=torch.zeros(0, dtype=torch.int64),
        query_starts=torch.zeros(3, dtype=torch.int64),
        seq_lens=torch.zeros(2, dtype=torch.int64),
        cos=normal(0, HEAD_DIM),
        sin=normal(0, HEAD_DIM),
    )
    before = pages()
    q, k = normal(0, HEADS, HEAD_DIM), normal(0, KV_HEADS, HEAD_DIM)
    cache = pages()
    check(rope_and_cache(q, k, k, empty, cache).shape == q.shape, "rope_and_cache")
    check(torch.equal(cache.k, before.k) and torch.equal(cache.v, before.v), "a page was written")
    check(attention(q, cache, empty).shape == (0, HEADS * HEAD_DIM), "attention")
    none = SamplingBatch(**{name: value[:0] for name, value in vars(sampling()).items() if value is not None})
    check(sample(normal(0, 50), none).shape == (0,), "sample")
    refuse_tensor("linear", "x", normal(3, 0))
    refuse_tensor("sample", "logits", normal(2, 0))


def F07_odd_sizes(_: Path) -> None:
    """Within a few roundings of fp64, as round sizes are."""
    for size in (1, 2, 3, 31, 33, 111, 127, 129, 989, 8191):
        x, weight, norm = normal(3, size), normal(5, size), normal(size)
        bound = 4 * size**0.5 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T) + 1e-30
        check(((linear(x, weight) - x.double() @ weight.double().T).abs() <= bound).all(), f"linear, {size}")
        for got, exact in (
            (rms_norm(x, norm, 1e-5), reference.rms_norm(x.double(), norm.double(), 1e-5)),
            (silu_mul(torch.cat((x, x), 1)), reference.silu_mul(torch.cat((x, x), 1).double())),
        ):
            check(((got - exact).abs() <= 8 * 2.0**-24 * exact.abs() + 1e-7).all(), f"{size}")
        logits = normal(2, size)
        check(torch.equal(sample(logits, replace(sampling(), temperature=torch.zeros(2))), logits.argmax(-1)), "sample")


def F10_indices_out_of_range(_: Path) -> None:
    good = batch()
    for name in ("rope_and_cache", "attention"):
        for field, bad in {
            "slots": good.slots.index_fill(0, torch.tensor(2), 32),
            "page_table": good.page_table.masked_fill(good.page_table == 4, NUM_PAGES),
            "seq_lens": good.seq_lens + 100,
        }.items():
            for value in (bad, -bad - 1) if field != "seq_lens" else (bad,):
                refuse_call(name, field, batch=replace(good, **{field: value}))
    for value in (good.seq_ids + 1, good.seq_ids - 1):
        refuse_call("rope_and_cache", "seq_ids", batch=replace(good, seq_ids=value))


def F10_where_indices_come_from(_: Path) -> None:
    """On a GPU no value is looked at; the allocator and the admission of requests answer for them."""
    allocator = PageAllocator(7)
    handed_out = [page for count in (3, 1, 3) for page in allocator.allocate(count)]
    check(sorted(handed_out) == list(range(7)), f"{handed_out}")
    model = make_model()
    engine = Engine(model, backend="gpu", max_batch=2, max_seq_len=32, page_size=16, split_size=32)
    for token_id in (-1, model.config.vocab_size, 2**31, 2**63):
        request = make_request(model, [1, 2, 3], max_tokens=1)
        request.prompt_token_ids[1] = token_id
        refused(RequestError, partial(next, engine.run([request])), "vocabulary")


def F11_cumulative_lengths(_: Path) -> None:
    for starts in ([0, 6, 5], [0, 3, 4], [0, 3, 6], [1, 3, 5], [-1, 3, 5]):
        changed = replace(batch(), query_starts=torch.tensor(starts))
        refuse_call("attention", "query_starts", "5 tokens", batch=changed)
    for starts in ([0, 5], [0, 3, 5, 5]):
        refuse_call("attention", "query_starts", batch=replace(batch(), query_starts=torch.tensor(starts)))


MAX_FLOAT = torch.finfo(torch.float32).max
SPECIAL = [torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, -1e-40, MAX_FLOAT, -MAX_FLOAT]


def F12_special_values(_: Path) -> None:
    """NaN stands where the reference has it, whatever special value one input holds; other rows keep their bits."""
    twins = {
        "rms_norm": reference.rms_norm,
        "silu_mul": reference.silu_mul,
        "linear": lambda x, weight: torch.nn.functional.linear(x, weight),
    }
    for name, twin in twins.items():
        healthy = all_ops()[name]
        expected_rows = healthy.call(**healthy.arguments)
        for value in SPECIAL:
            op = all_ops()[name]
            first = op.tensors[0]
            op.arguments[first][1, 5] = value
            got, plain = op.call(**op.arguments), twin(**op.arguments)
            check(torch.equal(got.isnan(), plain.isnan()), f"{name}: NaN elsewhere than the reference for {value}")
            check(torch.equal(got[0], expected_rows[0]), f"{name}: row 0 changed for {value} in row 1")
            check(torch.equal(got[2], expected_rows[2]), f"{name}: row 2 changed for {value} in row 1")


def F12_special_values_in_attention(_: Path) -> None:
    for value in SPECIAL:
        for which in ("q", "k", "v"):
            op = all_ops()["rope_and_cache"]
            op.arguments[which][1, 1, 3] = value
            results = []
            for rope, attend in ((rope_and_cache, attention), (reference.rope_and_cache, reference.attention)):
                cache = pages()
                rotated = rope(**{**op.arguments, "pages": cache})
                results.append(attend(rotated, cache, op.arguments["batch"]))
            check(torch.equal(results[0].isnan(), results[1].isnan()), f"NaN elsewhere for {value} in {which}")


def F12_rows_that_cannot_be_sampled(_: Path) -> None:
    logits = normal(4, 50)
    logits[0, 7], logits[1, 7] = torch.nan, torch.inf
    logits[2] = -torch.inf
    four = SamplingBatch(**{k: v.repeat(2) for k, v in vars(sampling()).items() if v is not None})
    got = sample(logits, four)
    check(got[:3].tolist() == [-1, -1, -1], f"{got}")
    check(got[3] == sample(logits[3:], SamplingBatch(**{k: v[3:] for k, v in vars(four).items() if v is not None})), "")


def F13_every_element_is_written(_: Path) -> None:
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = plain(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.empty = poisoned  # for this process, which ends with the entry
    for name, op in all_ops().items():
        for result in _tuple(op.call(**op.arguments)):
            check(not result.is_floating_point() or not result.isnan().any(), f"{name} leaves elements unwritten")


def F15_no_kernels_here(_: Path) -> None:
    """Triton or what it needs is missing: one warning and the reference under "auto", an error under "gpu"."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("llama_fast.ops").addHandler(handler)
    device = torch.device("cpu")
    for error in (ImportError("No module named 'triton'"), OSError(30, "Read-only file system"), OSError(28, "full")):

        def broken(*_: Any, error: Exception = error) -> Tensor:
            raise error

        plain, silu_mul_module.silu_mul = silu_mul_module.silu_mul, broken
        ops._kernel_problem.cache_clear()
        records.clear()
        try:
            for _attempt in range(3):
                check(ops.select_backend("auto", device, torch.float32) is reference, "no fallback")
            check(len(records) == 1 and str(error.args[-1]) in records[0].getMessage(), f"{records}")
            refused(BackendError, lambda: ops.select_backend("gpu", device), str(error.args[-1]), "backend='reference'")
        finally:
            silu_mul_module.silu_mul = plain
            ops._kernel_problem.cache_clear()
    check(ops.select_backend("auto", device, torch.float32).__name__ == "llama_fast.ops.gpu", "no recovery")

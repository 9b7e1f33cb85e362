"""Sections of gpu_report.py that time whole models with random weights. Without a GPU they compute the bounds alone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_report_engine import (
    empty_model,
    make_engine,
    make_ready,
    make_request,
    quantize,
    random_model,
    random_prompt,
    stats_of,
)
from gpu_report_section import NotHere, Section, has_gpu
from gpu_report_times import rates_of
from serving_bounds import Rates, Work, decode_work, prefill_work
from timing import Summary

_EXTENSION = "LLAMA_FAST_CUDA_EXTENSION"
_STEPS = 33
# Generated tokens that come before the first window: the graph's first replays, and prompts among them.
_WARM_STEPS = 3
_WINDOWS = 5
INT4 = "int4"
# Batches of the model of 4 bits, all at one context.
_INT4_BATCHES, _INT4_CONTEXT = (1, 8, 32), 1024


def model_1b(section: Section) -> None:
    _model(section, "1b")


def model_8b(section: Section) -> None:
    _model(section, "8b")


def _points(quick: bool) -> list[tuple[str, int, int]]:
    """(kind, batch, context), the most important first."""
    first = [("decode", 1, 1024), ("prefill", 1, 4096), ("decode", 128, 1024), ("decode", 64, 4096)]
    more = [("decode", 8, 1024), ("decode", 64, 1024), ("decode", 1, 4096), ("decode", 8, 4096), ("decode", 128, 4096)]
    return first[:3] if quick else first + more


def _model(section: Section, name: str) -> None:
    """Milliseconds of decode steps and of prefill with random weights, each with its bound."""
    rates, shapes = rates_of(section), empty_model(name)
    points = _points(section.quick)
    if not has_gpu():
        section.results["steps"] = [_row(name, None, point, rates, shapes, None) for point in points]
        return
    start = time.perf_counter()
    model = random_model(name)
    torch.cuda.synchronize()
    section.results["weights_made_s"] = time.perf_counter() - start
    # Half the cache or more would be for one point alone: where memory is short that point is left out.
    page_room = int(0.85 * torch.cuda.mem_get_info()[0])
    slot_bytes, slots = _slot_bytes(shapes), {point: _slots(point) for point in points}
    fitting = [point for point in points if slots[point] * slot_bytes < page_room]
    section.results["steps"] = []
    section.results["left_out"] = [f"{point}: does not fit the memory" for point in points if point not in fitting]
    sizes = {
        "max_batch": max(batch for _, batch, _ in fitting),
        "max_seq_len": max(context for _, _, context in fitting) + 2 * _STEPS,
        "cache_bytes": int(max(slots[point] for point in fitting) * slot_bytes),
        "prefill_chunk": 4096,
    }

    # The first compiles what Triton has not in its cache.
    for label in ("first_ready", "ready"):
        engine = make_engine(model, **sizes)
        captured = capture_time(engine)
        start = time.perf_counter()
        make_ready(engine)
        section.results[f"{label}_s"] = time.perf_counter() - start
        section.results[label.replace("ready", "capture_s")] = captured()
        if label == "first_ready":
            del engine
            _collect()
    section.results["stats"] = stats_of(engine)
    _time_points(section, name, engine, fitting, rates, shapes, None)
    section.results["stats_after"] = stats_of(engine)
    del engine
    _collect()
    variants: list[tuple[str, Callable[[], Any], dict[str, Any]]] = [
        ("linears of cuBLAS", cublas_linears, {}),
        ("eager", contextlib.nullcontext, {"graphs": False}),
    ]
    for variant, context, options in variants:
        few = [point for point in fitting if point[:1] != ("prefill",) or not options][: 3 if not options else 1]
        if not section.has(12, f"{name} with {variant}"):
            continue
        with context():
            # Weights are prepared for the route that they take.
            model.refresh()
            try:
                engine = make_engine(model, **options, **sizes)
                _time_points(section, name, engine, few, rates, shapes, variant)
            except NotHere as reason:
                section.not_run("variant", variant, str(reason))
            # A variant is for comparison: without it the report still says what was measured.
            except Exception as error:
                section.not_run("variant", variant, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            engine = None
            _collect()
    if not section.quick and section.has(12, f"{name} with weights of 4 bits"):
        _time_int4(section, name, model, rates, shapes)


def _time_int4(section: Section, name: str, model: Any, rates: Rates, shapes: Any) -> None:
    """Decoding with projections of 4 bits; the model's own weights are gone then."""
    points = [("decode", batch, _INT4_CONTEXT) for batch in _INT4_BATCHES]
    try:
        engine = make_engine(
            quantize(model),
            max_batch=max(_INT4_BATCHES),
            max_seq_len=_INT4_CONTEXT + 2 * _STEPS,
            cache_bytes=int(_slots(points[-1]) * _slot_bytes(shapes)),
        )
        _time_points(section, name, engine, points, rates, shapes, INT4)
    # As any variant: without it the report still says what was measured.
    except Exception as error:
        section.not_run("variant", INT4, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    _collect()


def _slot_bytes(shapes: Any) -> float:
    """Of a token in the cache."""
    return decode_work(shapes, 1, 1.0).num_bytes - decode_work(shapes, 1, 0.0).num_bytes


def _slots(point: tuple[str, int, int]) -> int:
    """Of the cache that a point takes."""
    return point[1] * (point[2] + 2 * _STEPS + 64)


def capture_time(engine: Any) -> Callable[[], float | None]:
    """Seconds that the engine's graphs take to capture, once it is ready; None where it captures none."""
    taken: list[float] = []
    graph = engine.decoder.graph
    if graph.captures:
        capture = graph.capture

        def timed() -> None:
            torch.cuda.synchronize()
            start = time.perf_counter()
            capture()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)

        graph.capture = timed
    return lambda: sum(taken) if taken else None


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _time_points(
    section: Section, name: str, engine: Any, points: list[Any], rates: Rates, shapes: Any, variant: str | None
) -> None:
    make_ready(engine)
    # What attention reads of a cache that no prompt has filled.
    engine.cache.pool.normal_()
    for point in points:
        if not section.has(4, f"{name} {point}"):
            continue
        kind, batch, context = point
        if batch > engine.max_batch:
            found = f"{name} {point}: steps of {engine.max_batch} sequences were captured, for more there is no memory"
            section.results["left_out"].append(found)
            continue
        try:
            ms = prefill_ms(engine, context) if kind == "prefill" else decode_ms(engine, batch, context)
        # One point must not cost the others; a GPU that no longer answers fails them all by name.
        except Exception as error:
            traceback.print_exc()
            section.check("run", f"{name} {kind}, batch {batch}, {context}", f"{type(error).__name__}: {error}"[:400])
            continue
        section.results["steps"].append(row := _row(name, variant, point, rates, shapes, ms))
        print(row, flush=True)
        section.save()


def _row(name: str, variant: str | None, point: Any, rates: Rates, shapes: Any, ms: Summary | None) -> dict[str, Any]:
    kind, batch, context = point
    work: Work = prefill_work(shapes, batch, context)
    if kind == "decode":
        # The contexts that a timed run goes through.
        work = decode_work(shapes, batch, context + _STEPS / 2)
    if variant == INT4:
        read = sum(parameter.nbytes for parameter in quantize(empty_model(name)).parameters())
        work = Work(work.num_bytes + read - sum(p.nbytes for p in shapes.parameters()), work.flops)
    bound_ms = 1e3 * rates.seconds(work)
    row = {"model": name, "kind": kind, "batch": batch, "context": context, "variant": variant}
    row |= {"num_bytes": work.num_bytes, "flops": work.flops, "bound_ms": bound_ms}
    return row if ms is None else {**row, "ms": ms, "share": bound_ms / ms.median}


def decode_ms(engine: Any, batch: int, context: int) -> Summary:
    """Milliseconds of one step, over windows of steps: tokens may reach the host several steps at once.

    The prompts are not run: their places in the cache hold random numbers, and only their last tokens are computed.
    """
    prompts = [random_prompt(engine.model, context, index) for index in range(batch)]
    requests = [
        make_request(engine.model, prompt, index, engine.max_seq_len, _STEPS, temperature=0.0)
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        request.samples[0].sequence.num_computed = context - 1
    seen = [(time.perf_counter(), 0)]
    for _ in engine.run(requests):
        seen.append((time.perf_counter(), min(len(request.samples[0].token_ids) for request in requests)))
    for request in requests:
        if request.error is not None:
            raise request.error
    return Summary.of(window_ms(seen))


def window_ms(seen: list[tuple[float, int]]) -> list[float]:
    """Milliseconds a step in each of a few windows of (when, tokens so far)."""
    # The first moment at which so many tokens were there.
    steady: dict[int, float] = {}
    for when, count in seen:
        steady.setdefault(count, when)
    counts = sorted(count for count in steady if count >= _WARM_STEPS)
    size = max(1, (len(counts) - 1) // _WINDOWS)
    edges = counts[::size]
    return [1e3 * (steady[end] - steady[begin]) / (end - begin) for begin, end in itertools.pairwise(edges)]


def prefill_ms(engine: Any, length: int, repeats: int = 4) -> Summary:
    """Milliseconds from a request of so many tokens to its first token; the first time warms up."""
    times = []
    for repeat in range(repeats + 1):
        prompt = random_prompt(engine.model, length, repeat)
        request = make_request(engine.model, prompt, 0, engine.max_seq_len, 1, temperature=0.0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in engine.run([request]):
            pass
        times.append(1e3 * (time.perf_counter() - start))
        if request.error is not None:
            raise request.error
    return Summary.of(times[1:])


@contextlib.contextmanager
def cublas_linears() -> Iterator[None]:
    """Every linear layer by cuBLAS, which takes what is fastest for a number of rows: what one answer costs."""
    from torch.nn import functional as F

    from llama_fast.kernels.silu_mul import silu_mul
    from llama_fast.ops import gpu

    def linear(
        x: Any, weight: Any, bias: Any = None, *, residual: Any = None, activation: Any = None, **others: Any
    ) -> Any:
        if others.get("out_dtype") is torch.float32:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        if residual is not None and bias is None:
            return torch.addmm(residual, x, weight.t())
        out = F.linear(x, weight, bias)
        if activation is not None:
            return silu_mul(out, activation)
        return out if residual is None else residual + out

    before, setting = gpu.linear_kernel.linear, os.environ.get(_EXTENSION)
    gpu.linear_kernel.linear = linear
    # Its twin for generated tokens steps aside.
    os.environ[_EXTENSION] = "off"
    try:
        yield
    finally:
        gpu.linear_kernel.linear = before
        if setting is None:
            del os.environ[_EXTENSION]
        else:
            os.environ[_EXTENSION] = setting

"""sample: one token per row by penalties, bias, temperature, top-k, top-p, min-p and Gumbel-max; no sort.

Fused    Six launches, all of them in every call, so that a graph can be captured; a program whose row does not need
         the step returns at once.
           1    chunks  penalties and bias; each chunk's best score. It decides greedy rows.
           2-4          rows with top-k or top-p: their threshold (thresholds.py).
           5    chunks  rows with a temperature: noise for the survivors; each chunk's best noisy score.
           6    rows    the token.
Traffic  Logits once for greedy rows, twice with temperature, four times with top-k or top-p (all but the first from
         L2), plus 17 bytes a token with all tables: memory-bound, except 5, about 200 operations a token.
Shapes   logits [num_rows, vocab_size] -> [num_rows]
Dtypes   fp16, bf16 or fp32 in, int64 out; fp32 arithmetic as the plain-PyTorch twin rounds it, mass in int64.
Source   Gumbel-max: arXiv:1411.0030. Everything else as in ops/reference_sample.py. The order of sums cannot matter
         (they are of integers), so neither can the other rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from llama_fast.kernels.arguments import check_devices, refuse
from llama_fast.kernels.probability import (
    CHUNK,
    NOTHING,
    OPTIONS,
    best,
    best_of_chunks,
    check_logits,
    distance,
    exp,
    gumbel,
    id_of,
    is_finite,
    key_of,
    num_chunks,
    order,
    scaled,
    value_of,
)
from llama_fast.kernels.thresholds import thresholds

if TYPE_CHECKING:
    from llama_fast.ops.reference_sample import SamplingBatch

# Further below the maximum than the largest noise is above the least (21.49 + 2.82): never drawn.
_HOPELESS = tl.constexpr(25.0)

_DTYPES = {
    "top_k": torch.int32,
    "seeds": torch.int64,
    "sample_index": torch.int32,
    "position": torch.int64,
    "prompt_mask": torch.bool,
    "output_counts": torch.int32,
}
_TABLES = ("prompt_mask", "output_counts", "bias")


@triton.jit
def _scores_kernel(
    logits_ptr,
    repetition_penalty_ptr,
    frequency_penalty_ptr,
    presence_penalty_ptr,
    prompt_mask_ptr,
    output_counts_ptr,
    bias_ptr,
    scores_ptr,
    chunk_best_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    valid = ids < vocab_size
    cells = row * vocab_size + ids
    x = tl.load(logits_ptr + row * stride + ids, valid, other=float("-inf")).to(tl.float32)

    seen = tl.zeros([CHUNK], tl.int1)
    if prompt_mask_ptr is not None:
        seen = tl.load(prompt_mask_ptr + cells, valid, other=0) != 0
    if output_counts_ptr is not None:
        counts = tl.load(output_counts_ptr + cells, valid, other=0)
        seen = seen | (counts > 0)
    if prompt_mask_ptr is not None or output_counts_ptr is not None:
        penalty = tl.load(repetition_penalty_ptr + row)
        x = tl.where(seen, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    if output_counts_ptr is not None:
        x = x - tl.load(frequency_penalty_ptr + row) * counts.to(tl.float32)
        x = x - tl.load(presence_penalty_ptr + row) * (counts > 0).to(tl.float32)
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + cells, valid, other=0.0)
    if scores_ptr is not None:
        tl.store(scores_ptr + cells, x, valid)
    tl.store(chunk_best_ptr + row * num_chunks + chunk, best(order(x), ids, valid))


@triton.jit
def _draw_kernel(
    scores_ptr,
    chunk_best_ptr,
    threshold_ptr,
    temperature_ptr,
    min_p_ptr,
    seeds_ptr,
    sample_index_ptr,
    position_ptr,
    chunk_drawn_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    temperature = tl.load(temperature_ptr + row)
    if not temperature > 0:
        return
    maximum = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    if not is_finite(maximum):
        return
    hopeless = tl.full([], _HOPELESS, tl.float32).to(tl.int32, bitcast=True)
    threshold = tl.minimum(tl.load(threshold_ptr + row), hopeless)
    cell = row * num_chunks + chunk
    drawn = tl.full([], NOTHING, tl.int64)
    nearest = value_of(key_of(tl.load(chunk_best_ptr + cell)))
    if distance(scaled(nearest, value_of(maximum), temperature)) <= threshold:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(scores_ptr + row * stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
        x = scaled(x, value_of(maximum), temperature)
        survives = distance(x) <= threshold
        min_p = tl.load(min_p_ptr + row)
        if min_p > 0:
            # Above 1, which the most probable token does not reach either, as 1.
            survives = survives & (exp(x) >= tl.minimum(min_p, 1.0))
        noise = gumbel(tl.load(seeds_ptr + row), tl.load(sample_index_ptr + row), tl.load(position_ptr + row), ids)
        drawn = best(order(x + noise), ids, survives)
    tl.store(chunk_drawn_ptr + cell, drawn)


@triton.jit
def _token_kernel(chunk_best_ptr, chunk_drawn_ptr, temperature_ptr, tokens_ptr, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chosen = best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS)
    finite = is_finite(key_of(chosen))
    if finite & (tl.load(temperature_ptr + row) > 0):
        chosen = best_of_chunks(chunk_drawn_ptr, row, num_chunks, BLOCK_CHUNKS)
    tl.store(tokens_ptr + row, tl.where(finite, id_of(chosen), -1))


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: [num_rows, vocab_size], copied first unless columns are contiguous; vocab_size up to 2^20.
        batch: parameters of each row; tables of penalties and bias only where some row needs them.

    Returns:
        int64 [num_rows]: token ids; -1 for a row without a finite maximum. Equal scores go to the lowest id.

    Raises:
        KernelArgumentError: dtypes, devices or shapes that are not as above or as SamplingBatch says.
    """
    check_logits("sample", logits)
    _check_batch(logits, batch)
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return tokens
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    given = {name: None if t is None else t.contiguous() for name, t in vars(batch).items()}
    chunks, block_chunks = num_chunks(vocab_size)
    chunk_best = torch.empty(num_rows, chunks, dtype=torch.int64, device=logits.device)
    chunk_drawn = torch.empty_like(chunk_best)
    by_chunk, by_row = (num_rows * chunks,), (num_rows,)

    penalties = [given[name] for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")]
    tables = [given[name] for name in _TABLES]
    scores = logits
    if any(table is not None for table in tables):
        scores = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    _scores_kernel[by_chunk](
        logits,
        *penalties,
        *tables,
        None if scores is logits else scores,
        chunk_best,
        logits.stride(0),
        vocab_size,
        chunks,
        CHUNK,
        **OPTIONS,
    )
    threshold = thresholds(scores, chunk_best, *(given[name] for name in ("temperature", "top_k", "top_p")))  # type: ignore[arg-type]
    draw = [given[name] for name in ("temperature", "min_p", "seeds", "sample_index", "position")]
    shape = (scores.stride(0), vocab_size, chunks, CHUNK, block_chunks)
    _draw_kernel[by_chunk](scores, chunk_best, threshold, *draw, chunk_drawn, *shape, **OPTIONS)
    _token_kernel[by_row](chunk_best, chunk_drawn, given["temperature"], tokens, chunks, block_chunks, **OPTIONS)
    return tokens


def _check_batch(logits: torch.Tensor, batch: SamplingBatch) -> None:
    for name, tensor in vars(batch).items():
        if tensor is None:
            continue
        shape = tuple(logits.shape[: 2 if name in _TABLES else 1])
        dtype = _DTYPES.get(name, torch.float32)
        if tensor.dtype != dtype:
            refuse("sample", f"{name} is {tensor.dtype}; use {dtype}")
        if tensor.shape != shape:
            refuse("sample", f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        check_devices("sample", logits=logits, **{name: tensor})

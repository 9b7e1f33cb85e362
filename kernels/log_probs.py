"""log_probs: log-probability and rank of given tokens, and the most probable tokens with theirs.

Fused    Three launches: each chunk's best logit; each chunk's mass, rank count and most probable token; the row's sums
         and, one after the other, its most probable tokens, for each of which only the chunk of the one before is read
         again.
Traffic  Logits twice (the second time from L2), and one chunk for each of num_top tokens: bound by memory for small
         num_top, by the latency of that loop for large.
Shapes   logits [num_rows, vocab_size], token_ids [num_rows]
         -> chosen, ranks [num_rows], top_values, top_ids [num_rows, num_top]
Dtypes   fp16, bf16 or fp32 logits, int64 ids; mass in int64, the logarithm of its sum and the difference in fp64.
Source   As in ops/reference_sample.py.
"""

import torch
import triton
import triton.language as tl

from llama_fast.kernels.arguments import check_devices, check_integers, refuse
from llama_fast.kernels.probability import (
    CHUNK,
    MASS_ONE,
    NOTHING,
    OPTIONS,
    best,
    best_of_chunks,
    check_logits,
    distance,
    id_of,
    is_finite,
    key_of,
    mass,
    num_chunks,
    order,
    pack,
    value_of,
)


@triton.jit
def _best_kernel(logits_ptr, chunk_best_ptr, stride, vocab_size, num_chunks, CHUNK: tl.constexpr):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    valid = ids < vocab_size
    x = tl.load(logits_ptr + row * stride + ids, valid, other=float("-inf")).to(tl.float32)
    tl.store(chunk_best_ptr + row * num_chunks + chunk, best(order(x), ids, valid))


@triton.jit
def _ranked(logits_ptr, row, stride, ids, vocab_size, maximum):
    """logit - maximum, and its packed rank: probable tokens are large, among equals low ids."""
    x = tl.load(logits_ptr + row * stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32) - maximum
    return x, tl.where(ids < vocab_size, pack(-distance(x), ids), NOTHING)


@triton.jit
def _sums_kernel(
    logits_ptr,
    token_ids_ptr,
    chunk_best_ptr,
    chunk_mass_ptr,
    chunk_ranks_ptr,
    chunk_top_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    largest = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    if not is_finite(largest):
        return
    maximum = value_of(largest)
    x, ranked = _ranked(logits_ptr, row, stride, chunk * CHUNK + tl.arange(0, CHUNK), vocab_size, maximum)
    token_id = tl.load(token_ids_ptr + row)
    _, chosen = _ranked(logits_ptr, row, stride, token_id + tl.zeros([1], tl.int64), vocab_size, maximum)
    cell = row * num_chunks + chunk
    tl.store(chunk_mass_ptr + cell, tl.sum(mass(x), axis=0))
    tl.store(chunk_ranks_ptr + cell, tl.sum((ranked > chosen).to(tl.int32), axis=0))
    tl.store(chunk_top_ptr + cell, tl.max(ranked, axis=0))


@triton.jit(do_not_specialize=["num_top"])
def _top_kernel(
    logits_ptr,
    token_ids_ptr,
    chunk_best_ptr,
    chunk_mass_ptr,
    chunk_ranks_ptr,
    chunk_top_ptr,
    chosen_ptr,
    ranks_ptr,
    top_values_ptr,
    top_ids_ptr,
    stride,
    vocab_size,
    num_chunks,
    num_top,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top_values_ptr += row * num_top
    top_ids_ptr += row * num_top
    largest = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    chosen = tl.full([], float("nan"), tl.float32)
    rank = tl.full([], 0, tl.int64)
    if is_finite(largest):
        maximum = value_of(largest)
        chunks = tl.arange(0, BLOCK_CHUNKS)
        valid = chunks < num_chunks
        cells = row * num_chunks + chunks
        total = tl.sum(tl.load(chunk_mass_ptr + cells, valid, other=0), axis=0)
        log_sum = tl.log(total.to(tl.float64) / MASS_ONE)

        token_id = tl.load(token_ids_ptr + row)
        if (token_id >= 0) & (token_id < vocab_size):
            x = tl.load(logits_ptr + row * stride + token_id).to(tl.float32) - maximum
            chosen = (x.to(tl.float64) - log_sum).to(tl.float32)
            rank = 1 + tl.sum(tl.load(chunk_ranks_ptr + cells, valid, other=0).to(tl.int64), axis=0)

        # The most probable token of each chunk among those not yet reported.
        tops = tl.load(chunk_top_ptr + cells, valid, other=NOTHING)
        for place in range(num_top):
            top = tl.max(tops, axis=0)
            top_id = id_of(top)
            value = -(-key_of(top)).to(tl.float32, bitcast=True)
            tl.store(top_values_ptr + place, (value.to(tl.float64) - log_sum).to(tl.float32))
            tl.store(top_ids_ptr + place, top_id)
            chunk = top_id // CHUNK
            _, ranked = _ranked(logits_ptr, row, stride, chunk * CHUNK + tl.arange(0, CHUNK), vocab_size, maximum)
            tops = tl.where(chunks == chunk, tl.max(tl.where(ranked < top, ranked, NOTHING), axis=0), tops)
    else:
        for place in range(num_top):
            tl.store(top_values_ptr + place, float("nan"))
            tl.store(top_ids_ptr + place, -1)
    tl.store(chosen_ptr + row, chosen)
    tl.store(ranks_ptr + row, rank)


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the raw distribution: no penalty, bias, temperature or filter.

    Args:
        logits: [num_rows, vocab_size], copied first unless columns are contiguous; vocab_size up to 2^20.
        token_ids: [num_rows] int64, the tokens to score; one outside the vocabulary gives NaN and rank 0.
        num_top: how many of the most probable tokens to report; at most vocab_size are.

    Returns:
        chosen: [num_rows] fp32, log-probability of `token_ids`.
        ranks: [num_rows] int64, 1 for the most probable token.
        top_values, top_ids: [num_rows, min(num_top, vocab_size)] fp32 and int64, most probable first.
        Equal logits rank by ascending id. A row without a finite maximum gives NaN, rank 0 and ids -1.

    Raises:
        KernelArgumentError: dtypes, devices or shapes that are not as above, or a negative num_top.
    """
    check_logits("log_probs", logits)
    num_rows, vocab_size = logits.shape
    if token_ids.shape != (num_rows,):
        refuse("log_probs", f"token_ids must have shape {(num_rows,)}; got {tuple(token_ids.shape)}")
    check_integers("log_probs", token_ids=token_ids)
    check_devices("log_probs", logits=logits, token_ids=token_ids)
    if num_top < 0:
        refuse("log_probs", f"num_top={num_top} is negative")
    num_top = min(num_top, vocab_size)

    def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    chosen, ranks = empty(torch.float32), empty(torch.int64)
    top_values, top_ids = empty(torch.float32, num_top), empty(torch.int64, num_top)
    if not num_rows:
        return chosen, ranks, top_values, top_ids
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    token_ids = token_ids.contiguous()
    chunks, block_chunks = num_chunks(vocab_size)
    chunk_best, chunk_mass, chunk_top = (empty(torch.int64, chunks) for _ in range(3))
    chunk_ranks = empty(torch.int32, chunks)
    by_chunk, by_row = (num_rows * chunks,), (num_rows,)
    shape = (logits.stride(0), vocab_size, chunks)

    _best_kernel[by_chunk](logits, chunk_best, *shape, CHUNK, **OPTIONS)
    row = (logits, token_ids, chunk_best, chunk_mass, chunk_ranks, chunk_top)
    _sums_kernel[by_chunk](*row, *shape, CHUNK, block_chunks, **OPTIONS)
    results = (chosen, ranks, top_values, top_ids)
    _top_kernel[by_row](*row, *results, *shape, num_top, CHUNK, block_chunks, **OPTIONS)
    return results

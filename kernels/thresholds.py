"""thresholds: how far below its maximum a row's tokens survive top-k and then top-p, exactly, without a sort.

Fused    Three launches; a program whose row has neither filter returns at once.
           1  chunks  count and mass of the tokens above each of 16 fixed levels.
           2  chunks  the tokens between the two levels that hold the threshold (top-k and top-p: both thresholds), as
                      a list; chunks that have none are not read.
           3  rows    the threshold, by search over the fp32 bit patterns: a step reads the list once and leaves a
                      sixteenth of the bracket, so 5 to 8 steps a filter.
Traffic  Scores twice, from L2; the list is a small part of a row except where the distribution is flat. Bound by
         arithmetic: about 150 operations a token in the first launch.
Shapes   scores [num_rows, vocab_size] -> [num_rows]
Dtypes   fp16, bf16 or fp32 scores; int32 thresholds, as probability.distance; mass in int64.
Source   top-p: arXiv:1904.09751, on what top-k left, as in ops/reference_sample.py's filter_row.
"""

import torch
import triton
import triton.language as tl

from llama_fast.kernels.probability import (
    CHUNK,
    INFINITE,
    OPTIONS,
    best_of_chunks,
    distance,
    is_finite,
    key_of,
    mass,
    num_chunks,
    scaled,
    value_of,
)

# Levels of launch 1: i^2 / 8 below the maximum for i = 1 to 15, and infinitely far below.
LEVELS = tl.constexpr(16)
# Chunks whose levels are added up at a time.
_CHUNKS = tl.constexpr(64)
# Distances that one step of the search tries, and tokens of the list that it takes at a time.
PROBES = tl.constexpr(16)
_TILE = 512


@triton.jit
def _is_cut(temperature, top_k, top_p, vocab_size):
    """Whether a row needs a threshold."""
    return (temperature > 0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1))


@triton.jit
def _levels_kernel(
    scores_ptr,
    chunk_best_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    level_counts_ptr,
    level_mass_ptr,
    list_length_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    temperature = tl.load(temperature_ptr + row)
    if not _is_cut(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab_size):
        return
    if chunk == 0:
        tl.store(list_length_ptr + row, 0)
    largest = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    if not is_finite(largest):
        return
    maximum = value_of(largest)
    cell = row * num_chunks + chunk
    nearest = scaled(value_of(key_of(tl.load(chunk_best_ptr + cell))), maximum, temperature)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores_ptr + row * stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    x = scaled(x, maximum, temperature)
    weight = mass(x)
    for level in tl.static_range(LEVELS):
        bound = -(level + 1) * (level + 1) / 8 if level + 1 < LEVELS else float("-inf")
        count = tl.full([], 0, tl.int32)
        total = tl.full([], 0, tl.int64)
        if nearest > bound:
            count = tl.sum((x > bound).to(tl.int32), axis=0)
            total = tl.sum(tl.where(x > bound, weight, 0), axis=0)
        tl.store(level_counts_ptr + cell * LEVELS + level, count)
        tl.store(level_mass_ptr + cell * LEVELS + level, total)


@triton.jit
def _level(level):
    """Distance of a level of `_levels_kernel`."""
    gap = ((level + 1) * (level + 1)).to(tl.float32) * 0.125
    return tl.where(level + 1 < LEVELS, gap.to(tl.int32, bitcast=True), INFINITE)


@triton.jit
def _first_reaching(totals, target):
    """The first level whose total is no longer below the target; LEVELS if none."""
    levels = tl.arange(0, LEVELS)
    return tl.min(tl.where(totals.to(tl.float64) < target, LEVELS, levels), axis=0)


@triton.jit
def _at(totals, level):
    """totals[level]; 0 for level -1."""
    return tl.sum(tl.where(tl.arange(0, LEVELS) == level, totals, 0), axis=0)


@triton.jit
def _bracket(level_counts_ptr, level_mass_ptr, row, top_k, top_p, vocab_size, num_chunks):
    """Where the threshold of a row lies, from the row's levels.

    Returns:
        low, high: distances; the thresholds of top-k and of top-p after it are in [low, high), as far as they exist.
        count, mass: of the tokens nearer than `low`.
        total: mass of the row.
        limits: whether top-k leaves anything out.
    """
    counts, masses = tl.zeros([LEVELS], tl.int32), tl.zeros([LEVELS], tl.int64)
    for start in range(0, num_chunks, _CHUNKS):
        chunks = start + tl.arange(0, _CHUNKS)[:, None]
        cells = (row * num_chunks + chunks) * LEVELS + tl.arange(0, LEVELS)[None, :]
        counts += tl.sum(tl.load(level_counts_ptr + cells, chunks < num_chunks, other=0), axis=0)
        masses += tl.sum(tl.load(level_mass_ptr + cells, chunks < num_chunks, other=0), axis=0)
    total = _at(masses, LEVELS - 1)

    last = _first_reaching(counts, top_k.to(tl.float64))
    limits = (top_k > 0) & (top_k < vocab_size) & (last < LEVELS)
    first = last
    if top_p < 1:
        # top-p shares out what top-k leaves: between the masses of the two levels around its threshold.
        least = tl.where(limits, _at(masses, last - 1), total)
        first = _first_reaching(masses, top_p.to(tl.float64) * least.to(tl.float64))
        last = tl.where(limits, last, first)
        first = tl.minimum(first, last)
    low = tl.where(first > 0, _level(first - 1), 0)
    return low, _level(last), _at(counts, first - 1), _at(masses, first - 1), total, limits


@triton.jit
def _list_kernel(
    scores_ptr,
    chunk_best_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    level_counts_ptr,
    level_mass_ptr,
    list_length_ptr,
    list_ptr,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not _is_cut(temperature, top_k, top_p, vocab_size):
        return
    maximum = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    if not is_finite(maximum):
        return
    low, high, _, _, _, _ = _bracket(level_counts_ptr, level_mass_ptr, row, top_k, top_p, vocab_size, num_chunks)
    nearest = value_of(key_of(tl.load(chunk_best_ptr + row * num_chunks + chunk)))
    if distance(scaled(nearest, value_of(maximum), temperature)) >= high:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores_ptr + row * stride + ids, ids < vocab_size, other=float("-inf")).to(tl.float32)
    far = distance(scaled(x, value_of(maximum), temperature))
    listed = (far >= low) & (far < high)
    places = tl.cumsum(listed.to(tl.int32), axis=0)
    # Chunks come in any order; what the list is read for, sums of integers, does not depend on it.
    start = tl.atomic_add(list_length_ptr + row, tl.max(places, axis=0))
    tl.store(list_ptr + row * vocab_size + start + places - 1, far, listed)


@triton.jit
def _sum_nearer(list_ptr, length, ends, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """Count or mass of the listed tokens nearer than each of PROBES distances."""
    total = tl.zeros([TILE, PROBES], tl.int64)
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        token = tl.load(list_ptr + places, places < length, other=INFINITE)
        weight = mass(-token.to(tl.float32, bitcast=True)) if BY_MASS else tl.full([TILE], 1, tl.int64)
        total += tl.where(token[:, None] < ends[None, :], weight[:, None], 0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(list_ptr, length, low, high, base, target, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest distance in [low, high) with a count or mass of nearer tokens, `base` included, below `target`.

    It is taken for granted of `low`. Every step leaves a sixteenth of the bracket.
    """
    while high - low > 1:
        step = (high - low + PROBES - 1) // PROBES
        ends = low + step * (1 + tl.arange(0, PROBES))
        total = base + _sum_nearer(list_ptr, length, ends, BY_MASS, TILE)
        # Totals rise with their ends; an end beyond the bracket is no answer.
        passed = (ends < high) & (total.to(tl.float64) < target)
        low += step * tl.sum(passed.to(tl.int32), axis=0)
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def _threshold_kernel(
    chunk_best_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    level_counts_ptr,
    level_mass_ptr,
    list_length_ptr,
    list_ptr,
    threshold_ptr,
    vocab_size,
    num_chunks,
    BLOCK_CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    # Every finite score survives.
    threshold = tl.full([], INFINITE - 1, tl.int32)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    maximum = key_of(best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS))
    if _is_cut(tl.load(temperature_ptr + row), top_k, top_p, vocab_size) & is_finite(maximum):
        low, high, count, nearer, total, limits = _bracket(
            level_counts_ptr, level_mass_ptr, row, top_k, top_p, vocab_size, num_chunks
        )
        listed = list_ptr + row * vocab_size
        length = tl.load(list_length_ptr + row)
        if limits:
            threshold = _search(listed, length, low, high, count.to(tl.int64), top_k.to(tl.float64), False, TILE)
        if top_p < 1:
            if limits:
                end = threshold + 1
                kept = _sum_nearer(listed, length, tl.full([PROBES], end, tl.int32), True, TILE)
                total = nearer + tl.max(kept, axis=0)
                high = end
            threshold = _search(
                listed, length, low, high, nearer, top_p.to(tl.float64) * total.to(tl.float64), True, TILE
            )
    tl.store(threshold_ptr + row, threshold)


def thresholds(
    scores: torch.Tensor,
    chunk_best: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """Thresholds of top-k and top-p; arguments as sample has checked them.

    Args:
        scores: [num_rows, vocab_size], contiguous columns.
        chunk_best: [num_rows, chunks] int64, the packed best score of each chunk.
        temperature, top_k, top_p: [num_rows], as in SamplingBatch.

    Returns:
        int32 [num_rows]: the tokens with distance((score - maximum) / temperature) up to this survive both filters.
        INFINITE - 1, all finite ones, for a row without a filter, without temperature or without a finite maximum.
    """
    num_rows, vocab_size = scores.shape
    chunks, block_chunks = num_chunks(vocab_size)

    def scratch(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=scores.device)

    level_counts, level_mass = scratch(torch.int32, chunks, LEVELS.value), scratch(torch.int64, chunks, LEVELS.value)
    list_length, listed, threshold = scratch(torch.int32), scratch(torch.int32, vocab_size), scratch(torch.int32)
    row = (chunk_best, temperature, top_k, top_p, level_counts, level_mass, list_length)
    shape = (scores.stride(0), vocab_size, chunks, CHUNK, block_chunks)
    by_chunk = (num_rows * chunks,)
    _levels_kernel[by_chunk](scores, *row, *shape, **OPTIONS)
    _list_kernel[by_chunk](scores, *row, listed, *shape, **OPTIONS)
    _threshold_kernel[(num_rows,)](*row, listed, threshold, vocab_size, chunks, block_chunks, _TILE, **OPTIONS)
    return threshold

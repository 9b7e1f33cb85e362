"""Tile sizes of every kernel, by architecture and shape: one static table, no autotuning at run time.

What decides the order of a sum (the MMA family that a tile's shape selects) is a function of architecture, dtype and
weight shape alone. What may follow the number of rows (a tile's height and width, warps, stages) changes no
bit inside one MMA family; tests/kernels/test_linear.py compares bits across every threshold in here.

`bench/tune.py` measures the free choices on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from llama_fast.kernels.arguments import INTERPRETED

# Compute capability -> the table that serves it: 86, 87, 89 and 120 share 99 KiB of shared memory and mma.sync.
TABLES = {80: 80, 86: 89, 87: 89, 89: 89, 90: 90, 100: 100, 103: 100, 120: 89, 121: 89}
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class LinearTile:
    """One program's share of a linear layer, and how it runs.

    Attributes:
        block_out: output features, the M of the MMA (weights are its A operand).
        block_rows: tokens, the N of the MMA.
        block_k: input features loaded at a time.
        step_ns: time of one input feature in a program, with one on each processor; only ratios count.
    """

    block_out: int
    block_rows: int
    block_k: int
    num_warps: int
    num_stages: int
    step_ns: float


@dataclass(frozen=True)
class AttentionTile:
    """One program of attention: `block_m` rows of queries (tokens times heads of a group) against pages of keys."""

    block_m: int
    num_warps: int
    num_stages: int


# Tables on whose hardware a generated token was shown to have the bits that it has as a prompt token.
PREFILL_EQUALS_DECODE = {90}


@lru_cache
def table_of(device: torch.device) -> int:
    """The table that serves a device; the interpreter follows 90."""
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return TABLES.get(10 * major + minor, 0)


# Multiprocessors of the largest chip that a table serves.
PROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148}

# 90: an H100 (bench/results/h100); the others: its times for like tiles, not measured.
_MMA_SYNC = (
    LinearTile(64, 16, 128, 4, 4, 3.0),
    LinearTile(64, 32, 64, 4, 5, 3.3),
    LinearTile(64, 64, 64, 4, 4, 3.8),
    LinearTile(128, 128, 32, 8, 4, 7.5),
)
_LINEAR_16_BIT: dict[int, tuple[LinearTile, ...]] = {
    80: _MMA_SYNC,
    89: _MMA_SYNC,
    90: (
        LinearTile(64, 16, 128, 4, 6, 3.0),
        LinearTile(64, 32, 128, 4, 5, 3.3),
        LinearTile(64, 64, 128, 4, 4, 3.8),
        LinearTile(64, 128, 64, 4, 4, 5.7),
        LinearTile(128, 128, 64, 8, 4, 7.5),
        LinearTile(128, 256, 64, 8, 3, 13.1),
    ),
    100: (
        LinearTile(64, 16, 128, 4, 6, 3.0),
        LinearTile(64, 32, 128, 4, 5, 3.3),
        LinearTile(64, 64, 128, 4, 4, 3.8),
        LinearTile(128, 128, 64, 8, 4, 7.5),
    ),
}
# Two weights, gate and up, share a program and its registers.
_MMA_SYNC_GATED = (
    LinearTile(64, 16, 64, 4, 4, 4.2),
    LinearTile(64, 32, 64, 4, 4, 4.7),
    LinearTile(64, 64, 64, 4, 3, 5.9),
    LinearTile(64, 128, 32, 8, 4, 8.3),
)
_LINEAR_GATED: dict[int, tuple[LinearTile, ...]] = {
    80: _MMA_SYNC_GATED,
    89: _MMA_SYNC_GATED,
    90: (
        LinearTile(64, 16, 128, 4, 4, 4.2),
        LinearTile(64, 32, 64, 4, 5, 4.7),
        LinearTile(64, 64, 64, 4, 4, 5.9),
        LinearTile(64, 128, 64, 4, 4, 8.3),
        LinearTile(128, 128, 64, 8, 3, 13.6),
    ),
    100: (
        LinearTile(64, 16, 64, 4, 4, 4.2),
        LinearTile(64, 32, 64, 4, 4, 4.7),
        LinearTile(64, 64, 64, 4, 4, 5.9),
        LinearTile(128, 128, 64, 8, 2, 13.6),
    ),
}
# fp32 has no MMA here (tf32 would not be fp32): plain multiply-adds, so small tiles.
_LINEAR_FP32 = (LinearTile(64, 16, 32, 4, 2, 16.0), LinearTile(64, 64, 16, 4, 2, 50.0))


def linear_tiles(table: int, dtype: torch.dtype, gated: bool) -> tuple[LinearTile, ...]:
    """All tiles that a linear may take; one MMA family, so the choice among them changes no bit."""
    if dtype == torch.float32:
        return _LINEAR_FP32
    return (_LINEAR_GATED if gated else _LINEAR_16_BIT)[table]


@lru_cache
def linear_tile(table: int, dtype: torch.dtype, gated: bool, out_features: int, num_rows: int) -> LinearTile:
    """The tile that takes the least time: rounds over all processors times the time of a program."""

    def time(tile: LinearTile) -> float:
        programs = -(-out_features // tile.block_out) * -(-num_rows // tile.block_rows)
        return -(-programs // PROCESSORS[table]) * tile.step_ns

    return min(linear_tiles(table, dtype, gated), key=time)


def row_thresholds(table: int, dtype: torch.dtype, gated: bool, out_features: int, most: int) -> list[int]:
    """Numbers of rows up to `most` at which another tile takes over, or the last tile gets a neighbour."""
    tiles = [linear_tile(table, dtype, gated, out_features, rows) for rows in range(1, most + 1)]
    changes = {rows for rows in range(2, most + 1) if tiles[rows - 1] != tiles[rows - 2]}
    return sorted(changes | {tile.block_rows + 1 for tile in tiles if tile.block_rows < most})


# A page is the tile of keys. The MMA takes no fewer than 16 of them; the interpreter takes any power of two.
MIN_PAGE = 1 if INTERPRETED else 16
MAX_PAGE = 128
# Programs of decode attention: several for each of a large GPU's processors, so that uneven ends even out.
GENERATED_ATTENTION_PROGRAMS = 1024


def prompt_attention_tile(table: int, dtype: torch.dtype, head_dim: int) -> AttentionTile:
    """Registers decide: an accumulator of the split and one of all splits before it are alive at once."""
    if dtype == torch.float32:
        return AttentionTile(16, 4, 1)
    if head_dim > 128:
        return AttentionTile(32, 8, 1)
    if table == 90:
        return AttentionTile(64, 4, 3)
    return AttentionTile(128, 8, 3) if head_dim <= 64 else AttentionTile(64, 8, 2)


def generated_attention_tile(table: int, dtype: torch.dtype, head_dim: int) -> AttentionTile:
    """A group of up to 16 heads fills one tile of the MMA; larger groups take several."""
    if dtype == torch.float32:
        return AttentionTile(16, 4, 1)
    return AttentionTile(16, 4, 2)


def largest_page(table: int, dtype: torch.dtype, head_dim: int) -> int:
    """Keys and values of a page lie in shared memory, once more for each further stage of loads that run ahead."""
    tiles = prompt_attention_tile(table, dtype, head_dim), generated_attention_tile(table, dtype, head_dim)
    copies = max(1, *(tile.num_stages - 1 for tile in tiles))
    slot_bytes = copies * 2 * dtype.itemsize * (1 << (head_dim - 1).bit_length())
    fits = int(0.8 * SHARED_BYTES[table]) // slot_bytes  # the rest is for queries and weights
    return min(MAX_PAGE, 1 << (fits.bit_length() - 1))


@dataclass(frozen=True)
class Int4Tile:
    """One program of int4_linear: output features by tokens; a block of 128 input features is one step."""

    block_out: int
    block_rows: int
    num_warps: int
    num_stages: int


# Programs of int4_linear unpack, so what they hold in registers decides. On 90 all tiles are wgmma. On 100 all are
# mma.sync, which 32 outputs select: tcgen05 would take a weight unpacked in registers by way of its own memory.
# None is measured.
_INT4_MMA_SYNC = (
    (16, Int4Tile(64, 16, 4, 6)),
    (32, Int4Tile(64, 32, 4, 4)),
    (None, Int4Tile(128, 64, 8, 4)),
)
_INT4_16_BIT: dict[int, tuple[tuple[int | None, Int4Tile], ...]] = {
    80: _INT4_MMA_SYNC,
    89: _INT4_MMA_SYNC,
    90: (
        (16, Int4Tile(64, 16, 4, 8)),
        (32, Int4Tile(64, 32, 4, 6)),
        (64, Int4Tile(64, 64, 4, 4)),
        (None, Int4Tile(128, 128, 8, 3)),
    ),
    100: (
        (16, Int4Tile(32, 16, 4, 8)),
        (32, Int4Tile(32, 32, 4, 6)),
        (64, Int4Tile(32, 64, 8, 4)),
        (None, Int4Tile(32, 128, 8, 3)),
    ),
}
# Groups of less than 128 need more registers than the last tile of 90 has.
_INT4_SMALL_GROUPS_90 = Int4Tile(128, 64, 8, 4)
_INT4_FP32 = ((16, Int4Tile(64, 16, 4, 2)), (None, Int4Tile(64, 32, 4, 2)))


def int4_tiles(table: int, dtype: torch.dtype, group_size: int) -> tuple[tuple[int | None, Int4Tile], ...]:
    """All tiles of int4_linear for one group size, with the most rows that each serves."""
    if dtype == torch.float32:
        return _INT4_FP32
    tiles = _INT4_16_BIT[table]
    return tiles if group_size == 128 or table != 90 else (*tiles[:-1], (None, _INT4_SMALL_GROUPS_90))


def int4_tile(table: int, dtype: torch.dtype, group_size: int, num_rows: int) -> Int4Tile:
    """The tile for a number of rows."""
    tiles = int4_tiles(table, dtype, group_size)
    return next(tile for most, tile in tiles if most is None or num_rows <= most)

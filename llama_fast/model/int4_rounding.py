"""A weight rounded to 4-bit integers in groups, each with the scale that leaves the least squared error.

Symmetric   values 0 to 15 stand for (value - 8) * scale.
Asymmetric  for (value - zero) * scale, with a zero of 0 to 15 for each group.
Search      The scale that just reaches a group's largest number spends its 16 steps on an outlier; a smaller one clips
            that and rounds all others finer. Sixteen scales are tried; one more comes from least squares, given the
            integers of the best so far. On normally distributed weights in groups of 128 the squared error falls by a
            sixth (tests/model/test_int4_rounding.py).
Source      the search as in llama.cpp's make_qx_quants and AWQ's clipping (arXiv:2306.00978); nothing here is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.ops.int4 import SYMMETRIC_ZERO, Int4Weight

_LARGEST = 15
# Shares of the scale that reaches a group's largest number.
_SHARES = tuple(1 - 0.025 * step for step in range(16))
# Elements at a time: a few fp32 tensors of the first size fit a core's cache; a GPU is busy with the second.
_CHUNK, _GPU_CHUNK = 1 << 17, 1 << 24


@dataclass
class RoundingError:
    """Sums of squares over everything that was rounded, in fp64.

    Attributes:
        signal: of the weights.
        error: of what rounding changed.
        absmax_error: of what it would have changed with scales that reach each group's largest number.
    """

    signal: float = 0.0
    error: float = 0.0
    absmax_error: float = 0.0

    def __iadd__(self, other: RoundingError) -> RoundingError:
        self.signal += other.signal
        self.error += other.error
        self.absmax_error += other.absmax_error
        return self

    def __str__(self) -> str:
        if not self.signal:
            return "all weights are zero"
        gain = 1 - self.error / self.absmax_error if self.absmax_error else 0.0
        relative = (self.error / self.signal) ** 0.5
        return f"relative error {relative:.4f}; its square is {gain:.1%} below that of scales by the largest number"


def round_weight(
    weight: Tensor, group_size: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Int4Weight, RoundingError]:
    """Round a projection's weight.

    Args:
        weight: [out_features, in_features], finite; in_features a multiple of group_size.
        symmetric: without zeros.
        dtype: of the scales.
        importance: fp32 [in_features], what an input's squared error counts (its mean square); None: all the same.

    Returns:
        The rounded weight, without bias, and what it changed.
    """
    out_features, in_features = weight.shape
    groups = in_features // group_size
    values = torch.empty((out_features, in_features), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((out_features, groups), dtype=dtype, device=weight.device)
    zeros = None if symmetric else torch.empty((out_features, groups), dtype=torch.uint8, device=weight.device)
    weighed = None if importance is None else importance.float().view(groups, group_size)
    errors = torch.zeros(3, dtype=torch.float64, device=weight.device)
    rows = max(1, (_CHUNK if weight.device.type == "cpu" else _GPU_CHUNK) // in_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        chunk = weight[part].float().view(-1, groups, group_size)
        scale, zero = fit_groups(chunk, symmetric, dtype, weighed)
        q = round_to(chunk, scale, zero)
        values[part] = q.flatten(1).to(torch.uint8)
        scales[part] = scale.to(dtype)
        if zeros is not None:
            zeros[part] = zero.to(torch.uint8)
        plain_scale, plain_zero = _plain_fit(chunk, symmetric, dtype, 1.0)
        plain = round_to(chunk, plain_scale, plain_zero)
        errors += torch.stack(
            [
                chunk.double().square().sum(),
                (chunk - _dequantized(q, scale, zero)).double().square().sum(),
                (chunk - _dequantized(plain, plain_scale, plain_zero)).double().square().sum(),
            ]
        )
    return Int4Weight(values, scales, zeros, None), RoundingError(*errors.tolist())


def fit_groups(
    chunk: Tensor, symmetric: bool, dtype: torch.dtype, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and zero of each group with the least squared error.

    Args:
        chunk: fp32 [rows, groups, group_size].
        dtype: of the scales when they are stored: those tried have its values.
        importance: fp32 [groups, group_size], or None.

    Returns:
        scale and zero, both fp32 [rows, groups].
    """
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for scale, zero in _candidates(chunk, symmetric, dtype):
        error = _error(chunk, scale, zero, importance)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    scale, zero = best  # type: ignore[misc]
    refined = _least_squares(chunk, scale, zero, dtype, importance)
    better = _error(chunk, refined, zero, importance) < least
    return torch.where(better, refined, scale), zero


def round_to(chunk: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The integers, 0 to 15 as floats, nearest to chunk / scale + zero: [rows, groups, group_size]."""
    return (chunk / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, _LARGEST)


def _dequantized(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values - zero[..., None]) * scale[..., None]


def _candidates(chunk: Tensor, symmetric: bool, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for share in _SHARES:
        yield _plain_fit(chunk, symmetric, dtype, share)


def _plain_fit(chunk: Tensor, symmetric: bool, dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor]:
    """Scales at a share of those that reach the largest number, or both ends of the range, and zeros."""
    low, high = chunk.aminmax(dim=-1)
    if symmetric:
        # Seven steps up and eight down.
        scale = _stored(torch.maximum(high / 7, -low / 8) * share, dtype)
        return scale, torch.full_like(scale, SYMMETRIC_ZERO)
    low, high = low.clamp(max=0) * share, high.clamp(min=0) * share
    # Not (high - low): that may be infinite.
    scale = _stored(high / _LARGEST - low / _LARGEST, dtype)
    return scale, (-low / scale).round_().clamp_(0, _LARGEST)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype` has it; a group of zeros gets 1, and what would be subnormal the smallest normal number."""
    scale = torch.where(scale > 0, scale, 1.0).clamp(min=torch.finfo(dtype).tiny)
    return scale.to(dtype).float()


def _error(chunk: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None) -> Tensor:
    error = _dequantized(round_to(chunk, scale, zero), scale, zero).sub_(chunk).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def _least_squares(chunk: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, importance: Tensor | None) -> Tensor:
    """The best scales for the integers that `scale` gives."""
    steps = round_to(chunk, scale, zero) - zero[..., None]
    weighed = steps if importance is None else steps * importance
    numerator, denominator = (weighed * chunk).sum(-1), (weighed * steps).sum(-1)
    refined = torch.where((numerator > 0) & (denominator > 0), numerator / denominator, scale)
    return _stored(refined, dtype)

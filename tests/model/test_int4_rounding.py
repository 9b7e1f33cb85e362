"""Rounding to 4 bits: never worse than scales by the largest number, and right where a brute-force search is."""

import pytest
import torch

from llama_fast.model.int4_rounding import round_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error_of(weight, rounded):
    return (weight.double() - rounded.dequantized(dtype=torch.float64)).square().sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_error_is_what_it_says_and_below_absmax(dtype, symmetric, group_size):
    weight = torch.randn(65, 4 * group_size).to(dtype)
    rounded, error = round_weight(weight, group_size, symmetric, dtype)
    assert rounded.values.dtype == torch.uint8 and rounded.scales.dtype == dtype and rounded.values.max() <= 15
    assert (rounded.zeros is None) == symmetric
    torch.testing.assert_close(error.error, error_of(weight, rounded), rtol=1e-4, atol=0)
    torch.testing.assert_close(error.signal, weight.double().square().sum().item(), rtol=1e-6, atol=0)
    # Plain rounding, written anew: the scale reaches the largest number.
    groups = weight.double().unflatten(1, (-1, group_size))
    if symmetric:
        scale = torch.maximum(groups.amax(-1) / 7, -groups.amin(-1) / 8).to(dtype).double()[..., None]
        plain = (groups / scale).round().clamp(-8, 7) * scale
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).to(dtype).double()[..., None]
        zero = (-low[..., None] / scale).round()
        plain = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
    torch.testing.assert_close(error.absmax_error, (groups - plain).square().sum().item(), rtol=2e-3, atol=0)
    assert error.error < 0.97 * error.absmax_error


def test_the_search_is_near_the_best_there_is():
    weight = torch.randn(40, 128)
    _, error = round_weight(weight, 128, True, torch.float32)
    best = torch.full((40,), torch.inf)
    for share in torch.linspace(0.3, 1.2, 1000):
        scale = weight.abs().amax(1, keepdim=True) / 8 * share
        best = torch.minimum(best, (weight - (weight / scale).round().clamp(-8, 7) * scale).square().sum(1))
    assert error.error < 1.01 * best.sum().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_hard_groups(dtype, symmetric):
    """Zeros, one outlier, one sign, the largest and the smallest numbers: all scales positive and normal."""
    info = torch.finfo(dtype)
    weight = torch.randn(8, 64)
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] = weight[4].sign() * info.max
    weight[5] = weight[5].sign() * info.tiny
    weight[6] = info.smallest_normal * torch.finfo(dtype).eps
    weight[7, 0] = 1e4
    rounded, _ = round_weight(weight.to(dtype), 32, symmetric, dtype)
    scales = rounded.scales.double()
    assert scales.isfinite().all() and (scales >= info.tiny).all()
    dense = rounded.dequantized(dtype=torch.float64)
    assert not dense[0].any() and dense[4].isfinite().all()
    assert (dense[2] >= 0).all() and (dense[3] <= 0).all()


def test_whole_multiples_are_kept_exactly():
    steps = torch.randint(-8, 8, (16, 64))
    steps[:, ::32], steps[:, 1::32] = -8, 7
    rounded, error = round_weight(steps * 0.25, 32, True, torch.bfloat16)
    assert torch.equal(rounded.dequantized(), (steps * 0.25).bfloat16()) and error.error == 0
    rounded, error = round_weight((steps + 3) * 0.25, 32, False, torch.bfloat16)
    assert torch.equal(rounded.dequantized(), ((steps + 3) * 0.25).bfloat16()) and error.error == 0


def test_importance_counts():
    weight, importance = torch.randn(32, 64), torch.rand(64) ** 4
    plain, _ = round_weight(weight, 64, True, torch.float32)
    weighed, _ = round_weight(weight, 64, True, torch.float32, importance)

    def error(rounded):
        return ((weight - rounded.dequantized()).square() * importance).sum()

    assert error(weighed) < error(plain)


def test_rows_do_not_depend_on_their_company():
    weight = torch.randn(3000, 128)
    whole, _ = round_weight(weight, 32, False, torch.bfloat16)
    part, _ = round_weight(weight[1500:1503], 32, False, torch.bfloat16)
    assert torch.equal(whole.values[1500:1503], part.values) and torch.equal(whole.scales[1500:1503], part.scales)

"""When a kernel's result is accurate enough: tolerances derived from PyTorch's own error or from the sum's length."""

import torch

from bench.checks import POOL, ulp

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def doubled(value):
    """Floating-point tensors as fp64, everything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_accurate(kernel, plain, draw):
    """The kernel's worst error against fp64 is at most twice plain PyTorch's in the same dtype, plus one ulp.

    Args:
        kernel, plain: functions of the same arguments, returning one tensor; `plain` on fp64 arguments is the oracle.
        draw: makes new arguments; called until POOL outputs are compared (once if the output is empty).
    """
    pooled, worst_plain, draws = 0, 0.0, []
    while pooled < POOL:
        args = draw()
        exact = plain(*map(doubled, args))
        got, rounded = kernel(*args), plain(*args)
        assert got.dtype == rounded.dtype and got.shape == rounded.shape and got.device == rounded.device
        if not got.numel():
            return
        assert exact.isfinite().all(), "the oracle overflowed: choose other inputs"
        worst_plain = max(worst_plain, (rounded.double() - exact).abs().max().item())
        draws.append((got, exact))
        pooled += got.numel()
    for got, exact in draws:
        assert got.isfinite().all(), f"{(~got.isfinite()).sum()} outputs are not finite"
        error = (got.double() - exact).abs() - ulp(exact, got.dtype)
        assert error.max() <= 2 * worst_plain, f"{error.max():.3g} beyond one ulp; PyTorch's worst is {worst_plain:.3g}"


def assert_sum_accurate(got, exact, magnitude, num_terms):
    """The error of a sum of `num_terms` products in fp32 is within 4 sqrt(K) u sum|x||w|, plus one ulp of its dtype.

    Args:
        got: the kernel's result.
        exact: the same in fp64.
        magnitude: sum of the products' absolute values, fp64.
    """
    assert got.shape == exact.shape and got.isfinite().all()
    rounding = torch.finfo(torch.float32).eps / 2
    error = (got.double() - exact).abs() - ulp(exact, got.dtype)
    bound = 4 * num_terms**0.5 * rounding * magnitude
    assert (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


def outliers(x):
    """A few entries of each row a thousand times larger, as activations of language models have."""
    x = x.clone()
    if x.numel():
        x[..., :: max(1, x.shape[-1] // 3)] *= 1000
    return x


def same_bits(a, b):
    """Equal shape, dtype and bytes; NaN equals NaN with the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

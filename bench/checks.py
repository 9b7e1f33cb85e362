"""When a kernel's result is accurate enough to be timed: the criterion that tests/kernels/accuracy.py asserts.

The worst error against fp64 is at most twice plain PyTorch's in the same dtype plus one ulp, over at least POOL
outputs; or a sum of K products in fp32 is within 4 sqrt(K) u sum|x||w|, plus one ulp of its dtype. Not tuned.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

POOL = 4096  # outputs whose worst error is compared


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of each fp64 number in `dtype`, subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny))[1] - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def worse_than_twice(results: Iterable[tuple[Tensor, Tensor, Tensor]]) -> str | None:
    """What is wrong with a kernel's results, or None.

    Args:
        results: of several draws (the kernel's, plain PyTorch's in the same dtype, fp64); taken until POOL outputs are
            compared.
    """
    worst_plain, errors, pooled = 0.0, [], 0
    for got, plain, exact in results:
        if got.shape != exact.shape or got.dtype != plain.dtype:
            return f"{got.dtype} {tuple(got.shape)} instead of {plain.dtype} {tuple(exact.shape)}"
        if not got.isfinite().all():
            return f"{int((~got.isfinite()).sum())} outputs are not finite"
        worst_plain = max(worst_plain, (plain.double() - exact).abs().max().item())
        errors.append(((got.double() - exact).abs() - ulp(exact, got.dtype)).max().item())
        pooled += got.numel()
        if pooled >= POOL:
            break
    if not errors:
        return "nothing was compared"
    if max(errors) > 2 * worst_plain:
        return f"off by {max(errors):.3g} beyond one ulp; PyTorch's worst is {worst_plain:.3g}"
    return None


def sum_inaccurate(
    got: Tensor, exact: Tensor, magnitude: Tensor, num_terms: int, rounded: Tensor | None = None
) -> str | None:
    """What is wrong with sums of `num_terms` products, or None.

    Args:
        got: the kernel's result.
        exact: the same in fp64.
        magnitude: sum of the products' absolute values, fp64.
        rounded: fp64, a part of the result that is rounded to got's dtype before it is added to the rest.
    """
    if got.shape != exact.shape or not got.isfinite().all():
        return f"{tuple(got.shape)} instead of {tuple(exact.shape)}, or not finite"
    error = (got.double() - exact).abs() - ulp(exact, got.dtype)
    if rounded is not None:
        error -= ulp(rounded, got.dtype)
    error -= 4 * num_terms**0.5 * (torch.finfo(torch.float32).eps / 2) * magnitude
    return None if (error <= 0).all() else f"off by {error.max().item():.3g} beyond the bound of a sum in fp32"

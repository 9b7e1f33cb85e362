"""rms_norm: x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight: Hugging Face's order of rounding.

Fused    mean of squares, scale, weight: one pass, a row stays in registers. The residual add in front of it is the
         epilogue of the linear before it (linear.py).
Traffic  2 * num_tokens * hidden_size * itemsize bytes (and the weight): memory-bound.
Shapes   x [num_tokens, hidden_size], weight [hidden_size] -> x's shape
Dtypes   fp16, bf16 or fp32 in and out; fp32 sum of squares.
Source   arXiv:1910.07467; rounding as transformers' LlamaRMSNorm; another order costs accuracy.
"""

import torch
import triton
import triton.language as tl

from llama_fast.kernels import configs
from llama_fast.kernels.arguments import check_tensors, contiguous, refuse
from llama_fast.kernels.overlap import begin, options

# A row must fit a program's registers: 2^15 values over 32 warps are 32 a thread. fp32 spills a few of them there; of
# 2^16 most would spill.
MAX_HIDDEN_SIZE = 2**15


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, HIDDEN_SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN_SIZE
    x = tl.load(x_ptr + row * HIDDEN_SIZE + cols, mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    # Once a row, division and root that round correctly cost nothing; the hardware's are off by up to two ulps.
    mean = tl.div_rn(tl.sum(x * x, axis=0), 1.0 * HIDDEN_SIZE)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    normed = (x * rstd).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN_SIZE + cols, (normed * weight).to(out_ptr.dtype.element_ty), mask)


def num_warps(hidden_size: int) -> int:
    """Warps of a program; part of the order of the sum, so a function of the width alone."""
    return min(32, max(1, triton.next_power_of_2(hidden_size) // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of each row.

    Args:
        x: [num_tokens, hidden_size], hidden_size up to 32,768; copied first if rows are not adjacent.
        weight: [hidden_size].
        eps: added to the mean of squares.

    Returns:
        [num_tokens, hidden_size], dtype and device of `x`.

    Raises:
        KernelArgumentError: dtypes, devices or shapes that are not as above.
    """
    check_tensors("rms_norm", x=x, weight=weight)
    if x.ndim != 2 or weight.ndim != 1 or x.shape[1] != weight.shape[0] or x.shape[1] > MAX_HIDDEN_SIZE:
        refuse(
            "rms_norm",
            f"x must be [num_tokens, hidden_size] and weight [hidden_size], at most {MAX_HIDDEN_SIZE} wide; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}",
        )
    x, weight = contiguous(x), contiguous(weight)
    out = torch.empty_like(x)
    if out.numel():
        num_tokens, hidden_size = x.shape
        block = triton.next_power_of_2(hidden_size)
        launch = {"num_warps": num_warps(hidden_size), **options(configs.table_of(x.device))}
        _rms_norm_kernel[(num_tokens,)](x, weight, out, eps, hidden_size, block, **launch)
    return out

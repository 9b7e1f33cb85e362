"""Row-invariant building blocks for plain PyTorch: a row's bits do not depend on its company.

PyTorch's CPU kernels choose their order of summation and their exp by the shape of the call: a matmul by its number of
rows, an elementwise kernel by where a value falls (vector body or scalar tail, which thread's chunk, and for some
functions which neighbours share the register). Here every call has one fixed shape, so only a row's own values matter.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Matmul height. In bf16 16 rows of zeros cost what one row costs (bound by reading the weight); in fp32 twice that.
ROW_BLOCK = 16
# Widths are padded to a multiple of 64: two AVX-512 registers of bf16, what PyTorch's vector loop takes at a time.
_LANES = 64
# Up to this many elements PyTorch runs an elementwise kernel on one thread: GELU's own limit, half of GRAIN_SIZE.
SERIAL_ELEMENTS = 16384
# fp32 matmuls narrower than this, or of odd widths, take another code path in MKL (33 -> 7 differed by row).
MATMUL_MULTIPLE = 16


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """True if autograd records an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that sums are taken in: fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pad_last(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """`x` with its last dimension zero-padded to a multiple; `x` itself where it already is one."""
    missing = -x.shape[-1] % multiple
    return F.pad(x, (0, missing)) if missing else x


def elementwise(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`fn(x)` for an elementwise `fn`, each row (last dimension) computed as if it were alone.

    Args:
        fn: elementwise function of one tensor (torch.exp, F.silu, ...) that keeps shape and dtype.
        x: [..., width]; any dtype.

    Returns:
        Tensor of x's shape. Under autograd plain `fn(x)`: training does not need the invariance.
    """
    if needs_grad(x):
        return fn(x)
    width = x.shape[-1]
    rows = pad_last(x.reshape(-1, width), _LANES).contiguous()
    if rows.numel() <= SERIAL_ELEMENTS:
        return fn(rows)[:, :width].reshape(x.shape)
    out = torch.empty_like(rows)
    rows_per_call = max(1, SERIAL_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], rows_per_call):
        for column in range(0, rows.shape[1], SERIAL_ELEMENTS):
            chunk = (slice(start, start + rows_per_call), slice(column, column + SERIAL_ELEMENTS))
            out[chunk] = fn(rows[chunk].contiguous())
    return out[:, :width].reshape(x.shape)


def in_row_blocks(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply `fn` to zero-padded blocks of ROW_BLOCK rows.

    Args:
        fn: maps [ROW_BLOCK, width] to [ROW_BLOCK, out_width], row by row.
        x: [num_rows, width]; zero rows allowed.

    Returns:
        [num_rows, out_width].
    """
    num_rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -num_rows % ROW_BLOCK)) if num_rows else x.new_zeros(ROW_BLOCK, x.shape[1])
    blocks = [fn(block) for block in padded.contiguous().split(ROW_BLOCK)]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return out[:num_rows]

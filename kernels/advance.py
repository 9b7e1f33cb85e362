"""advance: hand each row of a decoding batch the token drawn for it, and end the rows that it ends.

Fused    stop tokens, limit, position, length, count of the token, page of a row at rest, what the host reads.
Traffic  some hundred bytes a row: as long as its launch.
Shapes   tokens [n] -> [n]; buffers as engine/decode_rows.py has them
Dtypes   int64; stop mask bool, counts int32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama_fast.kernels.arguments import check_devices, check_integers, refuse

if TYPE_CHECKING:
    from llama_fast.engine.decode_rows import DecodeRows

_AT_REST = tl.constexpr(-2)  # ops/shared.py's


@triton.jit
def _advance_kernel(
    tokens_ptr,
    indices_ptr,
    out_ptr,
    token_ids_ptr,
    slots_ptr,
    seq_lens_ptr,
    limits_ptr,
    done_ptr,
    page_table_ptr,
    stop_mask_ptr,
    output_counts_ptr,
    page_table_stride,
    spare_page,
    vocab_size,
):
    place = tl.program_id(0)
    row = place.to(tl.int64)
    if indices_ptr is not None:
        row = tl.load(indices_ptr + place)
    token = tl.load(tokens_ptr + place)
    out = tl.full([], _AT_REST, tl.int64)
    if tl.load(done_ptr + row) == 0:
        out = token
        length = tl.load(seq_lens_ptr + row)
        drawn = tl.maximum(token, 0)
        cell = row * vocab_size + drawn
        stops = tl.load(stop_mask_ptr + cell) != 0
        if output_counts_ptr is not None:
            tl.store(output_counts_ptr + cell, tl.load(output_counts_ptr + cell) + (token >= 0).to(tl.int32))
        if (token < 0) | stops | (length + 1 >= tl.load(limits_ptr + row)):
            zero = tl.full([], 0, tl.int64)
            tl.store(token_ids_ptr + row, zero)
            tl.store(slots_ptr + row, zero)
            tl.store(seq_lens_ptr + row, zero + 1)
            tl.store(done_ptr + row, zero + 1)
            tl.store(page_table_ptr + row * page_table_stride, zero + spare_page)
        else:
            tl.store(token_ids_ptr + row, token)
            tl.store(slots_ptr + row, length)
            tl.store(seq_lens_ptr + row, length + 1)
    tl.store(out_ptr + place, out)


def advance(tokens: Tensor, indices: Tensor | None, rows: DecodeRows, counted: bool) -> Tensor:
    """Hand each row the token that was drawn for it: the next step runs that token, one place further.

    A row ends with a token of its stop mask, with the last token of its limit, or where no token could be drawn (-1).
    It rests from then on. Rows that were at rest stay so.

    Args:
        tokens: int64 [n], as `sample` gives them: below vocab_size.
        indices: int64 [n], the rows they are for, each at most once; None: the first n.
        rows: read and written.
        counted: whether output_counts takes the tokens.

    Returns:
        int64 [n] for the host: the token, -1 where none could be drawn, -2 for a row that was at rest.

    Raises:
        KernelArgumentError: dtypes, devices or shapes that are not as above.
    """
    given = {"tokens": tokens} if indices is None else {"tokens": tokens, "indices": indices}
    check_integers("advance", **given)
    check_devices("advance", **given, done=rows.done)
    count = tokens.numel()
    if any(tensor.shape != (count,) or not tensor.is_contiguous() for tensor in given.values()):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given.values())
        refuse("advance", f"tokens and indices must be [n] and contiguous; got {shapes}")
    if count > rows.done.shape[0]:
        refuse("advance", f"{count} tokens are more than the {rows.done.shape[0]} rows")
    out = torch.empty_like(tokens)
    if not count:
        return out
    _advance_kernel[(count,)](
        tokens,
        indices,
        out,
        rows.token_ids,
        rows.slots,
        rows.seq_lens,
        rows.limits,
        rows.done,
        rows.page_table,
        rows.stop_mask,
        rows.output_counts if counted else None,
        rows.page_table.stride(0),
        rows.spare_page,
        rows.stop_mask.shape[1],
        num_warps=1,
    )
    return out

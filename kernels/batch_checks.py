"""Indices that would lead a kernel out of its tensors: checked where that costs nothing, or on request.

On a GPU a look at their values would stop the stream, and none is taken: batches come from `pack`, whose numbers the
scheduler and the allocator have checked. LLAMA_FAST_CHECK=1 looks all the same; in the interpreter it is always done.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch import Tensor

from llama_fast.kernels.arguments import INTERPRETED, refuse

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import LayerPages

ENABLED = INTERPRETED or os.environ.get("LLAMA_FAST_CHECK") == "1"


def check_indices(op: str, batch: Batch, pages: LayerPages) -> None:
    """Every slot has a page of the pool, sequences follow each other and end where the tokens end.

    Raises:
        KernelArgumentError: they do not, and values are checked (see the module).
    """
    if not ENABLED or not batch.slots.numel():
        return
    num_seqs, table_width = batch.page_table.shape
    _in_range(op, "slots", batch.slots, table_width * pages.page_size)
    _in_range(op, "seq_ids", batch.seq_ids, num_seqs)
    _in_range(op, "page_table", batch.page_table, pages.k.shape[0])
    if (batch.seq_lens > table_width * pages.page_size).any():
        refuse(op, f"seq_lens reach {int(batch.seq_lens.max())}, beyond {table_width} pages of {pages.page_size} slots")
    starts = batch.query_starts
    if starts[0] != 0 or (starts.diff() < 0).any() or starts[-1] != batch.slots.shape[0]:
        refuse(op, f"query_starts must rise from 0 to the {batch.slots.shape[0]} tokens; got {starts.tolist()[:8]}")


def _in_range(op: str, name: str, values: Tensor, end: int) -> None:
    if values.numel() and (values.min() < 0 or values.max() >= end):
        refuse(op, f"{name} must lie in 0 to {end - 1}; got {int(values.min())} to {int(values.max())}")

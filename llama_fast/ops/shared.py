"""What every backend exports as it is: ops that PyTorch runs at memory speed, and the layers op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast.ops.transfers import to_device

if TYPE_CHECKING:
    from llama_fast.engine.decode_rows import DecodeRows
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import PagedKVCache
    from llama_fast.model.llama import DecoderLayer

# What `advance` returns for a row that was at rest.
AT_REST = -2


def embed(token_ids: Tensor, embed_tokens: nn.Embedding) -> Tensor:
    """Rows of the embedding: token_ids [num_tokens] -> [num_tokens, hidden_size]."""
    return F.embedding(token_ids, embed_tokens.weight, embed_tokens.padding_idx)


def copy_pages(pool: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """Copy whole pages in every layer, K and V: pool [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]."""
    pages = to_device([source, target], torch.int64, pool.device)
    pool[:, :, pages[1]] = pool[:, :, pages[0]]


def prepare_layers(layers: Sequence[DecoderLayer]) -> Sequence[DecoderLayer]:
    """What `run_layers` takes, of layers that are prepared themselves."""
    return layers


def run_layers(layers: Sequence[DecoderLayer], x: Tensor, batch: Batch, cache: PagedKVCache) -> Tensor:
    """x [num_tokens, hidden_size] through every layer -> the same shape; fills the cache."""
    for index, layer in enumerate(layers):
        x = layer(x, batch, cache.layer(index))
    return x


def warm_up_rows(weights: Sequence[Any], most: int) -> list[int]:
    """Numbers of rows that make a linear compile a kernel of its own: none."""
    return []


def advance(tokens: Tensor, indices: Tensor | None, rows: DecodeRows, counted: bool) -> Tensor:
    """Hand each row the token that was drawn for it: the next step runs that token, one place further.

    A row ends with a token of its stop mask, with the last token of its limit, or where no token could be drawn (-1).
    It rests from then on. Rows that were at rest stay so.

    Args:
        tokens: int64 [n], as `sample` gives them.
        indices: int64 [n], the rows they are for, each at most once; None: the first n.
        rows: read and written.
        counted: whether output_counts takes the tokens.

    Returns:
        int64 [n] for the host: the token, -1 where none could be drawn, -2 for a row that was at rest.
    """
    count = tokens.shape[0]
    if indices is None:
        every = rows.every[:count]
        rested, lengths, limits = rows.done[:count] != 0, rows.seq_lens[:count], rows.limits[:count]
    else:
        every = indices
        rested, lengths, limits = rows.done[every] != 0, rows.seq_lens[every], rows.limits[every]
    drawn = tokens.clamp(min=0)
    ends = rested | (tokens < 0) | rows.stop_mask[every, drawn] | (lengths + 1 >= limits)
    if counted:
        new = (~rested & (tokens >= 0)).to(rows.output_counts.dtype)
        rows.output_counts.index_put_((every, drawn), new, accumulate=True)
    goes_on = (~ends).to(torch.int64)
    updates = (
        (rows.token_ids, drawn * goes_on),
        (rows.slots, lengths * goes_on),
        (rows.done, 1 - goes_on),
        (rows.page_table[:, 0], torch.where(ends, rows.spare_page, rows.page_table[every, 0])),
        (rows.seq_lens, lengths * goes_on + 1),
    )
    for buffer, values in updates:
        if indices is None:
            buffer[:count] = values
        else:
            buffer[indices] = values
    return torch.where(rested, AT_REST, tokens)

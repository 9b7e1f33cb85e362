"""What every backend exports as it is: ops that PyTorch runs at memory speed, and the layers op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from llama_fast.model.batch import Batch
    from llama_fast.model.kv_cache import PagedKVCache
    from llama_fast.model.llama import DecoderLayer


def embed(token_ids: Tensor, embed_tokens: nn.Embedding) -> Tensor:
    """Rows of the embedding: token_ids [num_tokens] -> [num_tokens, hidden_size]."""
    return F.embedding(token_ids, embed_tokens.weight, embed_tokens.padding_idx)


def copy_pages(pool: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """Copy whole pages in every layer, K and V: pool [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]."""
    pool[:, :, list(target)] = pool[:, :, list(source)]


def prepare_layers(layers: Sequence[DecoderLayer]) -> Sequence[DecoderLayer]:
    """What `run_layers` takes, of layers that are prepared themselves."""
    return layers


def run_layers(layers: Sequence[DecoderLayer], x: Tensor, batch: Batch, cache: PagedKVCache) -> Tensor:
    """x [num_tokens, hidden_size] through every layer -> the same shape; fills the cache."""
    for index, layer in enumerate(layers):
        x = layer(x, batch, cache.layer(index))
    return x

"""Ops that PyTorch runs at memory speed on every device: each backend exports these as they are."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def embed(token_ids: Tensor, embed_tokens: nn.Embedding) -> Tensor:
    """Rows of the embedding: token_ids [num_tokens] -> [num_tokens, hidden_size]."""
    return F.embedding(token_ids, embed_tokens.weight, embed_tokens.padding_idx)


def copy_pages(pool: Tensor, source: Sequence[int], target: Sequence[int]) -> None:
    """Copy whole pages in every layer, K and V: pool [num_layers, 2, num_pages, num_kv_heads, page_size, head_dim]."""
    pool[:, :, list(target)] = pool[:, :, list(source)]

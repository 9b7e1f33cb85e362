"""Whole sequences through the graph, layer by layer, without an engine: for calibration, canaries and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from llama_fast.model.batch import Batch, Chunk, pack
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.llama import DecoderLayer, LlamaLM


class Sequences:
    """Sequences packed into one batch, and one layer's cache, which every layer uses in its turn.

    Args:
        model: its weights are prepared by the caller (`LlamaLM.prepare`).
        ops: the backend, or what stands in for one.
        sequences: token ids of each.
        dtype: of the hidden states, where it is not the model's.
    """

    def __init__(
        self, model: LlamaLM, ops: Any, sequences: Sequence[Sequence[int]], dtype: torch.dtype | None = None
    ) -> None:
        chunks, page = [], 0
        for token_ids in sequences:
            pages = range(page, page + -(-len(token_ids) // PAGE_SIZE))
            chunks.append(Chunk(token_ids, 0, len(token_ids), pages))
            page = pages.stop
        self.model, self.ops = model, ops
        self.batch: Batch = pack(cast(ModuleType, ops), model.model.rotary, chunks, SPLIT_SIZE, model.device)
        dtype = dtype or model.dtype
        self._cache = PagedKVCache(model.config, max(1, page), dtype=dtype, device=model.device, num_layers=1)

    def embedded(self) -> Tensor:
        """Hidden states before the first layer: [num_tokens, hidden_size]."""
        return self.ops.embed(self.batch.token_ids, self.model.model.embed_tokens)

    def layer(self, layer: DecoderLayer, hidden_states: Tensor, ops: Any = None) -> Tensor:
        """One layer's result; `ops` in the place of the backend for this layer."""
        batch = self.batch if ops is None else replace(self.batch, ops=ops)
        return layer(hidden_states, batch, self._cache.layer(0))

    def hidden_states(self) -> Iterator[Tensor]:
        """Hidden states after each layer, in ascending order."""
        hidden_states = self.embedded()
        for layer in self.model.model.layers:
            hidden_states = self.layer(cast(DecoderLayer, layer), hidden_states)
            yield hidden_states

    def last(self) -> Tensor:
        """Hidden states after the last layer: [num_tokens, hidden_size]."""
        last = self.embedded()
        for last in self.hidden_states():  # noqa: B007 - one layer's at a time
            pass
        return last

"""The static KV cache: one pool of pages, allocated once, never grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_fast.config import LlamaConfig
from llama_fast.errors import OutOfMemoryError, RequestError
from llama_fast.ops.transfers import host_empty

# The unit of allocation and of the kernels' key tile.
PAGE_SIZE = 64
# The unit of reduction: slots whose softmax is summed together; part of every result's bits.
SPLIT_SIZE = 256


@dataclass
class LayerPages:
    """One layer's view of the pool; `k` and `v` are [num_pages, num_kv_heads, page_size, head_dim].

    Under autograd the reference backend rebinds `k` and `v` to new tensors instead of writing in place. `kept` is what
    a backend keeps about them from run to run.
    """

    k: Tensor
    v: Tensor
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def page_size(self) -> int:
        return self.k.shape[2]


class PagedKVCache:
    """Pool [num_layers, 2, num_pages + 1, num_kv_heads, page_size, head_dim] of K and V.

    The page behind the others, `spare_page`, belongs to no sequence: what runs without one writes there.

    Args:
        config: gives num_hidden_layers, num_key_value_heads and head_dim.
        num_pages: pages for sequences.
        page_size: slots in a page.
        split_size: slots whose softmax is summed together; a multiple of page_size.
        dtype, device: of the pool.
        num_layers: where it is not the model's: one is enough for whole sequences, layer after layer.

    Raises:
        RequestError: a size is not positive, or split_size is not a multiple of page_size.
        OutOfMemoryError: the pool cannot be allocated.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_pages: int,
        *,
        page_size: int = PAGE_SIZE,
        split_size: int = SPLIT_SIZE,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int | None = None,
    ) -> None:
        if page_size < 1 or split_size < 1 or split_size % page_size:
            raise RequestError(f"split_size={split_size} must be a positive multiple of page_size={page_size}")
        if num_pages < 1:
            raise RequestError(
                f"a cache of num_pages={num_pages} holds nothing; give max_batch or cache_bytes more room"
            )
        self.page_size = page_size
        self.split_size = split_size
        self.num_pages = self.spare_page = num_pages
        # Views of the pool, made once: a decoding step of a small model would notice the slicing.
        self._layers: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self._pool_of_layers: Tensor | None = None
        # Uninitialised: memory is touched as pages are used, and attention never reads a slot that was not written.
        # Never in inference mode: the pool outlives the call that makes it.
        layers = config.num_hidden_layers if num_layers is None else num_layers
        shape = (layers, 2, num_pages + 1, config.num_key_value_heads, page_size, config.head_dim)
        with torch.inference_mode(False):
            try:
                self.pool = torch.empty(shape, dtype=dtype, device=device)
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one too
                size = (num_pages + 1) * self.page_bytes(config, page_size, dtype)
                raise OutOfMemoryError(
                    f"the KV cache of {num_pages} pages, {size} bytes, cannot be allocated on {device}; "
                    "lower cache_bytes, max_batch or max_seq_len"
                ) from error

    @staticmethod
    def page_bytes(config: LlamaConfig, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers, K and V."""
        slot_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        return page_size * slot_bytes

    def layer(self, index: int) -> LayerPages:
        """The view that one layer reads and writes."""
        if self._pool_of_layers is not self.pool:
            self._layers = [(layer[0], layer[1], {}) for layer in self.pool]
            self._pool_of_layers = self.pool
        return LayerPages(*self._layers[index])

    def copy_pages(self, ops: ModuleType, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy pages in every layer (a fork's partial last page)."""
        ops.copy_pages(self.pool, source, target)

    def copy_out(self, pages: Sequence[int]) -> Tensor:
        """Copy pages to the host: [len(pages), num_layers, 2, num_kv_heads, page_size, head_dim], enqueued.

        Raises:
            MemoryError, RuntimeError: there is no memory for the copy.
        """
        layers, two, _, *page_shape = self.pool.shape
        copy = host_empty((len(pages), layers, two, *page_shape), self.pool.dtype, self.pool.device)
        # Page by page: one copy of all would take as much memory of the device first.
        for page, place in zip(pages, copy, strict=True):
            place.copy_(self.pool[:, :, page], non_blocking=True)
        return copy

    def copy_in(self, copy: Tensor, pages: Sequence[int]) -> None:
        """Copy what `copy_out` gave into other pages, enqueued."""
        for page, place in zip(pages, copy, strict=True):
            self.pool[:, :, page].copy_(place, non_blocking=True)

"""How much memory the cache may take."""

from __future__ import annotations

import logging

from llama_fast.errors import OutOfMemoryError, RequestError, brief
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops.device_memory import free_bytes

logger = logging.getLogger(__name__)


def check_sizes(*, max_seq_len: int | None, cache_bytes: int | None, **sizes: int) -> None:
    """Raise RequestError unless all are positive integers, the two named ones if they are given."""
    for name, value in {**sizes, "max_seq_len": max_seq_len, "cache_bytes": cache_bytes}.items():
        optional = name not in sizes
        if not (optional and value is None) and (type(value) is not int or not 0 < value < 2**63):
            raise RequestError(f"{name}={brief(value)} must be a positive integer{' or None' if optional else ''}")


def cache_size(
    model: LlamaLM, max_batch: int, max_seq_len: int | None, cache_bytes: int | None, page_size: int
) -> tuple[int, int]:
    """How long sequences may get and how many pages they need, beside weights that are loaded.

    Without `max_seq_len` a sequence may be as long as the model is made for, or as the memory allows, which is logged.

    Returns:
        max_seq_len, and pages for max_batch such sequences or as many as the budget holds.

    Raises:
        OutOfMemoryError: the budget does not hold one sequence of `max_seq_len`, or not one page.
    """
    page_bytes = PagedKVCache.page_bytes(model.config, page_size, model.dtype)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    budget = free_bytes(model.device, weight_bytes) // 2 if cache_bytes is None else cache_bytes
    num_pages = budget // page_bytes
    context_len = model.model.rotary.context_len
    wanted = context_len if max_seq_len is None else max_seq_len
    if max_seq_len is None and 0 < num_pages * page_size < wanted:
        wanted = num_pages * page_size
        warn_of_limit(wanted, context_len, budget)
    per_sequence = -(-wanted // page_size)
    if num_pages < per_sequence:
        fits = f"use max_seq_len={num_pages * page_size} or less, or " if num_pages else ""
        raise OutOfMemoryError(
            f"one sequence of max_seq_len={wanted} needs {per_sequence * page_bytes} bytes of cache; there is "
            f"room for {budget}: {fits}raise cache_bytes"
        )
    return wanted, num_pages if cache_bytes is not None else min(num_pages, max_batch * per_sequence)


def warn_of_limit(max_seq_len: int, context_len: int, budget: int) -> None:
    """Say that sequences end earlier than the model's context."""
    logger.warning(
        "sequences are limited to %d tokens: the model is made for %d, but the cache may take %d bytes",
        max_seq_len,
        context_len,
        budget,
    )

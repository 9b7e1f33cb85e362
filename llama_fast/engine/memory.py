"""How much memory the cache may take."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from llama_fast.errors import OutOfMemoryError
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM

logger = logging.getLogger(__name__)

# Where the system does not say how much is free.
_UNKNOWN = 4 << 30


def cache_pages(model: LlamaLM, max_batch: int, max_seq_len: int, cache_bytes: int | None, page_size: int) -> int:
    """Pages for max_batch sequences, or as many as the budget holds.

    Raises:
        OutOfMemoryError: the budget does not hold one sequence of max_seq_len.
    """
    page_bytes = PagedKVCache.page_bytes(model.config, page_size, model.dtype)
    per_sequence = -(-max_seq_len // page_size)
    budget = free_bytes(model.device) // 2 if cache_bytes is None else cache_bytes
    num_pages = budget // page_bytes
    if num_pages < per_sequence:
        fits = f"use max_seq_len={num_pages * page_size} or less, or " if num_pages else ""
        raise OutOfMemoryError(
            f"one sequence of max_seq_len={max_seq_len} needs {per_sequence * page_bytes} bytes of cache; there is "
            f"room for {budget}: {fits}raise cache_bytes"
        )
    return num_pages if cache_bytes is not None else min(num_pages, max_batch * per_sequence)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        # MemAvailable counts the page cache that can be dropped; SC_AVPHYS_PAGES does not.
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        logger.info("no /proc/meminfo here; a cache without cache_bytes is sized for %d free bytes", _UNKNOWN)
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit in it
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(0, min(limits, default=_UNKNOWN))

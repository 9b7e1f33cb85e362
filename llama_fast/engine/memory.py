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
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def cache_size(
    model: LlamaLM, max_batch: int, max_seq_len: int | None, cache_bytes: int | None, page_size: int
) -> tuple[int, int]:
    """How long sequences may get and how many pages they need.

    Without `max_seq_len` a sequence may be as long as the model is made for, or as the memory allows, which is logged.

    Returns:
        max_seq_len, and pages for max_batch such sequences or as many as the budget holds.

    Raises:
        OutOfMemoryError: the budget does not hold one sequence of `max_seq_len`, or not one page.
    """
    page_bytes = PagedKVCache.page_bytes(model.config, page_size, model.dtype)
    budget = _budget(model) if cache_bytes is None else cache_bytes
    num_pages = budget // page_bytes
    wanted = model.model.rotary.context_len if max_seq_len is None else max_seq_len
    if max_seq_len is None and 0 < num_pages * page_size < wanted:
        logger.warning(
            "sequences are limited to %d tokens: the model is made for %d, but the cache may take %d bytes",
            num_pages * page_size,
            wanted,
            budget,
        )
        wanted = num_pages * page_size
    per_sequence = -(-wanted // page_size)
    if num_pages < per_sequence:
        fits = f"use max_seq_len={num_pages * page_size} or less, or " if num_pages else ""
        raise OutOfMemoryError(
            f"one sequence of max_seq_len={wanted} needs {per_sequence * page_bytes} bytes of cache; there is "
            f"room for {budget}: {fits}raise cache_bytes"
        )
    return wanted, num_pages if cache_bytes is not None else min(num_pages, max_batch * per_sequence)


def _budget(model: LlamaLM) -> int:
    """Half of what is free; on the CPU mapped weights count as free memory until they are read."""
    weights = sum(p.nbytes for p in model.parameters()) if model.device.type == "cpu" else 0
    return max(0, free_bytes(model.device) - weights) // 2


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
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or no limit in it
        stat = dict(line.split() for line in (_CONTROL_GROUP / "memory.stat").read_text().splitlines())
        page_cache = int(stat["active_file"]) + int(stat["inactive_file"])
        used = int((_CONTROL_GROUP / "memory.current").read_text()) - page_cache
        limits.append(int((_CONTROL_GROUP / "memory.max").read_text()) - used)
    return max(0, min(limits, default=_UNKNOWN))

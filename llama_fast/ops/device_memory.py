"""How much memory a device has left."""

import contextlib
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Where the system does not say how much is free.
_UNKNOWN = 4 << 30
_CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, weight_bytes: int) -> int:
    """Bytes that can still be allocated on `device` beside a model's loaded weights; 0 weight_bytes: before loading.

    A GPU's weights are taken already; on the CPU mapped ones count as free memory until they are read.
    """
    if device.type == "cuda":
        # PyTorch keeps what a deleted model had for the next one; the driver does not know that it is free.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
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
    return max(0, min(limits, default=_UNKNOWN) - weight_bytes)

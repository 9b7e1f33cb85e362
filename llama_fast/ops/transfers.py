"""Numbers on their way between host and device, without either waiting for the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values`, nested lists of numbers, as a tensor on `device`.

    torch.tensor would wait on a GPU for all that is enqueued there: it copies from memory that may be paged out.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    try:
        pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
        return pinned.to(device, non_blocking=True)
    except RuntimeError as error:
        _warn_of_plain_memory(error)
        return torch.tensor(values, dtype=dtype, device=device)


class HostRing:
    """Results on their way to the host, in the order of the steps: rows of pinned memory, each with an event.

    Args:
        depth: results that may be on their way at once.
        width: the most numbers of one.
    """

    def __init__(self, depth: int, width: int, device: torch.device) -> None:
        self._events = [torch.cuda.Event() for _ in range(depth)] if device.type == "cuda" else None
        self._rows = host_empty((depth, width), torch.int64, device)
        self._next = 0

    def push(self, values: Tensor) -> int:
        """Enqueue the copy of `values` [n] behind what the device has to do; returns where `read` finds them."""
        place, self._next = self._next, (self._next + 1) % len(self._rows)
        self._rows[place, : len(values)].copy_(values, non_blocking=True)
        if self._events is not None:
            self._events[place].record()
        return place

    def read(self, place: int, count: int) -> list[int]:
        """Wait for a copy, and for all that was enqueued before it; its first `count` numbers."""
        if self._events is not None:
            self._events[place].synchronize()
        return self._rows[place, :count].tolist()


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of the host that `device` can copy to behind the host's back; plain memory on the CPU."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _warn_of_plain_memory(error)
    return torch.empty(shape, dtype=dtype, device="cpu")


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, there once a `HostRing.read` of something pushed later has returned."""
    if tensor.device.type == "cpu":
        return tensor
    return host_empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)


@lru_cache(1)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _warn_of_plain_memory(error: RuntimeError) -> None:
    # A copy from or into plain memory waits for the device: slower, and as right.
    reason = " ".join(str(error).split())[:200]
    _warn_once(f"no pinned memory ({reason}): host and device wait for each other")

"""How a step is run again and again: captured as a CUDA graph where backend and device can, else called.

Also what the device says of memory, compilers and faults.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Step = Callable[[], None]


class EagerSteps:
    """Steps that are called: every operation is launched anew.

    Attributes:
        captures: whether `make` captures; a captured step costs memory, and is made for few sizes only.
        ahead: steps that are worth enqueueing before the host reads the first. Where a step has run when its call
            returns, one: what runs behind a sequence's end would be thrown away.
    """

    captures = False
    ahead = 1

    def make(self, step: Step) -> Step:
        """What runs `step`."""
        return step


class GraphSteps:
    """Steps captured as CUDA graphs that share one pool of memory; they must run one after the other.

    Capture the largest first: the others fit into its memory.
    """

    captures = True
    ahead = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def make(self, step: Step) -> Step:
        """Capture `step`; the call of what is returned replays it on the current stream.

        The step runs once first: a kernel compiled or loaded inside a capture would end it.

        Raises:
            torch.OutOfMemoryError: the graph's memory is not there.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            step()
            # Not torch.cuda.graph: it collects garbage and empties the allocator's cache for every capture, which takes
            # longer than the capture. Other threads may go on allocating.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                # Ends the capture too, and complains that it is broken: the first error says more.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


def step_maker(ops: ModuleType, device: torch.device, graphs: bool) -> EagerSteps | GraphSteps:
    """What makes a backend's steps on a device; `graphs` False calls them there too."""
    if graphs and ops.CAPTURABLE and device.type == "cuda":
        return GraphSteps(device)
    return EagerSteps()


def device_allocations(device: torch.device) -> int | None:
    """How often PyTorch has taken memory from the device so far; None where it does not count, as on the CPU."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.memory_stats(device).get("num_device_alloc", 0))


def compiled_kernels() -> int:
    """Triton kernels, each specialisation for itself, that this process has compiled or loaded so far."""
    count = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("llama_fast.kernels."):
            for kernel in vars(module).values():
                if getattr(kernel, "__module__", None) == name:
                    count += sum(len(caches[0]) for caches in _device_caches(kernel))
    return count


def _device_caches(kernel: Any) -> list[Any]:
    """Of a @triton.jit function: one for each device, the kernels first."""
    caches = getattr(kernel, "device_caches", None)
    return list(caches.values()) if isinstance(caches, dict) else []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left: a smaller piece of work may fit."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def is_fatal(error: BaseException) -> bool:
    """Whether the device met an error after which this process can use it no more (an illegal access, say)."""
    if is_out_of_memory(error):
        return False
    # torch.AcceleratorError, Triton's launcher and the CUDA extension say it in these words.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("CUDA error", "Triton Error [CUDA]"))

"""How a step is run again and again: captured as a CUDA graph where backend and device can, else called.

Also what the device says of memory, compilers and faults.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
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

    Every step is run with `warm_up` first, then `release` is called once, then `make` captures, the largest first: the
    others fit into its memory. A pool dies with the last of its graphs: capturing anew takes a new GraphSteps.
    """

    captures = True
    ahead = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        """Run a step as it is: a kernel compiled or loaded inside a capture would end it."""
        with self._on_stream():
            step()

    def release(self) -> None:
        """Give back what the steps' runs left in the allocator's cache, which a capture cannot take memory from."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def make(self, step: Step) -> Step:
        """Capture a step that was warmed up; the call of what is returned replays it on the current stream.

        Raises:
            torch.OutOfMemoryError: the graph's memory is not there.
        """
        graph = torch.cuda.CUDAGraph()
        with self._on_stream():
            try:
                # Not torch.cuda.graph, which empties the allocator's cache for every capture. Other threads may go on
                # allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                step()
            except BaseException:
                # Ends the capture too, and complains that it is broken: the first error says more.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay(kept: Step = step) -> None:
            # `kept`: the graph reads and writes what the step refers to.
            graph.replay()

        return replay

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Captures need a stream of their own; what runs there runs between what is enqueued before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)


def step_maker(ops: ModuleType, device: torch.device, graphs: bool) -> EagerSteps | GraphSteps:
    """What makes a backend's steps on a device; `graphs` False calls them there too."""
    if graphs and ops.CAPTURABLE and device.type == "cuda":
        return GraphSteps(device)
    return EagerSteps()


def is_current(device: torch.device) -> bool:
    """Whether streams, events and Triton mean `device` when they are told of none."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())


def survives_fork(device: torch.device) -> bool:
    """Whether a child of this process can use what was made on `device`."""
    return device.type != "cuda"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
    """Whether there was no memory left: a smaller piece of work may fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CUDA runtime when it instantiates a graph, Triton when it loads a kernel; PyTorch's allocator on the CPU.
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_fatal(error: BaseException) -> bool:
    """Whether the device met an error after which this process can use it no more (an illegal access, say)."""
    if is_out_of_memory(error):
        return False
    # torch.AcceleratorError, Triton's launcher and the CUDA extension say it in these words.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("CUDA error", "Triton Error [CUDA]"))

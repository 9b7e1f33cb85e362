"""Timing on a GPU: CUDA events around replays of a captured graph, and the two rates that bounds are made of."""

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import Summary

# Of the L2 cache, what the rotating sets of inputs hold together: a weight read again must come from memory.
_L2_MULTIPLE = 8
_MAX_SETS = 128
_MIN_SAMPLES, _MAX_SAMPLES = 20, 100
# A replay this long makes the gap before its first kernel (a few us) small beside it.
_MIN_REPLAY_US = 1000.0
_MAX_CALLS = 512


def num_sets(set_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs to rotate among; tiny ones stay in L2, as activations do between a model's kernels."""
    return min(_MAX_SETS, max(1, math.ceil(_L2_MULTIPLE * l2_bytes / max(1, set_bytes))))


class Gpu:
    """The GPU that a bench runs on, with its measured rates; a test puts another object in its place.

    Attributes:
        device, name: of the GPU.
        l2_bytes: its last cache.
        bandwidth: bytes per second of a large device-to-device copy, read and written bytes together.
        flops: FLOP per second of an 8192 x 8192 x 8192 bf16 matmul on random data.
        launch_us: of the smallest kernel in a graph: what no kernel goes below, whatever its bound says.
    """

    def __init__(self, seconds_per_case: float = 0.05) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.seconds_per_case = seconds_per_case
        # One stream for all captures: cuBLAS keeps a workspace for each that it has seen.
        self.stream = torch.cuda.Stream(self.device)
        properties = torch.cuda.get_device_properties(self.device)
        self.l2_bytes = int(properties.L2_cache_size)
        self.memory_bytes = int(properties.total_memory)
        self.bandwidth = self._copy_bandwidth()
        self.flops = self._matmul_flops()
        one = torch.ones(1, device=self.device)
        self.launch_us = self.time(one.add_, [(1.0,)]).median
        self.release()

    def time(self, function: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> Summary:
        """Microseconds of one call, over at least 20 replays of a graph in which calls take the sets in turn.

        Everything is called once before the capture: a kernel compiled or loaded inside it would end it.
        """
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for arguments in sets:
                function(*arguments)
            torch.cuda.synchronize()
            graph = _capture(function, sets, rounds=1)
            replay_us = min(_replays_us(graph, 3))
            rounds = math.ceil(_MIN_REPLAY_US / max(1.0, replay_us))
            rounds = max(1, min(rounds, _MAX_CALLS // len(sets)))
            if rounds > 1:
                graph = _capture(function, sets, rounds)
                replay_us = min(_replays_us(graph, 2))
            count = int(1e6 * self.seconds_per_case / max(1.0, replay_us))
            times = _replays_us(graph, min(_MAX_SAMPLES, max(_MIN_SAMPLES, count)))
        calls = rounds * len(sets)
        return Summary.of([us / calls for us in times])

    def release(self) -> None:
        """Give memory of finished cases and graphs back where much of it is held."""
        if torch.cuda.memory_reserved(self.device) > self.memory_bytes // 3:
            gc.collect()
            torch.cuda.empty_cache()

    # The best of several: a bound must not be beaten.

    def _copy_bandwidth(self, num_bytes: int = 2**31) -> float:
        source = torch.empty(num_bytes // 2, dtype=torch.int16, device=self.device).random_()
        target = torch.empty_like(source)
        return 2 * num_bytes / (1e-6 * self._best_us(target.copy_, (source,), 10))

    def _matmul_flops(self, width: int = 8192) -> float:
        a, b = (torch.randn(width, width, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return 2 * width**3 / (1e-6 * self._best_us(torch.matmul, (a, b), 20))

    def _best_us(self, function: Callable[..., object], arguments: tuple[Any, ...], count: int) -> float:
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            function(*arguments)
            torch.cuda.synchronize()
            return min(_replays_us(_capture(function, [arguments], rounds=1), count))


def _capture(function: Callable[..., object], sets: Sequence[tuple[Any, ...]], rounds: int) -> torch.cuda.CUDAGraph:
    """A graph of `rounds` calls on each set, replayed once.

    torch.cuda.graph would empty the allocator's cache at each capture, which takes longer than the capture.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for _ in range(rounds):
            for arguments in sets:
                function(*arguments)
    except BaseException:
        # Ends the capture too, and complains that it is broken: the first error says more.
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replays_us(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Microseconds of each of `count` replays, one queued behind the other."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    # The first replay finds an idle GPU, and its clocks: not counted.
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]

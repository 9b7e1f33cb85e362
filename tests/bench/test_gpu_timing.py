"""bench/gpu_timing.py's way through a capture and its replays, on a CUDA that is made of Python."""

import contextlib
import types

import pytest
import torch


class Cuda:
    """What gpu_timing.py calls of torch.cuda: a captured call takes `call_us`, and does nothing when replayed."""

    def __init__(self, call_us):
        self.call_us = call_us
        self.now_us = 0.0
        self.capturing = None
        self.calls_of_graphs = []
        cuda = self

        class CUDAGraph:
            def capture_begin(self):
                assert cuda.capturing is None
                cuda.capturing, self.calls = self, 0

            def capture_end(self):
                cuda.capturing = None
                cuda.calls_of_graphs.append(self.calls)

            def replay(self):
                cuda.now_us += self.calls * cuda.call_us

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now_us

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        self.CUDAGraph, self.Event = CUDAGraph, Event

    def launch(self, *arguments):
        if self.capturing is not None:
            self.capturing.calls += 1

    def synchronize(self, device=None):
        assert self.capturing is None, "a host wait inside a capture"

    @contextlib.contextmanager
    def stream(self, stream):
        yield


@pytest.fixture
def timed(bench, monkeypatch):
    """Function (us of a call): that CUDA, and a Gpu on it."""

    def make(call_us):
        cuda = Cuda(call_us)
        monkeypatch.setattr(bench, "torch", types.SimpleNamespace(cuda=cuda))
        gpu = bench.Gpu.__new__(bench.Gpu)
        gpu.stream, gpu.seconds_per_case = None, 0.05
        return cuda, gpu

    return make


@pytest.mark.parametrize(("call_us", "count"), [(0.5, 1), (2.0, 3), (2.0, 128), (300.0, 2), (40_000.0, 1)])
def test_the_time_of_a_call_is_found(timed, call_us, count):
    cuda, gpu = timed(call_us)
    summary = gpu.time(cuda.launch, [(index,) for index in range(count)])
    assert (summary.p10, summary.median, summary.p90) == pytest.approx((call_us,) * 3)
    # Every set as often as any other, in a graph that is long enough beside the gap before it, and not endless.
    calls = cuda.calls_of_graphs[-1]
    assert calls % count == 0 and calls <= 512
    assert calls * call_us >= 1000 or calls > 512 - count


def test_a_call_that_fails_ends_the_capture_and_says_why(timed):
    cuda, gpu = timed(1.0)

    def fails(index):
        if cuda.capturing is not None:
            raise ValueError("waits for the host")

    with pytest.raises(ValueError, match="waits for the host"):
        gpu.time(fails, [(0,)])
    assert cuda.capturing is None
    assert gpu.time(cuda.launch, [(0,)]).median == pytest.approx(1.0)


def test_sets_are_far_beyond_the_cache(bench):
    l2_bytes = 50 * 2**20
    for set_bytes in (2**21, 2**24, 2**26, 2**30):
        assert bench.num_sets(set_bytes, l2_bytes) * set_bytes >= 4 * l2_bytes
    assert bench.num_sets(2**40, l2_bytes) == 1 == bench.num_sets(0, 0)
    assert bench.num_sets(1, l2_bytes) == 128


def test_rates_come_from_the_best_replay(timed, bench, monkeypatch):
    _, gpu = timed(1000.0)
    gpu.device = torch.device("cpu")
    monkeypatch.setattr(gpu, "_best_us", lambda function, arguments, count: 1000.0)
    monkeypatch.setattr(bench, "torch", torch)
    # 1 MiB read and 1 MiB written, and 2 * 64^3 FLOP, in a millisecond.
    assert gpu._copy_bandwidth(2**20) == pytest.approx(2 * 2**20 / 1e-3)
    assert gpu._matmul_flops(64) == pytest.approx(2 * 64**3 / 1e-3)

"""GraphSteps with stand-ins for CUDA: the order of what it asks of streams and graphs, and what it keeps alive."""

import contextlib
import gc
import weakref

import pytest
import torch

from llama_fast.ops import gpu, reference, replay

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def said(monkeypatch):
    """What CUDA was asked for, in order."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def on(stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    pools = iter(range(10))
    for name, value in {
        "Stream": lambda device: Stream("side"),
        "current_stream": lambda device: Stream("main"),
        "graph_pool_handle": lambda: f"pool {next(pools)}",
        "CUDAGraph": Graph,
        "stream": on,
        "synchronize": lambda device: calls.append("synchronize"),
        "empty_cache": lambda: calls.append("empty cache"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


def test_a_step_is_warmed_up_captured_and_replayed(said):
    steps = replay.GraphSteps(DEVICE)

    def step():
        said.append("step")

    steps.warm_up(step)
    side = ["side waits for main", "on side"], ["off side", "main waits for side"]
    assert said == [*side[0], "step", *side[1]]
    said.clear()
    steps.release()
    assert said == ["synchronize", "empty cache"]
    said.clear()
    captured = steps.make(step)
    assert said == [*side[0], "begin pool 0 thread_local", "step", "end", *side[1]]
    said.clear()
    captured()
    captured()
    assert said == ["replay", "replay"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
def test_a_capture_that_fails_is_ended_and_the_first_error_told(said, monkeypatch, error):
    def step():
        raise error

    def complain(graph):
        said.append("end")
        raise RuntimeError("the capture is broken")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", complain)
    with pytest.raises(type(error)) as raised:
        replay.GraphSteps(DEVICE).make(step)
    assert raised.value is error
    assert said.count("end") == 1


def test_what_a_captured_step_refers_to_lives_as_long_as_the_graph(said):
    class Buffer:
        pass

    buffer = Buffer()
    alive = weakref.ref(buffer)
    captured = replay.GraphSteps(DEVICE).make(lambda kept=buffer: None)
    del buffer
    gc.collect()
    assert alive() is not None
    del captured
    gc.collect()
    assert alive() is None


def test_every_maker_has_a_pool_of_its_own(said):
    """One whose graphs are gone takes no other."""
    for _ in range(2):
        replay.GraphSteps(DEVICE).make(lambda: None)
    assert [call for call in said if call.startswith("begin")] == [
        "begin pool 0 thread_local",
        "begin pool 1 thread_local",
    ]


def test_only_a_capturable_backend_on_a_gpu_captures(said):
    cpu = torch.device("cpu")
    assert isinstance(replay.step_maker(gpu, DEVICE, True), replay.GraphSteps) == gpu.CAPTURABLE
    for ops, device, graphs in ((gpu, cpu, True), (gpu, DEVICE, False), (reference, DEVICE, True)):
        assert isinstance(replay.step_maker(ops, device, graphs), replay.EagerSteps)

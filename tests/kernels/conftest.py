"""Tests of the kernels: on a GPU as they are, elsewhere in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels           without a GPU (tests/test_kernels.py runs exactly this)
    TRITON_INTERPRET=1 pytest tests/kernels --full    ten times the random cases

A kernel is interpreted or compiled for good when it is imported, so interpreted tests have a process of their own: a
plain `pytest` without a GPU ignores this folder and starts that process.
"""

import contextlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

if INTERPRETED:
    from tests.kernels.interpreter import patch_bf16

    patch_bf16()


@pytest.fixture(scope="session")
def device():
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """`torch.empty` gives NaN, so an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def guarded(monkeypatch):
    """Context manager: outputs made by `torch.empty` lie between guard bytes; a write beside them fails the test."""
    margin = 256

    @contextlib.contextmanager
    def guard():
        buffers = []

        def empty(*shape, dtype=None, device=None):
            shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
            dtype = dtype or torch.get_default_dtype()
            size = dtype.itemsize
            count = torch.Size(shape).numel()
            raw = torch.full((2 * margin + count * size,), 0xA5, dtype=torch.uint8, device=device)
            buffers.append((raw, count * size))
            inside = raw[margin : margin + count * size].view(dtype)
            if dtype.is_floating_point:
                inside.fill_(torch.nan)
            return inside.view(shape)

        def empty_like(x):
            return empty(x.shape, dtype=x.dtype, device=x.device)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            patch.setattr(torch, "empty_like", empty_like)
            yield
        assert buffers, "nothing was allocated through torch.empty"
        for raw, size in buffers:
            outside = torch.cat((raw[:margin], raw[margin + size :]))
            assert (outside == 0xA5).all(), "a kernel wrote beside its output"

    return guard

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
    from tests.kernels.interpreter import patch_bf16, patch_fma
    from tests.kernels.nested_calls import patch_nested_calls

    patch_bf16()
    patch_fma()
    patch_nested_calls()


@pytest.fixture(scope="session")
def device():
    """Where kernels run in this process."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _overflow_checks_where_they_matter(request, monkeypatch):
    """The interpreter looks for integer overflow at every operation, a quarter of its time."""
    if INTERPRETED and "F08" not in request.node.name:
        from triton.language.semantic import TritonSemantic

        monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)


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


@pytest.fixture
def launches(monkeypatch):
    """Function (module, name of its kernel): a list that gets the grid of every launch; run=False only counts."""

    def watch(module, name, run=True):
        kernel, grids = getattr(module, name), []

        class Watched:
            def __getitem__(self, grid):
                grids.append(grid)
                return kernel[grid] if run else lambda *args, **kwargs: None

        monkeypatch.setattr(module, name, Watched())
        return grids

    return watch


@pytest.fixture
def only_programs(monkeypatch):
    """Function (indices): interpreted launches run these programs of axis 0, whatever the grid."""

    def choose(indices):
        from triton.runtime.interpreter import InterpreterBuilder

        def set_grid_idx(self, x, y, z):
            self.grid_idx = (indices[x], y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)

    return choose


@pytest.fixture
def huge(device, tmp_path):
    """Function (count, dtype): that many zeros; on the CPU a sparse file, of which only touched pages exist."""

    def make(count, dtype):
        if device.type == "cpu":
            path = tmp_path / "sparse"
            zeros = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            path.unlink()
            return zeros
        if torch.cuda.mem_get_info()[0] < 1.2 * count * dtype.itemsize:
            pytest.skip(f"needs {count * dtype.itemsize / 2**30:.1f} GiB of GPU memory")
        return torch.zeros(count, dtype=dtype, device=device)

    return make

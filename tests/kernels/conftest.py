"""Tests of the kernels: on a GPU as they are, elsewhere in Triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/kernels           without a GPU (tests/test_kernels.py runs exactly this)
    TRITON_INTERPRET=1 pytest tests/kernels --full    ten times the random cases

A kernel is interpreted or compiled for good when it is imported, so interpreted tests have a process of their own: a
plain `pytest` without a GPU ignores this folder and starts that process.
"""

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
def _unwritten_outputs_show(uninitialised_memory_is_nan):
    """Every test of a kernel."""


@pytest.fixture(scope="module")
def exact_dots():
    """tl.dot as hardware sums, whatever the tile: the interpreter's own is BLAS."""
    if INTERPRETED:
        from tests.kernels.interpreter import exact_dot

        with exact_dot():
            yield
    else:
        yield


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

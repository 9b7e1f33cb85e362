"""Fixtures of the CPU backend's tests: they run on every instruction set of this machine."""

import pytest
import torch

from llama_fast.ops.native import native

_C, _ = native()
SETS = [] if _C is None else _C.instruction_sets()
# Where the module is missing there is nothing to test; test_native.py fails if it should be there.
collect_ignore_glob = [] if SETS else ["test_cpu_*.py"]


@pytest.fixture(scope="module", params=SETS)
def instruction_set(request):
    """The kernels of each instruction set."""
    before = _C.selected()
    _C.select(request.param)
    yield request.param
    _C.select(before)


@pytest.fixture(scope="session")
def device():
    """Where the native kernels run, on every machine."""
    return torch.device("cpu")


@pytest.fixture
def threads():
    """Function (count): the number of threads from here on."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

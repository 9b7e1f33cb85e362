"""Fixtures of the CUDA kernels' tests, which need g++ or nvcc and no GPU."""

import pytest
import torch

from tests.cuda_kernels import emulation as module


@pytest.fixture(scope="session")
def device():
    """Where the emulated kernels run."""
    return torch.device("cpu")


@pytest.fixture(scope="session")
def emulated():
    """The kernels, compiled for a CPU."""
    if module.COMPILER is None:
        pytest.skip("no C++ compiler for the emulation")
    return module.emulation()

"""Fixtures shared by all tests."""

import contextlib
import os

# Before torch is imported, here and in subprocesses: on a busy machine two threads that wait for each other over tiny
# tensors are many times slower than one. Tests of thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Shared machines are slow at random; in CI a failure must be repeatable.
settings.register_profile("llama_fast", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("llama_fast")


_KERNELS_PROCESS = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="ten times as many random cases of each kernel")


def pytest_collection_finish(session):
    """Start the interpreted kernels' tests, if they are among what is run (see test_kernels.py)."""
    from tests.test_kernels import NAME, start

    config = session.config
    chosen = any(item.name == NAME for item in session.items)
    # Each of xdist's workers collects everything, and one of them will run the test.
    if (
        chosen
        and not config.option.collectonly
        and not torch.cuda.is_available()
        and not hasattr(config, "workerinput")
    ):
        config.stash[_KERNELS_PROCESS] = start(config.getoption("--full"))


def pytest_unconfigure(config):
    process, _ = config.stash.get(_KERNELS_PROCESS, (None, None))
    if process is not None and process.poll() is None:
        process.terminate()


@pytest.fixture
def kernels_process(request):
    from tests.test_kernels import start

    stash = request.config.stash
    if _KERNELS_PROCESS not in stash:
        stash[_KERNELS_PROCESS] = start(request.config.getoption("--full"))
    return stash[_KERNELS_PROCESS]


_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real checkpoints, tokenizers and vectors that are not part of this repository."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"no test data at {_SHARED_DATA}")
    return _SHARED_DATA


@pytest.fixture(autouse=True)
def _same_random_numbers_every_run():
    torch.manual_seed(0)


@pytest.fixture
def uninitialised_memory_is_nan():
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

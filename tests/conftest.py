"""Fixtures shared by all tests."""

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

"""Every bad input, each in a process of its own, as written and under `python -O`, where asserts are gone."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.server import KERNEL_MODULES, MODULES, NATIVE_MODULES, entries

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"A": 18, "B": 20, "C": 10, "D": 9, "G": 12, "I": 9}
IDS = {f"{group}{number:02}" for group, last in GROUPS.items() for number in range(1, last + 1)}
IDS |= {f"E{number:02}" for number in (1, 2, 3, 4, 6, 7, 8, 9)} | {"H01", "H03", "H04"}
KERNEL_IDS = {f"F{number:02}" for number in (1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 15)}
IN_KERNEL_TESTS = ("F08", "F09")  # sparse gigabytes, large grids
NATIVE_IDS = {f"F{number:02}" for number in (1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 16)}
IN_NATIVE_TESTS = ("F08", "F13", "F14", "F16")  # sparse gigabytes, guard bytes, forks, packages of their own


@contextlib.contextmanager
def _serving(options, **variables):
    process = subprocess.Popen(
        [sys.executable, *options, "-m", "tests.bad_inputs.server"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture(scope="module", params=[[], ["-O"]], ids=["python", "python-O"])
def server(request):
    with _serving(request.param) as process:
        yield process


@pytest.fixture(scope="module", params=[[], ["-O"]], ids=["python", "python-O"])
def kernel_server(request):
    with _serving(request.param, TRITON_INTERPRET="1") as process:
        yield process


def _try(server, name):
    print(name, file=server.stdin, flush=True)
    answer = json.loads(server.stdout.readline())
    assert answer["name"] == name
    if answer["problem"] is not None:
        pytest.fail(answer["problem"], pytrace=False)


@pytest.mark.parametrize("name", entries((*MODULES, *NATIVE_MODULES)))
def test_bad_input(server, name):
    _try(server, name)


@pytest.mark.parametrize("name", entries(KERNEL_MODULES))
def test_bad_tensors(kernel_server, name):
    _try(kernel_server, name)


def _missing(ids, modules):
    return sorted(ids - {name[:3] for name in entries(modules)})


def _untested(ids, folder, pattern):
    tests = "".join(path.read_text() for path in (ROOT / "tests" / folder).glob(pattern))
    return [entry for entry in ids if f"def test_{entry}_" not in tests]


def test_every_entry_is_there():
    assert _missing(IDS, MODULES) == []
    assert _missing(KERNEL_IDS, KERNEL_MODULES) == []
    assert _untested(IN_KERNEL_TESTS, "kernels", "test_*.py") == []
    if NATIVE_MODULES:
        assert _missing(NATIVE_IDS, NATIVE_MODULES) == []
    assert _untested(IN_NATIVE_TESTS, "ops", "test_*.py") == []

"""Every bad input, each in a process of its own, as written and under `python -O`, where asserts are gone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.server import entries

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"A": 18, "B": 20, "C": 10, "D": 9, "G": 12}
IDS = {f"{group}{number:02}" for group, last in GROUPS.items() for number in range(1, last + 1)}
IDS |= {f"E{number:02}" for number in (1, 2, 3, 4, 6, 7, 8, 9)} | {"H01", "H03", "H04"}


@pytest.fixture(scope="module", params=[[], ["-O"]], ids=["python", "python-O"])
def server(request):
    process = subprocess.Popen(
        [sys.executable, *request.param, "-m", "tests.bad_inputs.server"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("name", entries())
def test_bad_input(server, name):
    print(name, file=server.stdin, flush=True)
    answer = json.loads(server.stdout.readline())
    assert answer["name"] == name
    if answer["problem"] is not None:
        pytest.fail(answer["problem"], pytrace=False)


def test_every_entry_is_there():
    assert sorted(IDS - {name[:3] for name in entries()}) == []

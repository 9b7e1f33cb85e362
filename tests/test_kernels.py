"""The kernels' tests in Triton's interpreter: in a process of their own, since a kernel is interpreted for good.

TRITON_INTERPRET=1 pytest tests/kernels -n 2     the same by hand
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/kernels runs in this process, on the GPU")
def test_kernels_in_the_interpreter(request):
    workers = max(1, min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-n", str(workers), "-p", "no:cacheprovider"]
    if request.config.getoption("--full"):
        command.append("--full")
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True
    )
    print(run.stdout[-20_000:])
    assert run.returncode == 0, "a kernel's test failed in the interpreter; its output stands above"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n[tests/kernels in the interpreter: {run.stdout.strip().splitlines()[-1].strip('= ')}]", end=" ")

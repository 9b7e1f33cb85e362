"""The kernels' tests in Triton's interpreter: in a process of their own, since a kernel is interpreted for good.

    TRITON_INTERPRET=1 pytest tests/kernels -n 2     the same by hand

They take minutes, so tests/conftest.py starts them beside all other tests, on the cores that those leave idle.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NAME = "test_kernels_in_the_interpreter"


def start(full):
    """The running process and the file of its output."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [sys.executable, "-m", "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(min(8, max(1, cores - 1)))]
    if full:
        command.append("--full")
    output = tempfile.TemporaryFile("w+", encoding="utf-8", prefix="kernels-")  # noqa: SIM115 - read at the end
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT), output


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/kernels runs in this process, on the GPU")
def test_kernels_in_the_interpreter(kernels_process, capsys):
    process, output = kernels_process
    status = process.wait()
    output.seek(0)
    text = output.read()
    print(text[-20_000:])
    assert status == 0, "a kernel's test failed in the interpreter; its output stands above"
    with capsys.disabled():
        print(f"\n[tests/kernels in the interpreter: {text.strip().splitlines()[-1].strip('= ')}]", end=" ")

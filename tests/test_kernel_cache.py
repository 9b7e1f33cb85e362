"""Compiled kernels in Triton's cache: several processes at once, and folders that cannot be written."""

import os
import subprocess
import sys

import pytest

# Compiles one kernel for sm_90 on any machine and prints what its cubin is.
_COMPILE = """
import hashlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama_fast.kernels.silu_mul import _silu_mul_kernel as kernel

known = {"ACTIVATION": "silu", "BLOCK": 1024, "INTERMEDIATE_SIZE": 8192}
signature = {"gate_up_ptr": "*bf16", "out_ptr": "*bf16", "stride": "i32", **dict.fromkeys(known, "constexpr")}
source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, known)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(hashlib.sha256(compiled.asm["cubin"]).hexdigest())
"""


def _start(cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-c", _COMPILE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _finish(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def test_F15_processes_that_compile_at_once_leave_one_whole_entry(tmp_path):
    together = [_finish(process) for process in [_start(tmp_path) for _ in range(3)]]
    assert [code for code, _, _ in together] == [0, 0, 0], together
    (digest,) = {output for _, output, _ in together}
    assert not list(tmp_path.rglob("*.tmp*")), "a half-written file is left"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert len(files) == 1
    assert _finish(_start(tmp_path))[:2] == (0, digest)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == files, "compiled again"


@pytest.mark.parametrize("broken", ["a file", "a folder that nobody may write"])
def test_F15_a_cache_that_cannot_be_written_is_named(tmp_path, broken):
    cache = tmp_path / "cache"
    if broken == "a file":
        cache.write_text("in the way")
    else:
        cache.mkdir(mode=0o500)
        if os.access(cache, os.W_OK):
            pytest.skip("this user may write everywhere")
    code, _, errors = _finish(_start(cache))
    assert code != 0 and str(cache) in errors.strip().splitlines()[-1]

"""The interpreter as these tests patch it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about Triton's interpreter")


@triton.jit
def _square_minus(x_ptr, out_ptr, subtracted):
    x = tl.load(x_ptr + tl.arange(0, 1))
    tl.store(out_ptr + tl.arange(0, 1), tl.fma(x, x, -subtracted))


_PLAIN_ADD = """
import torch, triton, triton.language as tl

@triton.jit
def add(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.load(x_ptr))

x, out = torch.tensor([1.5], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
add[(1,)](x, out)
raise SystemExit(int(out.item() != 3.0))
"""


def test_canary_upstream_still_needs_the_bf16_patch(tmp_path):
    """When this fails, Triton computes bf16 rightly: remove patch_bf16 for that version."""
    script = tmp_path / "plain_add.py"
    script.write_text(_PLAIN_ADD)
    run = subprocess.run([sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"})
    assert run.returncode == 1


def test_bf16_rounds_to_nearest_even_and_keeps_subnormals():
    from tests.kernels.interpreter import _to_bf16, _to_fp32

    values = torch.cat((torch.randn(20_000), torch.randn(20_000) * 1e-39, torch.tensor([0.0, -0.0, torch.inf, 3.4e38])))
    ours = torch.from_numpy(_to_bf16(values.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, values.bfloat16())
    back = torch.from_numpy(_to_fp32(_to_bf16(values.numpy())))
    assert torch.equal(back, values.bfloat16().float())


def test_a_fused_multiply_add_rounds_once():
    x = torch.tensor([1 + 2**-12])
    out = torch.zeros(1)
    _square_minus[(1,)](x, out, 1 + 2**-11)
    assert out.item() == 2**-24

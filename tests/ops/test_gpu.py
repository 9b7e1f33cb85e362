"""What the GPU backend does without a kernel: weights made ready, caches refused. tests/kernels runs the rest."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from llama_fast.errors import KernelArgumentError, RequestError
from llama_fast.kernels import configs
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.ops import gpu
from tests.tiny import make_model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about compiled kernels")


def _projections(bias=False):
    torch.manual_seed(0)
    return [nn.Linear(16, rows, bias=bias).requires_grad_(False) for rows in (8, 4, 4)]


@pytest.mark.parametrize("bias", [False, True])
def test_prepare_linear_joins_parts_and_makes_them_views(bias):
    parts = _projections(bias)
    weights = [part.weight.clone() for part in parts]
    prepared = gpu.prepare_linear(parts)
    assert torch.equal(prepared.weight, torch.cat(weights))
    assert (prepared.bias is None) == (not bias)
    for part, weight in zip(parts, weights, strict=True):
        assert torch.equal(part.weight, weight)
        assert part.weight.untyped_storage().data_ptr() == prepared.weight.untyped_storage().data_ptr()
    # An optimizer's step on a part is a step on the whole.
    parts[1].weight.data[0, 0] = 7
    assert prepared.weight[8, 0] == 7
    if bias:
        assert torch.equal(prepared.bias, torch.cat([part.bias for part in parts]))


def test_prepare_linear_copies_joined_parts_only_once():
    parts = _projections()
    first = gpu.prepare_linear(parts)
    again = gpu.prepare_linear(parts)
    assert again.weight.data_ptr() == first.weight.data_ptr() and torch.equal(again.weight, first.weight)
    # Neighbours in another order are not one matrix.
    swapped = gpu.prepare_linear([parts[1], parts[0]])
    assert torch.equal(swapped.weight, torch.cat([parts[1].weight, parts[0].weight]))


def test_a_single_part_is_used_as_it_is():
    (part,) = _projections()[:1]
    assert gpu.prepare_linear([part]).weight.data_ptr() == part.weight.data_ptr()


def test_a_model_is_prepared_once_and_again_after_a_change():
    model = make_model()
    model.prepare(gpu)
    weights = [layer.qkv_proj.weight for layer in model.model.layers]
    model.prepare(gpu)
    assert all(layer.qkv_proj.weight is weight for layer, weight in zip(model.model.layers, weights, strict=True))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(1)
    model.prepare(gpu)
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[0].qkv_proj.weight[: q_proj.shape[0]], q_proj)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "dtype", "message"),
    [
        (264, 64, torch.float16, "head_dim=264 is above the 256"),
        (64, 8, torch.float16, "page_size=8 must be a power of two from 16 to 128"),
        (64, 48, torch.bfloat16, "page_size=48"),
        (256, 128, torch.float32, "from 16 to 64 for head_dim=256 in torch.float32"),
    ],
)
def test_caches_without_a_tile_are_refused(monkeypatch, head_dim, page_size, dtype, message):
    monkeypatch.setattr(configs, "table_of", lambda device: 90)
    device = torch.device("cuda")
    with pytest.raises(RequestError, match=message):
        gpu.check_cache(head_dim, page_size, dtype, device)
    gpu.check_cache(256, 64, torch.float32, device)
    gpu.check_cache(128, 128, torch.bfloat16, device)


def test_F03_a_cpu_tensor_is_refused():
    with pytest.raises(KernelArgumentError, match="x is on cpu; the kernel takes a CUDA tensor; .*backend='reference'"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)


_BROKEN_BATCH = """
from types import SimpleNamespace
import torch
from llama_fast.kernels.batch_checks import check_indices

zero = torch.zeros(1, dtype=torch.int64)
one = {"slots": zero, "seq_ids": zero, "seq_lens": zero + 1, "query_starts": torch.arange(2)}
batch = SimpleNamespace(**one, page_table=zero[None] + 9)
check_indices("attention", batch, SimpleNamespace(k=torch.zeros(2, 1, 16, 8), page_size=16))
"""


@pytest.mark.parametrize("variable", ["1", "0", None])
def test_F10_compiled_kernels_look_at_indices_on_request(variable):
    environment = {name: value for name, value in os.environ.items() if name != "LLAMA_FAST_CHECK"}
    environment |= {} if variable is None else {"LLAMA_FAST_CHECK": variable}
    run = subprocess.run([sys.executable, "-c", _BROKEN_BATCH], env=environment, capture_output=True, text=True)
    asked = variable == "1"
    assert (run.returncode != 0) == asked, run.stderr
    assert ("attention: page_table must lie in 0 to 1; got 9 to 9" in run.stderr) == asked

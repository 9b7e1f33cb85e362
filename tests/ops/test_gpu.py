"""What the GPU backend does without a kernel: weights made ready, caches refused. tests/kernels runs the rest."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from llama_fast.errors import KernelArgumentError, RequestError
from llama_fast.kernels import configs
from llama_fast.kernels.int4_linear import from_planes, to_planes
from llama_fast.kernels.rms_norm import rms_norm
from llama_fast.ops import gpu, reference
from llama_fast.ops.int4 import Int4Linear, pack_rows, unpack_rows
from llama_fast.ops.reference_int4 import int4_module_linear
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


# --- 4-bit projections ------------------------------------------------------------------------------------------------


def _int4(outs=(8, 4, 6), ins=192, group_size=64, symmetric=(True, False, True), bias=(False, False, False)):
    """Projections of random values; None for a bias where there is none."""
    torch.manual_seed(0)
    parts = []
    for height, is_symmetric, has_bias in zip(outs, symmetric, bias, strict=True):
        part = Int4Linear(ins, height, group_size=group_size, symmetric=is_symmetric, bias=has_bias)
        part.weight_scale.data.fill_(1)  # what was not written may be no scale in bf16
        part.to(torch.bfloat16)
        part.weight_packed.data = pack_rows(torch.randint(0, 16, (height, ins), dtype=torch.uint8))
        part.weight_scale.data.uniform_(0.01, 0.02)
        if not is_symmetric:
            # `to` leaves integers as they are.
            part.weight_zero_point.data = torch.randint(0, 17, (height, ins // group_size), dtype=torch.uint8)
        if has_bias:
            part.bias.data.uniform_()
        parts.append(part)
    return parts


def _state(parts):
    return [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]


def _assert_holds(parts, before):
    """What the modules say is what they said before."""
    for part, state in zip(parts, before, strict=True):
        assert torch.equal(part.rows(), state["weight_packed"])
        now = part.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
        values = part.unpacked(slice(1, 3)).values
        assert torch.equal(values, unpack_rows(state["weight_packed"])[1:3])


@pytest.mark.parametrize("ins", [32, 96, 128, 160, 192, 256, 416])
def test_words_are_repacked_and_back(monkeypatch, ins):
    monkeypatch.setattr("llama_fast.kernels.int4_linear._CHUNK_WORDS", 64)
    values = torch.randint(0, 16, (21, ins), dtype=torch.uint8)
    values[0] = 15  # the sign bits
    words = torch.zeros(-(-ins // 128), 21, 16, dtype=torch.int32)
    to_planes(pack_rows(values), words)
    for out in (0, 1, 20):
        for feature in range(ins):
            block, plane, word = feature // 128, feature % 128 // 16, feature % 16
            assert words[block, out, word] >> (4 * plane) & 15 == values[out, feature]
    assert torch.equal(from_planes(words, ins), pack_rows(values))


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (False, True, False)])
def test_prepare_linear_joins_quantized_parts_and_makes_them_views(bias):
    parts = _int4(bias=bias)
    before, x = _state(parts), torch.randn(3, 192).to(torch.bfloat16)
    expected = [int4_module_linear(x, part, torch.float32) for part in parts]
    prepared = gpu.prepare_linear(parts)
    packed = prepared.weight
    assert prepared.parts == tuple(parts) and (packed.out_features, packed.in_features, packed.group_size) == (
        18,
        192,
        64,
    )
    assert (packed.bias is None) == (not any(bias))
    _assert_holds(parts, before)
    for got, wanted in zip((int4_module_linear(x, part, torch.float32) for part in parts), expected, strict=True):
        assert torch.equal(got, wanted)
    start = 0
    for part in parts:
        outs = slice(start, start + part.out_features)
        for mine, whole in ((part.weight_packed, packed.words), (part.weight_scale, packed.scales)):
            assert mine.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        zeros = part.weight_zero_point
        expected_zeros = torch.full((3, part.out_features), 8) if zeros is None else zeros.t()
        assert torch.equal(packed.zeros[:, outs], expected_zeros.to(torch.bfloat16))
        start += part.out_features


def test_quantized_parts_are_joined_only_once():
    parts = _int4(bias=(True, True, True))
    before = _state(parts)
    first = gpu.prepare_linear(parts).weight
    again = gpu.prepare_linear(parts).weight
    for name in ("words", "scales", "bias"):
        assert getattr(again, name).data_ptr() == getattr(first, name).data_ptr()
        assert torch.equal(getattr(again, name), getattr(first, name))
    # Neighbours in another order, and some of them, are not that matrix.
    for order in ((1, 0), (1, 2)):
        anew = gpu.prepare_linear([parts[index] for index in order]).weight
        assert anew.words.data_ptr() != first.words.data_ptr()
        rows = torch.cat([before[index]["weight_packed"] for index in order])
        assert torch.equal(from_planes(anew.words, 192), rows)
        _assert_holds(parts, before)
    gpu.prepare_linear(parts)
    _assert_holds(parts, before)


def test_quantized_parts_that_another_backend_reordered():
    """Whatever it made of the words, its `restore` gives them back."""
    parts = _int4()
    before = _state(parts)
    expected = gpu.prepare_linear(_int4()).weight
    for part in parts:
        part.reorder(part.rows().t().contiguous()[None], lambda words: words[0].t().contiguous())
    prepared = gpu.prepare_linear(parts).weight
    assert torch.equal(prepared.words, expected.words) and torch.equal(prepared.scales, expected.scales)
    _assert_holds(parts, before)
    # And the other way round: the reference reads the modules, in whichever order.
    x = torch.randn(2, 192).to(torch.bfloat16)
    wanted = reference.linear(x, reference.prepare_linear(_int4()))
    assert torch.equal(reference.linear(x, reference.prepare_linear(parts)), wanted)


def test_loading_into_quantized_parts_undoes_the_order():
    parts, others = _int4(), _int4()
    gpu.prepare_linear(parts)
    for other in others:
        other.weight_packed.data = torch.randint_like(other.weight_packed, -(2**31), 2**31 - 1)
    before = _state(others)
    for part, state in zip(parts, before, strict=True):
        part.load_state_dict(state, assign=True)
    _assert_holds(parts, before)
    prepared = gpu.prepare_linear(parts).weight
    assert torch.equal(prepared.words, gpu.prepare_linear(others).weight.words)


def test_symmetric_parts_have_no_zeros():
    (part,) = _int4()[:1]
    assert gpu.prepare_linear([part]).weight.zeros is None


def test_projections_that_cannot_be_joined_are_refused():
    parts = _int4()
    message = "prepare_linear: 2 of 3 projections of one input are quantized; .* must all be or none"
    with pytest.raises(KernelArgumentError, match=message):
        gpu.prepare_linear([parts[0], nn.Linear(192, 4), parts[1]])
    with pytest.raises(KernelArgumentError, match="prepare_linear: projections of one input have groups of 32, 64;"):
        gpu.prepare_linear([parts[0], *_int4(group_size=32)[:1]])


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

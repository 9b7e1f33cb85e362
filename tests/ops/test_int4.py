"""What a quantized projection holds, and the reference backend's linear over it, against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from llama_fast.ops import reference
from llama_fast.ops.int4 import Int4Linear, Int4Weight, pack_rows, unpack_rows


def make_int4(outs, ins, group_size, dtype, symmetric=True, bias=False):
    """A module with random parameters, and its dequantized weight in fp64."""
    module = Int4Linear(ins, outs, group_size=group_size, symmetric=symmetric, bias=bias)
    values = torch.randint(0, 16, (outs, ins), dtype=torch.uint8)
    groups = ins // group_size
    module.weight_packed.data = pack_rows(values)
    module.weight_scale.data = (torch.rand(outs, groups) / ins**0.5 + 1e-3).to(dtype)
    zeros = torch.full((outs, groups), 8)
    if not symmetric:
        module.weight_zero_point.data = torch.randint(0, 17, (outs, groups), dtype=torch.uint8)
        zeros = module.weight_zero_point.data
    if bias:
        module.bias.data = torch.randn(outs).to(dtype)
    spread = [t.double().repeat_interleave(group_size, 1) for t in (zeros, module.weight_scale.data)]
    return module, (values.double() - spread[0]) * spread[1]


def test_order_of_a_word():
    values = torch.arange(16, dtype=torch.uint8).view(2, 8)
    words = pack_rows(values)
    assert words.tolist() == [[0x76543210], [int.from_bytes(bytes.fromhex("98badcfe"), "little", signed=True)]]
    assert torch.equal(unpack_rows(words), values)
    assert torch.equal(unpack_rows(pack_rows(torch.cat([values] * 3, 1))[:, 1:2]), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("outs", "ins", "group_size"), [(7, 96, 32), (1030, 128, 64), (24, 256, 128)])
def test_reference_linear(dtype, symmetric, outs, ins, group_size):
    module, dense = make_int4(outs, ins, group_size, dtype, symmetric, bias=True)
    other, other_dense = make_int4(16, ins, group_size, dtype)
    x = torch.randn(5, ins).to(dtype)
    weight = reference.prepare_linear([module, other])
    got = reference.linear(x, weight)
    exact = torch.cat([F.linear(x.double(), dense, module.bias.double()), F.linear(x.double(), other_dense)], 1)
    magnitude = F.linear(x.double().abs(), torch.cat([dense, other_dense]).abs())
    bound = 4 * ins**0.5 * 2**-24 * (magnitude + 8) + exact.abs() * torch.finfo(dtype).eps / 2
    assert got.dtype == dtype and ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(reference.linear(x[2:3], weight)[0], got[2])
    head = reference.norm_lm_head(x, norm_of_ones(ins, dtype), reference.prepare_linear([module]))
    assert head.dtype == torch.float32 and head.shape == (5, outs)


def norm_of_ones(width, dtype):
    from llama_fast.model.llama import Norm

    return Norm(torch.ones(width, dtype=dtype), 1e-5)


def test_a_backend_may_hold_the_values_in_another_order():
    module, dense = make_int4(8, 64, 32, torch.float32)
    packed = module.weight_packed.data.clone()
    module.reorder(packed.flip(0), lambda words: words.flip(0))
    assert torch.equal(module.rows(), packed)
    assert torch.equal(module.unpacked().dequantized().double(), dense.float().double())
    saved = module.state_dict()
    assert torch.equal(saved["weight_packed"], packed)
    again = Int4Linear(64, 8, group_size=32)
    again.load_state_dict(saved, assign=True)
    assert torch.equal(again.rows(), packed)
    module.load_state_dict(saved, assign=True)
    assert torch.equal(module.rows(), packed), "what is loaded is in the files' order"


def test_dequantized_of_16_bit_scales_is_exact_in_fp32():
    weight = Int4Weight(
        torch.randint(0, 16, (64, 128), dtype=torch.uint8),
        torch.rand(64, 2).to(torch.float16),
        torch.randint(0, 17, (64, 2), dtype=torch.uint8),
        None,
    )
    wide = weight.dequantized(dtype=torch.float64)
    assert torch.equal(weight.dequantized(dtype=torch.float32).double(), wide)

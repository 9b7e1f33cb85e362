"""The CUDA linear's own source on an emulated machine: accuracy, epilogues, bits of a row, what it reads and writes.

The emulation's matrix instruction sums in fp64 and rounds once; hardware sums otherwise, in an order of its own. What
follows from the kernel's indices is shown here, what the hardware makes of them is not.
"""

import pytest
import torch

from llama_fast.ops import reference
from tests.cuda_kernels import emulation as module
from tests.cuda_kernels.emulation import ACTIVATIONS, TILES
from tests.kernels.accuracy import assert_sum_accurate, outliers, same_bits, ulp

BF16, FP32 = torch.bfloat16, torch.float32
OUTS = [1, 7, 16, 17, 33, 64, 100]
INS = [8, 16, 24, 32, 40, 120, 128, 136, 256, 1000]
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70]
GATED = [name for name in ACTIVATIONS if name is not None]
# llama_fast/ops/reference.py has Hugging Face's names.
NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def draw(rows, outs, ins, gated=False):
    """x with outliers, weight, bias and residual; outputs of about 1 elsewhere."""
    height = 2 * outs if gated else outs
    x, weight = outliers(torch.randn(rows, ins)), torch.randn(height, ins) / ins**0.5
    return tuple(t.to(BF16) for t in (x, weight, torch.randn(height), torch.randn(rows, outs)))


def cases():
    """Every size at least five times, each beside others."""
    return [
        (ROWS[index % len(ROWS)], OUTS[(3 * index) % len(OUTS)], INS[(7 * index) % len(INS)])
        for index in range(5 * len(ROWS))
    ]


@pytest.mark.parametrize(("rows", "outs", "ins"), cases())
def test_accuracy(emulated, rows, outs, ins):
    x, weight, bias, _ = draw(rows, outs, ins)
    exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert_sum_accurate(emulated(x, weight, out_dtype=FP32), exact, magnitude, ins)
    assert_sum_accurate(emulated(x, weight), exact, magnitude, ins)
    with_bias = exact + bias.double(), magnitude + bias.double().abs()
    assert_sum_accurate(emulated(x, weight, bias, out_dtype=FP32), *with_bias, ins + 1)


@pytest.mark.parametrize("rows", [1, 9, 33, 70])
def test_sums_of_integers_are_exact(emulated, rows):
    x, weight = torch.randint(-3, 4, (rows, 1000)).to(BF16), torch.randint(-3, 4, (100, 1000)).to(BF16)
    for tile in TILES[False]:
        got = emulated(x, weight, out_dtype=FP32, tile=tile)
        assert torch.equal(got.double(), x.double() @ weight.double().T)


@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 16, 8), (3, 33, 136), (20, 17, 256), (70, 40, 104)])
def test_epilogues_round_where_unfused_ops_store(emulated, rows, outs, ins):
    x, weight, bias, residual = draw(rows, outs, ins)
    for added in (None, bias):
        sums = emulated(x, weight, out_dtype=FP32)
        sums = sums if added is None else sums + added.float()
        assert same_bits(emulated(x, weight, added, out_dtype=FP32), sums)
        assert same_bits(emulated(x, weight, added), sums.to(BF16))
        assert same_bits(emulated(x, weight, added, residual), sums.to(BF16) + residual)
        wide = sums.to(BF16).float() + residual.float()
        assert same_bits(emulated(x, weight, added, residual, out_dtype=FP32), wide)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 16, 8), (3, 33, 136), (20, 17, 256), (70, 40, 104)])
def test_gated_is_the_activation_of_what_would_be_stored(emulated, activation, rows, outs, ins):
    x, weight, bias, _ = draw(rows, outs, ins, gated=True)
    for added in (None, bias):
        gate, up = emulated(x, weight, added).chunk(2, dim=1)
        packed = torch.cat((gate, up), dim=1).double()
        exact = reference.silu_mul(packed, NAMES.get(activation, activation))
        for dtype in (BF16, FP32):
            got = emulated(x, weight, added, activation=activation, out_dtype=dtype)
            # The fp32 steps before the last rounding; e^x is off by |x| roundings, and 1 + erf or tanh by one of 1.
            bound = (16 + gate.double().abs()) * torch.finfo(FP32).eps * gate.double().abs() * up.double().abs()
            error = (got.double() - exact).abs() - ulp(exact, dtype)
            assert got.isfinite().all() and (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


def alone(emulated, x, *args, **options):
    return torch.cat([emulated(x[row : row + 1], *args, **options) for row in range(len(x))])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ins", [8, 40, 264, 1000])
def test_bits_of_a_row_depend_on_nothing_beside_it(emulated, gated, ins):
    """Neither on the number of rows, nor on a row's place, nor on the tile."""
    x, weight, bias, _ = draw(70, 40, ins, gated)
    options = {"activation": "silu" if gated else None, "out_dtype": FP32}
    expected = alone(emulated, x, weight, bias, **options)
    for rows in ROWS:
        assert same_bits(emulated(x[:rows], weight, bias, **options), expected[:rows]), f"{rows} rows"
    for tile in TILES[gated]:
        assert same_bits(emulated(x, weight, bias, tile=tile, **options), expected), f"tile {tile}"
        assert same_bits(emulated(x[3:4], weight, bias, tile=tile, **options), expected[3:4]), f"tile {tile}"
    order = torch.randperm(70)
    assert same_bits(emulated(x[order], weight, bias, **options), expected[order])


def test_more_rows_than_a_pass(emulated):
    x, weight, _, residual = draw(200, 33, 72)
    expected = torch.cat([emulated(x[i : i + 1], weight, None, residual[i : i + 1]) for i in range(200)])
    for rows in (63, 64, 65, 127, 128, 129, 200):
        assert same_bits(emulated(x[:rows], weight, None, residual[:rows]), expected[:rows])


def test_neighbours_that_are_not_finite_change_nothing(emulated):
    x, weight, _, _ = draw(20, 33, 72)
    expected = emulated(x, weight)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[5] = value
        got = emulated(broken, weight)
        assert not got[5].isfinite().any()
        others = torch.arange(20) != 5
        assert same_bits(got[others], expected[others])


def test_rows_that_are_apart_or_the_same(emulated):
    x, weight, _, _ = draw(20, 33, 72)
    padded = torch.full((20, 80), torch.nan, dtype=BF16)
    padded[:, :72] = x
    assert same_bits(emulated(padded[:, :72], weight), emulated(x, weight))
    assert same_bits(emulated(x[:1].expand(20, -1), weight), emulated(x[:1], weight).expand(20, -1))


def test_F08_elements_past_32_bits(emulated, huge):
    """The last block of a weight, of rows of x and of outputs that are more than 2^31 elements away."""
    ins = 16384
    weight = huge((2**31 // ins + 8) * ins, BF16).view(-1, ins)
    weight[-8:] = torch.randn(8, ins).to(BF16)
    x = torch.randn(2, ins).to(BF16)
    assert_last_block(emulated, x, weight, 8)


def test_F08_up_past_32_bits(emulated, huge):
    ins, outs = 16384, 2**30 // 16384 + 8
    weight = huge(2 * outs * ins, BF16).view(-1, ins)
    gate, up, x = (torch.randn(rows, ins).to(BF16) / 64 for rows in (8, 8, 2))
    weight[outs - 8 : outs], weight[-8:] = gate, up
    got = assert_last_block(emulated, x, weight, 8, activation="silu")
    assert same_bits(got, emulated(x, torch.cat((gate, up)), activation="silu"))


def test_F08_rows_of_x_past_32_bits(emulated, huge):
    stride = 2**24
    x = huge(136 * stride, BF16).view(136, stride)[:, :64]
    x[-8:] = torch.randn(8, 64).to(BF16)
    weight = torch.randn(16, 64).to(BF16)
    out = torch.full((136, 16), torch.nan, dtype=BF16)
    run(emulated, x, weight, out)
    assert same_bits(out[-8:], emulated(x[-8:].contiguous(), weight)) and out[:128].isnan().all()


def test_F08_outputs_past_32_bits(emulated, huge):
    rows, outs = 2**17 + 8, 2**14
    x, weight = torch.randn(rows, 8).to(BF16), torch.randn(outs, 8).to(BF16)
    out = huge(rows * outs, BF16).view(rows, outs)
    run(emulated, x, weight, out)
    assert same_bits(out[-8:, -32:], emulated(x[-8:], weight[-32:]))
    assert not out[-9].any() and not out[-8:, :-32].any() and not out[0].any()


def run(emulated, x, weight, out, activation=None):
    """The last block of a call."""
    addresses = x.data_ptr(), x.stride(0), len(x), weight.data_ptr(), 0, 0, out.data_ptr()
    sizes = out.shape[1], x.shape[1], ACTIVATIONS[activation], out.dtype == FP32
    emulated.linear(*addresses, *sizes, blocks=(-1, 1))


def assert_last_block(emulated, x, weight, outs, activation=None):
    height = len(weight) // (2 if activation else 1)
    out = torch.full((len(x), height), torch.nan, dtype=BF16)
    run(emulated, x, weight, out, activation)
    assert out[:, :-16].isnan().all()
    got = out[:, -outs:].contiguous()
    assert activation or same_bits(got, emulated(x, weight[-outs:].contiguous()))
    return got


@pytest.mark.parametrize("gated", [False, True])
def test_every_choice_of_a_tile_exists(emulated, gated):
    for rows in range(1, 200):
        for outs in (1, 16, 4095, 4096, 128256):
            assert emulated.tile(rows, outs, gated) in TILES[gated]


# What the checks above must notice, and how it shows.
MISTAKES = {
    "slices that follow the number of rows": (
        "linear.h",
        "return (chunks + kSlices - 1) / kSlices;",
        "return call.num_rows > 8 ? (chunks + 1) / 2 : (chunks + kSlices - 1) / kSlices;",
    ),
    "slices read before they are written": ("linear.h", "    barrier();\n", ""),
    "weights past a row's end": (
        "linear.h",
        "chunk + ahead < own_end ? load_weight(row + ahead, policy) : zero",
        "load_weight(row + ahead, policy)",
    ),
    "rows past the last": (
        "linear.h",
        "static_cast<int>((row < last ? row : last) * call.x_stride)",
        "static_cast<int>((row + 0 * last) * call.x_stride)",
    ),
    "registers of the matrix instruction in another order": (
        "linear.h",
        "low.x, high.x, low.y, high.y,",
        "low.x, low.y, high.x, high.y,",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_a_mistake_is_noticed(emulated, tmp_path, mistake):
    broken = module.build(tmp_path, [MISTAKES[mistake]], ["-O0", "-DLLAMA_FAST_FEW_TILES"])
    x, weight, _, _ = draw(9, 20, 1000)
    expected = emulated(x, weight, out_dtype=FP32)
    if mistake in ("weights past a row's end", "rows past the last"):
        with pytest.raises(RuntimeError, match="a load outside the operands"):
            broken(x, weight, out_dtype=FP32)
        return
    got = broken(x, weight, out_dtype=FP32)
    if mistake.startswith("slices that follow"):
        exact, magnitude = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        assert_sum_accurate(got, exact, magnitude, 1000)
        assert not same_bits(got, alone(broken, x, weight, out_dtype=FP32))
    else:
        assert not torch.equal(got, expected)


def test_control_threads_that_part_are_noticed(tmp_path):
    """A warp's matrix instruction that some of its threads leave out."""
    guard = "chunk + u * kChunk < end", "chunk + u * kChunk < own_end"
    broken = module.build(tmp_path, [("linear.h", f"if ({guard[0]})", f"if ({guard[1]})")], ["-DLLAMA_FAST_FEW_TILES"])
    x, weight, _, _ = draw(1, 16, 8)
    with pytest.raises(RuntimeError, match="threads wait for others that never come"):
        broken(x, weight)


def test_the_emulation_refuses_what_hardware_would(emulated):
    x, weight, _, _ = draw(2, 16, 24)
    with pytest.raises(RuntimeError, match="an address of 16 bytes is not aligned"):
        emulated(x[:, :16].flatten()[1:17][None], weight[:, :16].contiguous())

"""The CUDA int4_linear's own source on an emulated machine: accuracy, epilogues, bits of a row, what it touches.

The emulation's matrix instruction sums in fp64 and rounds once; hardware sums otherwise, in an order of its own. What
follows from the kernel's indices is shown here, what the hardware makes of them is not.
"""

from dataclasses import replace

import pytest
import torch

from llama_fast.ops import reference
from llama_fast.ops.int4 import Int4Weight
from tests.cuda_kernels import emulation as module
from tests.cuda_kernels.emulation import ACTIVATIONS, DEPTHS, DEVICES, TILES, num_slices, packed_of, tiles_of
from tests.kernels.accuracy import assert_sum_accurate, outliers, same_bits, ulp

BF16, FP32 = torch.bfloat16, torch.float32
OUTS = [2, 6, 16, 18, 34, 64, 100]
# In groups: one of each position in a block and in a step, one past a step, slices that are empty or uneven.
GROUPS = {32: [1, 2, 3, 4, 5, 7, 8, 9, 33], 64: [1, 2, 3, 4, 5, 17], 128: [1, 2, 3, 8, 9]}
ROWS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 70]
GATED = [name for name in ACTIVATIONS if name is not None]
# llama_fast/ops/reference.py has Hugging Face's names.
NAMES = {"gelu_tanh": "gelu_pytorch_tanh"}


def draw(rows, outs, ins, group_size=64, has_zeros=True, has_bias=False, gated=False):
    """x with outliers, a weight whose outputs are about 1 elsewhere, and a residual."""
    height, groups = 2 * outs if gated else outs, ins // group_size
    weight = Int4Weight(
        torch.randint(0, 16, (height, ins), dtype=torch.uint8),
        (torch.randn(height, groups) / 5 / ins**0.5).to(BF16),
        torch.randint(0, 17, (height, groups), dtype=torch.uint8) if has_zeros else None,
        torch.randn(height).to(BF16) if has_bias else None,
    )
    return outliers(torch.randn(rows, ins)).to(BF16), weight, torch.randn(rows, outs).to(BF16)


def cases():
    """(rows, outs, ins, group size, whether there are zeros): every size several times, each beside others."""
    sizes = [(size, groups) for size, counts in GROUPS.items() for groups in counts]
    return [
        (ROWS[index % len(ROWS)], OUTS[(3 * index) % len(OUTS)], size * groups, size, index % 3 > 0)
        for index, (size, groups) in enumerate(sizes * 3)
    ]


def bounds(x, weight):
    """The exact product and the sum of magnitudes."""
    dense = weight.dequantized(dtype=torch.float64)
    exact, magnitude = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if weight.bias is None:
        return exact, magnitude
    return exact + weight.bias.double(), magnitude + weight.bias.double().abs()


@pytest.mark.parametrize(("rows", "outs", "ins", "group_size", "has_zeros"), cases())
def test_accuracy(emulated, rows, outs, ins, group_size, has_zeros):
    x, weight, _ = draw(rows, outs, ins, group_size, has_zeros)
    for dtype in (FP32, BF16):
        assert_sum_accurate(emulated(x, packed_of(weight), out_dtype=dtype), *bounds(x, weight), ins)
    weight = replace(weight, bias=torch.randn(outs).to(BF16))
    assert_sum_accurate(emulated(x, packed_of(weight), out_dtype=FP32), *bounds(x, weight), ins + 1)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(2, 18, 4096), (1, 16, 8192), (3, 4, 14336)])
def test_accuracy_of_long_sums(emulated, rows, outs, ins, group_size):
    x, weight, _ = draw(rows, outs, ins, group_size)
    assert_sum_accurate(emulated(x, packed_of(weight), out_dtype=FP32), *bounds(x, weight), ins)


@pytest.mark.parametrize("rows", [1, 9, 33, 70])
@pytest.mark.parametrize("group_size", GROUPS)
def test_sums_of_integers_are_exact(emulated, rows, group_size):
    """Every value, zero and place counts: scales are powers of two and nothing is rounded."""
    x, weight, _ = draw(rows, 38, 1152, group_size)
    x = torch.randint(-3, 4, x.shape).to(BF16)
    weight = replace(weight, scales=2.0 ** torch.randint(-2, 3, weight.scales.shape).to(BF16))
    exact = x.double() @ weight.dequantized(dtype=torch.float64).T
    for tile in tiles_of(False, 1152):
        for depth in DEPTHS:
            assert torch.equal(emulated(x, packed_of(weight), out_dtype=FP32, tile=(*tile, depth)).double(), exact)


SHAPES = [(1, 16, 64), (3, 34, 192), (20, 18, 256), (70, 40, 128)]


@pytest.mark.parametrize(("rows", "outs", "ins"), SHAPES)
def test_epilogues_round_where_unfused_ops_store(emulated, rows, outs, ins):
    x, weight, residual = draw(rows, outs, ins)
    plain = packed_of(weight)
    for bias in (None, torch.randn(outs).to(BF16)):
        packed = replace(plain, bias=bias)
        sums = emulated(x, plain, out_dtype=FP32)
        sums = sums if bias is None else sums + bias.float()
        assert same_bits(emulated(x, packed, out_dtype=FP32), sums)
        assert same_bits(emulated(x, packed), sums.to(BF16))
        assert same_bits(emulated(x, packed, residual), sums.to(BF16) + residual)
        wide = sums.to(BF16).float() + residual.float()
        assert same_bits(emulated(x, packed, residual, out_dtype=FP32), wide)


@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize(("rows", "outs", "ins"), SHAPES)
def test_gated_is_the_activation_of_what_would_be_stored(emulated, activation, rows, outs, ins):
    for has_bias in (False, True):
        x, weight, _ = draw(rows, outs, ins, has_bias=has_bias, gated=True)
        packed = packed_of(weight)
        gate, up = emulated(x, packed).chunk(2, dim=1)
        both = torch.cat((gate, up), dim=1).double()
        exact = reference.silu_mul(both, NAMES.get(activation, activation))
        for dtype in (BF16, FP32):
            got = emulated(x, packed, activation=activation, out_dtype=dtype)
            # The fp32 steps before the last rounding; e^x is off by |x| roundings, and 1 + erf or tanh by one of 1.
            bound = (16 + gate.double().abs()) * torch.finfo(FP32).eps * gate.double().abs() * up.double().abs()
            error = (got.double() - exact).abs() - ulp(exact, dtype)
            assert got.isfinite().all() and (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


def alone(emulated, x, packed, **options):
    return torch.cat([emulated(x[row : row + 1], packed, **options) for row in range(len(x))])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ins", "group_size"), [(32, 32), (160, 32), (320, 64), (1152, 128)])
def test_bits_of_a_row_depend_on_nothing_beside_it(emulated, gated, ins, group_size):
    """Neither on the number of rows, nor on a row's place, nor on the tile, nor on how far copies run ahead."""
    x, weight, _ = draw(70, 40, ins, group_size, has_bias=True, gated=gated)
    packed, options = packed_of(weight), {"activation": "silu" if gated else None, "out_dtype": FP32}
    expected = alone(emulated, x, packed, **options)
    for rows in ROWS:
        assert same_bits(emulated(x[:rows], packed, **options), expected[:rows]), f"{rows} rows"
    for tile in tiles_of(gated, ins):
        for depth in DEPTHS:
            of_tile = {"tile": (*tile, depth), **options}
            assert same_bits(emulated(x[:17], packed, **of_tile), expected[:17]), f"tile {tile}, {depth}"
            assert same_bits(emulated(x[3:4], packed, **of_tile), expected[3:4]), f"tile {tile}, {depth}"
    order = torch.randperm(70)
    assert same_bits(emulated(x[order], packed, **options), expected[order])


def test_bits_of_a_row_with_eight_slices(emulated):
    """Rounds of all tiles: eight slices at a time, four and two; the last ones are shorter."""
    ins = 8192 + 256 * 3 + 64
    assert num_slices(ins) == 8
    x, weight, _ = draw(17, 18, ins)
    packed = packed_of(weight)
    expected = emulated(x[:1], packed, out_dtype=FP32)
    for tile in tiles_of(False, ins):
        for depth in DEPTHS:
            assert same_bits(emulated(x, packed, out_dtype=FP32, tile=(*tile, depth))[:1], expected), f"tile {tile}"
    x, weight, _ = draw(9, 16, 8192, gated=True)
    packed = packed_of(weight)
    expected = emulated(x[:1], packed, activation="silu")
    for tile in tiles_of(True, 8192):
        assert same_bits(emulated(x, packed, activation="silu", tile=(*tile, 2))[:1], expected), f"tile {tile}"


def test_more_rows_than_a_pass(emulated):
    x, weight, residual = draw(130, 34, 64)
    packed = packed_of(weight)
    expected = torch.cat([emulated(x[i : i + 1], packed, residual[i : i + 1]) for i in range(130)])
    for rows in (32, 33, 63, 64, 65, 128, 129, 130):
        assert same_bits(emulated(x[:rows], packed, residual[:rows]), expected[:rows])


def test_neighbours_that_are_not_finite_change_nothing(emulated):
    x, weight, _ = draw(20, 34, 192)
    packed = packed_of(weight)
    expected = emulated(x, packed)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[5] = value
        got = emulated(broken, packed)
        assert not got[5].isfinite().any()
        others = torch.arange(20) != 5
        assert same_bits(got[others], expected[others])
    # A scale that is not finite stays in its output.
    weight.scales[33, 1] = torch.nan
    got = emulated(x, packed_of(weight))
    assert same_bits(got[:, :33], expected[:, :33]) and got[:, 33].isnan().all()


def test_rows_that_are_apart_or_the_same(emulated):
    x, weight, _ = draw(20, 34, 192)
    packed = packed_of(weight)
    padded = torch.full((20, 200), torch.nan, dtype=BF16)
    padded[:, :192] = x
    assert same_bits(emulated(padded[:, :192], packed), emulated(x, packed))
    assert same_bits(emulated(x[:1].expand(20, -1), packed), emulated(x[:1], packed).expand(20, -1))


def test_F08_words_past_32_bits(emulated, huge):
    """The last block of words, scales and zeros that are more than 2^31 elements away."""
    outs, ins = 2**24 + 64, 1024
    x, last, _ = draw(2, 64, ins, 128, has_zeros=False)
    packed = packed_of(last)
    words = huge(8 * outs * 16, torch.int32).view(8, outs, 16)
    scales = torch.zeros(8, outs, dtype=BF16)
    words[:, -64:], scales[:, -64:] = packed.words, packed.scales
    far = replace(packed, words=words, scales=scales)
    out = torch.full((2, outs), torch.nan, dtype=BF16)
    run(emulated, x, far, out)
    assert same_bits(out[:, -16:].contiguous(), emulated(x, packed)[:, -16:].contiguous())
    assert out[:, :-16].isnan().all()


def test_F08_rows_of_x_past_32_bits(emulated, huge):
    stride = 2**24
    x = huge(136 * stride, BF16).view(136, stride)[:, :64]
    near, weight, _ = draw(8, 16, 64)
    x[-8:] = near
    packed = packed_of(weight)
    out = torch.full((136, 16), torch.nan, dtype=BF16)
    run(emulated, x, packed, out)
    assert same_bits(out[-8:], emulated(near, packed)) and out[:128].isnan().all()


def test_F08_outputs_past_32_bits(emulated, huge):
    rows, outs = 2**17 + 8, 2**14
    x, weight, _ = draw(rows, outs, 32, 32)
    packed = packed_of(weight)
    out = huge(rows * outs, BF16).view(rows, outs)
    run(emulated, x, packed, out)
    last = packed_of(Int4Weight(weight.values[-64:], weight.scales[-64:], weight.zeros[-64:], None))
    assert same_bits(out[-8:, -64:].contiguous(), emulated(x[-8:], last))
    assert not out[-9].any() and not out[-8:, :-64].any() and not out[0].any()


def run(emulated, x, packed, out):
    """The last block of a call."""
    addresses = x.data_ptr(), x.stride(0), len(x), packed.words.data_ptr(), packed.scales.data_ptr()
    others = 0 if packed.zeros is None else packed.zeros.data_ptr(), 0, 0, out.data_ptr()
    sizes = out.shape[1], packed.in_features, packed.group_size, 0, out.dtype == FP32
    emulated.int4_linear(*addresses, *others, *sizes, blocks=(-1, 1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("arch", DEVICES)
def test_every_choice_of_a_tile_exists_and_fits(emulated, gated, arch):
    for rows in range(1, 140):
        for ins in (32, 4096, 8192, 14336):
            for group_size in GROUPS:
                (*tile, depth), taken = emulated.tile(rows, ins, group_size, gated, DEVICES[arch])
                assert tuple(tile) in tiles_of(gated, ins) and depth in DEPTHS
                assert 0 < taken <= DEVICES[arch][0]
                # What a few rows need leaves room for a second block, where it decides the speed.
                if arch in (90, 100) and rows <= 8 and group_size > 32:
                    assert 2 * taken + 1024 <= DEVICES[arch][0]
                if arch in (90, 100):
                    assert tile[0] == (1 if rows <= 8 else 2 if rows <= 16 else 4)
    assert emulated.tile(1, 4096, 128, gated, (1024, 132, 9)) == ((0, 0, 0, 0), 0)


# What the checks above must notice, and how it shows.
MISTAKES = {
    "slices that follow the number of rows": (
        "const int length = (steps + slices - 1) / slices;",
        "const int length = (steps + slices - 1) / (slices - (rows > 8 ? 1 : 0));",
    ),
    "sums read before they are written": ("        barrier();\n#pragma unroll", "#pragma unroll"),
    "no wait for the other warps": ("barrier_among(place, Shape::slice_threads);", ""),
    "no wait for earlier kernels": ("wait_for_earlier_kernels();", ""),
    "x before earlier kernels are done": ("next<true, false>();", "next<true, true>();"),
    "no wait for the copies": ("wait_for_oldest(call.depth);", "wait_for_copies<3>();"),
    "a stage too early": (
        "for (int stage = 0; stage < call.depth - 1; ++stage) {",
        "for (int stage = 0; stage < call.depth; ++stage) {",
    ),
    "x past a row's end": ("8 * work.lane < left);", "true);"),
    "scales past the last": ("const bool inside = group * Shape::group_size < left;", "const bool inside = true;"),
    "rows past the last": ("if (work.tile + piece * Shape::weight_tiles >= work.rows) break;", ""),
    "weight rows past the last": (
        "return wanted < work.last_weight_row ? wanted : work.last_weight_row;",
        "return wanted;",
    ),
    "nibbles in another order": (
        "halves[plane / 4][i] >> (4 * (plane % 4))",
        "halves[plane / 4][i] >> (4 * (3 - plane % 4))",
    ),
    "halves in another order": ("halves[plane / 4][i]", "halves[1 - plane / 4][i]"),
    "zeros of the other row": ("less[i % 2]", "less[1 - i % 2]"),
    "zeros of another group": (
        "load_number(scales_from + scales_bytes(Shape::group_size))",
        "load_number(numbers_from + scales_bytes(Shape::group_size))",
    ),
    "a group that is not added": ("for (int g = 0; g < Shape::groups; ++g)", "for (int g = 0; g < 1; ++g)"),
    "registers of the matrix instruction in another order": ("a[0], a[1], a[2], a[3],", "a[0], a[2], a[1], a[3],"),
}
REFUSED = {
    "no wait for earlier kernels": "no wait for earlier kernels",
    "x before earlier kernels are done": "no wait for earlier kernels",
    "x past a row's end": "a load outside the operands",
    "scales past the last": "a load outside the operands",
    "rows past the last": "outside",
    "weight rows past the last": "a load outside the operands",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_a_mistake_is_noticed(emulated, tmp_path, mistake):
    text, other = MISTAKES[mistake]
    changes = [("int4_linear.h", text, other)]
    if mistake.startswith("slices that follow"):
        changes += [
            ("int4_linear.h", "Steps(int in_features, int slice)", "Steps(int in_features, int slice, int rows)"),
            (
                "int4_linear.h",
                "const Steps steps(call.in_features, slice);",
                "const Steps steps(call.in_features, slice, work.rows);",
            ),
            (
                "int4_linear.h",
                "const Steps steps(call.in_features, first + place);",
                "const Steps steps(call.in_features, first + place, rows);",
            ),
        ]
    broken = module.build(tmp_path, changes, ["-O0", "-DLLAMA_FAST_FEW_TILES"])
    x, weight, _ = draw(9, 20, 2880)
    packed, tile = packed_of(weight), (2, 2, 4, 2)
    expected = emulated(x, packed, out_dtype=FP32, tile=tile)
    if mistake in REFUSED:
        with pytest.raises(RuntimeError, match=REFUSED[mistake]):
            broken(x, packed, out_dtype=FP32, tile=tile)
        return
    got = broken(x, packed, out_dtype=FP32, tile=tile)
    if mistake.startswith("slices that follow"):
        assert_sum_accurate(got, *bounds(x, weight), 2880)
        assert not same_bits(got, alone(broken, x, packed, out_dtype=FP32))
    else:
        assert not torch.equal(got, expected)


def test_control_threads_that_part_are_noticed(tmp_path):
    """A warp's matrix instruction that some of its threads leave out."""
    text = "matrix_multiply(sums[n],"
    broken = module.build(
        tmp_path,
        [("int4_linear.h", text, f"if (words_from % 512 < 256) {text}")],
        ["-DLLAMA_FAST_FEW_TILES"],
    )
    x, weight, _ = draw(1, 16, 64)
    with pytest.raises(RuntimeError, match="threads wait for others that never come"):
        broken(x, packed_of(weight))


def test_the_emulation_refuses_what_hardware_would(emulated):
    x, weight, _ = draw(2, 16, 64)
    shifted = torch.zeros(2 * 64 + 1, dtype=BF16)[1:].view(2, 64)
    with pytest.raises(RuntimeError, match="an address of 16 bytes is not aligned"):
        emulated(shifted, packed_of(weight))
    odd = packed_of(draw(2, 15, 128)[1])
    with pytest.raises(RuntimeError, match="an address of 4 bytes is not aligned"):
        emulated(torch.zeros(2, 128, dtype=BF16), odd)
    assert set(TILES) == {False, True} and x.dtype == BF16

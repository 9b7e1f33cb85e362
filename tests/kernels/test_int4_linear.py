"""The int4_linear kernel and its packing: layout, accuracy, epilogues, bits across every tile, refusals."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import configs
from llama_fast.kernels import int4_linear as module
from llama_fast.kernels.int4_linear import PlanarInt4, int4_linear, pack_int4, unpack_int4
from llama_fast.kernels.silu_mul import ACTIVATIONS, silu_mul
from llama_fast.ops import reference, reference_int4
from llama_fast.ops.int4 import Int4Linear, Int4Weight, pack_rows
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_sum_accurate, doubled, outliers, same_bits, ulp
from tests.kernels.conftest import INTERPRETED
from tests.tiny import RecordingEngine, make_model, make_request

EPILOGUES = ["plain", "bias", "residual", "residual bias", "gated", "gated bias", "fp32", "fp32 bias"]
LAYOUTS = ["contiguous", "strided", "offset"]
GROUP_SIZES = module.GROUP_SIZES
ROWS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129]
OUTS = [1, 2, 3, 31, 33, 63, 64, 65, 111, 127, 128, 129, 257]
GROUPS = [1, 2, 3, 4, 5, 7, 8]
# The largest slope of an activation, by which an error of the gate grows.
SLOPES = {"silu": 1.1, "gelu": 1.13, "relu": 1.0}
FP32_EPS = torch.finfo(torch.float32).eps
# Every architecture's tiles run in the interpreter; a GPU runs its own. fp32 tiles are the same everywhere.
TABLES = [(None, dtype) for dtype in DTYPES]
if INTERPRETED:
    TABLES = [(90, torch.float32), *((table, dtype) for table in configs.SHARED_BYTES for dtype in DTYPES[1:])]


def cases(count):
    """`count` different (rows, outs, ins, group size, dtype, has zeros, epilogue, has outliers, layout)."""
    choose, chosen = random.Random(4), {}
    # A few rows of models' projections: sums as long as theirs.
    for index, (outs, ins) in enumerate([(64, 2048), (32, 4096), (16, 14336)] * 3):
        chosen[(1 + index % 2, outs, ins, 128, DTYPES[index // 3], index % 2 == 0, "plain", False, "contiguous")] = None
    # Every epilogue in every dtype, every size among them.
    for index, epilogue in enumerate(EPILOGUES * len(DTYPES)):
        group_size = GROUP_SIZES[index % 3]
        sizes = ROWS[index % len(ROWS)], OUTS[index % len(OUTS)], group_size * GROUPS[index % len(GROUPS)], group_size
        dtype = DTYPES[index // len(EPILOGUES)]
        chosen[(*sizes, dtype, index % 2 == 1, epilogue, index % 4 == 0, LAYOUTS[index % 3])] = None
    while len(chosen) < count:
        group_size = choose.choice(GROUP_SIZES)
        sizes = choose.choice(ROWS), choose.choice(OUTS), group_size * choose.choice(GROUPS), group_size
        numbers = choose.choice(DTYPES), choose.random() < 0.5
        chosen[(*sizes, *numbers, choose.choice(EPILOGUES), choose.random() < 0.5, choose.choice(LAYOUTS))] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


@pytest.fixture
def chained():
    """tl.dot as hardware sums, whatever the tile: the interpreter's own is BLAS."""
    if INTERPRETED:
        from tests.kernels.interpreter import exact_dot

        with exact_dot():
            yield
    else:
        yield


def draw_weight(outs, ins, group_size, dtype, has_zeros, has_bias, device):
    """A random weight whose outputs are about 1 for inputs of about 1."""
    groups = ins // group_size
    return Int4Weight(
        torch.randint(0, 16, (outs, ins), dtype=torch.uint8).to(device),
        (torch.randn(outs, groups) / 5 / ins**0.5).to(dtype).to(device),
        torch.randint(0, 17, (outs, groups), dtype=torch.uint8).to(device) if has_zeros else None,
        torch.randn(outs).to(dtype).to(device) if has_bias else None,
    )


def draw(rows, outs, ins, group_size, dtype, has_zeros, epilogue, has_outliers, device):
    """x, weight and residual (None where the epilogue has none)."""
    x = torch.randn(rows, ins)
    if has_outliers:
        # fp16 ends at 65,504, and gate times up squares.
        x = outliers(x) * (0.01 if dtype == torch.float16 else 1)
    height = 2 * outs if "gated" in epilogue else outs
    weight = draw_weight(height, ins, group_size, dtype, has_zeros, "bias" in epilogue, device)
    residual = torch.randn(rows, outs).to(dtype).to(device) if "residual" in epilogue else None
    return x.to(dtype).to(device), weight, residual


def laid_out(x, layout):
    """The same numbers between columns of NaN, or from an address one element past an aligned one."""
    if layout == "strided":
        return F.pad(x, (0, 129), value=torch.nan)[:, : x.shape[1]]
    if layout == "offset":
        return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)
    return x


def options(epilogue, activation="silu"):
    """The kernel's keywords of an epilogue, the residual aside."""
    gated = {"activation": activation} if "gated" in epilogue else {}
    return gated | ({"out_dtype": torch.float32} if "fp32" in epilogue else {})


def assert_within_bound(got, x, weight, residual, activation):
    """The sum's bound, carried through the roundings and the epilogue that follow it."""
    x, dense = x.double(), weight.dequantized(dtype=torch.float64)
    exact, magnitude, terms = x @ dense.T, x.abs() @ dense.abs().T, x.shape[1]
    if weight.bias is not None:
        exact, magnitude = exact + weight.bias.double(), magnitude + weight.bias.double().abs()
        terms += 1
    if residual is None and activation is None:
        assert exact.abs().max() < torch.finfo(got.dtype).max / 2
        assert_sum_accurate(got, exact, magnitude, terms)
        return
    # Stored once before the epilogue: one more ulp.
    stored = 4 * terms**0.5 * FP32_EPS / 2 * magnitude + ulp(exact, got.dtype)
    if residual is not None:
        exact, bound = exact + residual.double(), stored
    else:
        gate, up = exact.chunk(2, dim=1)
        gate_error, up_error = stored.chunk(2, dim=1)
        exact = reference.silu_mul(exact, activation)
        activated = reference.ACTIVATIONS[activation](gate).abs() + SLOPES[activation] * gate_error
        bound = SLOPES[activation] * gate_error * (up.abs() + up_error) + activated * up_error
        # e^x is 2^(x log2 e): the product's rounding counts |x| times; the other operations a few times once.
        bound += (8 + gate.abs()) * FP32_EPS * activated * (up.abs() + up_error)
    assert got.shape == exact.shape and got.isfinite().all()
    error = (got.double() - exact).abs() - ulp(exact, got.dtype)
    assert (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


# --- packing ---------------------------------------------------------------------------------------------------------


def packed_by_hand(values):
    """words of PlanarInt4 from its description, one nibble at a time."""
    outs, ins = values.shape
    blocks = -(-ins // 128)
    words = [[[0] * 16 for _ in range(outs)] for _ in range(blocks)]
    for out in range(outs):
        for feature in range(ins):
            place = feature % 128
            words[feature // 128][out][place % 16] += int(values[out, feature]) * 16 ** (place // 16)
    # Two's complement.
    return torch.tensor(words).sub(2**32 * (torch.tensor(words) >= 2**31)).to(torch.int32)


@pytest.mark.parametrize(
    ("outs", "ins", "group_size"),
    [(1, 32, 32), (3, 96, 32), (2, 128, 32), (5, 160, 32), (1, 64, 64), (4, 192, 64), (3, 128, 128), (2, 384, 128)],
)
def test_packing_is_as_described(device, outs, ins, group_size):
    weight = draw_weight(outs, ins, group_size, torch.bfloat16, True, True, device)
    weight.values[0, ins - 1] = 15  # the sign bit, where the block is full
    packed = pack_int4(weight)
    assert torch.equal(packed.words.cpu(), packed_by_hand(weight.values.cpu()))
    assert packed.words.device.type == device.type and packed.words.is_contiguous()
    assert (packed.in_features, packed.out_features, packed.group_size) == (ins, outs, group_size)
    for out in range(outs):
        for group in range(ins // group_size):
            assert packed.scales[group, out] == weight.scales[out, group]
            assert packed.zeros[group, out] == weight.zeros[out, group]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(
    ("outs", "ins", "group_size"),
    [(1, 32, 32), (33, 96, 32), (7, 64, 64), (129, 320, 64), (3, 128, 128), (64, 640, 128)],
)
def test_round_trip(device, dtype, has_zeros, outs, ins, group_size):
    weight = draw_weight(outs, ins, group_size, dtype, has_zeros, has_zeros, device)
    again = Int4Weight(*unpack_int4(pack_int4(weight)))
    for name in ("values", "scales", "zeros", "bias"):
        before, after = getattr(weight, name), getattr(again, name)
        assert (before is None and after is None) or same_bits(before, after), name


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_parts_are_one_weight(device, group_size):
    ins, shapes = 3 * group_size, ((33, True, False), (1, False, True), (64, True, True))
    parts = [draw_weight(outs, ins, group_size, torch.float16, zeros, bias, device) for outs, zeros, bias in shapes]
    packed = pack_int4(*parts)
    assert packed.out_features == 98
    x = torch.randn(5, ins, dtype=torch.float16, device=device)
    together = int4_linear(x, packed)
    for part, got in zip(parts, together.split([33, 1, 64], dim=1), strict=True):
        assert_within_bound(got, x, part, None, None)
    joined = Int4Weight(*unpack_int4(packed))
    # What a part leaves out is 8 and 0.
    assert torch.equal(joined.zeros[33], torch.full_like(joined.zeros[33], 8)) and not joined.bias[:33].any()
    assert torch.equal(joined.dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_F02_F04_weights_that_are_refused(device):
    good = draw_weight(4, 128, 64, torch.bfloat16, True, True, device)
    for changes, message in [
        ({"values": good.values[0]}, r"values must be \[out_features, in_features\] and scales"),
        ({"values": good.values[:3]}, r"values must be .* got \(3, 128\) and \(4, 2\)"),
        ({"scales": good.scales[:, :0]}, r"values must be .* got \(4, 128\) and \(4, 0\)"),
        ({"values": good.values[:, :127]}, "in_features=127 in 2 groups; groups of 32, 64 or 128 are supported"),
        ({"values": good.values[:, :32]}, "in_features=32 in 2 groups"),
        ({"scales": good.scales[:, :1].repeat(1, 8)}, "in_features=128 in 8 groups"),
        ({"values": good.values.to("meta")}, "values is on meta and scales on"),
        ({"values": good.values.int()}, "values must be uint8 from 0 to 15; got torch.int32"),
        ({"values": good.values + 16}, "values must be uint8 from 0 to 15"),
        ({"scales": good.scales.double()}, "scales is torch.float64; use float16, bfloat16 or float32"),
        ({"bias": good.bias.float()}, "bias is torch.float32 and scales is torch.bfloat16"),
        ({"bias": good.bias[:3]}, r"bias must be \[4\]; got \(3,\)"),
        ({"zeros": good.zeros.to(torch.bfloat16)}, r"zeros must be uint8 \(4, 2\); got torch.bfloat16"),
        ({"zeros": good.zeros[:, :1]}, r"zeros must be uint8 \(4, 2\); got torch.uint8 \(4, 1\)"),
        ({"zeros": torch.full_like(good.zeros, 17)}, "zeros must be from 0 to 16; got 17"),
    ]:
        with pytest.raises(KernelArgumentError, match=f"pack_int4: {message}"):
            pack_int4(replace(good, **changes))
    other = draw_weight(4, 128, 32, torch.bfloat16, True, True, device)
    with pytest.raises(KernelArgumentError, match="parts have 128 input features in 2 groups and 128 in 4"):
        pack_int4(good, other)
    other = draw_weight(4, 128, 64, torch.float16, True, False, device)
    with pytest.raises(KernelArgumentError, match="first_scales is torch.bfloat16 and scales is torch.float16"):
        pack_int4(good, other)


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_accuracy(device, case):
    *_, epilogue, _, layout = case
    x, weight, residual = draw(*case[:-1], device)
    activation = sorted(SLOPES)[case[0] % 3] if "gated" in epilogue else None
    got = int4_linear(laid_out(x, layout), pack_int4(weight), residual=residual, **options(epilogue, activation))
    assert got.dtype == (torch.float32 if "fp32" in epilogue else x.dtype) and got.device.type == device.type
    assert_within_bound(got, x, weight, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_accuracy_beside_the_twin(device, dtype, group_size, has_zeros):
    def twin(x, *fields):
        return reference_int4.int4_linear(x, Int4Weight(*fields))

    def kernel(x, *fields):
        return int4_linear(x, pack_int4(Int4Weight(*fields)))

    def inputs():
        x, weight, _ = draw(33, 130, 5 * group_size, group_size, dtype, has_zeros, "bias", True, device)
        return x, weight.values, weight.scales, weight.zeros, weight.bias

    assert_accurate(kernel, twin, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize(("rows", "outs", "ins", "group_size"), [(5, 600, 96, 32), (17, 33, 256, 64), (1, 7, 384, 128)])
def test_twin_against_fp64(device, dtype, has_zeros, rows, outs, ins, group_size):
    x, weight, _ = draw(rows, outs, ins, group_size, dtype, has_zeros, "bias", True, device)
    assert_within_bound(reference_int4.int4_linear(x, weight), x, weight, None, None)
    wide = Int4Weight(*map(doubled, (weight.values, weight.scales, weight.zeros, weight.bias)))
    exact = F.linear(x.double(), weight.dequantized(dtype=torch.float64), weight.bias.double())
    torch.testing.assert_close(reference_int4.int4_linear(x.double(), wide), exact, rtol=1e-12, atol=1e-12)
    alone = reference_int4.int4_linear(x[:1], weight)
    assert same_bits(reference_int4.int4_linear(x, weight)[:1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["zeros", "scales of another group", "planes", "a row is another's"])
def test_control_accuracy_notices_a_mistake(device, dtype, mistake):
    x, weight, _ = draw(33, 65, 256, 64, dtype, True, "bias", False, device)
    packed = pack_int4(weight)
    assert_within_bound(int4_linear(x, packed), x, weight, None, None)
    if mistake == "zeros":
        packed = replace(packed, zeros=packed.zeros + 1)
    elif mistake == "scales of another group":
        packed = replace(packed, scales=packed.scales.flip(0).contiguous())
    elif mistake == "planes":
        packed = replace(packed, words=packed.words << 4)
    got = int4_linear(x, packed)
    if mistake == "a row is another's":
        got[31] = got[30]
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within_bound(got, x, weight, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("rows", "outs", "ins", "group_size"), [(1, 65, 1024, 128), (17, 129, 96, 32), (66, 33, 320, 64)]
)
def test_sums_of_integers_are_exact(device, dtype, epilogue, rows, outs, ins, group_size):
    """Sums of 4 products of at most 32, a bias of at most 16 and a residual of at most 64: exact in bf16."""
    _, weight, residual = draw(rows, outs, ins, group_size, dtype, ins != 96, epilogue, False, device)
    x = torch.zeros(rows, ins)
    for row in range(rows):
        x[row, torch.randperm(ins)[:4]] = 2.0 * torch.randint(0, 2, (4,)) - 1
    x = x.to(dtype).to(device)
    weight = replace(
        weight,
        scales=2 ** torch.randint(0, 2, weight.scales.shape).to(weight.scales),
        bias=None if weight.bias is None else torch.randint(-16, 17, weight.bias.shape).to(weight.bias),
    )
    residual = None if residual is None else torch.randint(-64, 65, residual.shape).to(residual)
    got = int4_linear(x, pack_int4(weight), residual=residual, **options(epilogue, "relu"))
    bias = None if weight.bias is None else weight.bias.double()
    exact = F.linear(x.double(), weight.dequantized(dtype=torch.float64), bias)
    if "gated" in epilogue:
        # The product of two such sums takes more digits than bf16 has: one rounding of the exact one.
        exact = reference.silu_mul(exact, "relu").to(got.dtype).double()
    assert torch.equal(got.double(), exact if residual is None else exact + residual.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_every_value_and_zero_at_every_place(device, dtype, group_size):
    # Row i of x is 1 at feature i: the output is the weight itself.
    ins = 128 + group_size
    x = torch.eye(ins, dtype=dtype, device=device)
    values = (torch.arange(ins) + torch.arange(16)[:, None]).remainder(16).to(torch.uint8).repeat(4, 1).to(device)
    scales = torch.full((64, ins // group_size), 0.75, dtype=dtype, device=device)
    got = int4_linear(x, pack_int4(Int4Weight(values, scales, None, None)))
    assert torch.equal(got.T.double(), (values.double() - 8) * 0.75)
    for first in range(0, 17, 4):
        zeros = (first + torch.arange(64, device=device) // 16).clamp(max=16).to(torch.uint8)
        got = int4_linear(x, pack_int4(Int4Weight(values, scales, zeros[:, None].expand_as(scales), None)))
        assert torch.equal(got.T.double(), (values.double() - zeros[:, None]) * 0.75)


# --- one answer ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 17, 65, 129])
def test_fused_is_unfused(device, dtype, group_size, rows):
    x, weight, residual = draw(rows, 65, 3 * group_size, group_size, dtype, True, "residual bias", True, device)
    packed, bare = pack_int4(weight), pack_int4(replace(weight, bias=None))
    stored = int4_linear(x, packed)
    assert same_bits(int4_linear(x, packed, residual=residual), stored + residual)
    assert same_bits(int4_linear(x, bare, residual=residual), int4_linear(x, bare) + residual)
    assert same_bits(int4_linear(x, packed, out_dtype=torch.float32).to(dtype), stored)


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_activation_is_unfused(device, dtype, name):
    for epilogue, rows in (("gated", 3), ("gated bias", 70)):
        x, weight, _ = draw(rows, 33, 192, 64, dtype, rows == 3, epilogue, False, device)
        packed = pack_int4(weight)
        assert same_bits(int4_linear(x, packed, activation=name), silu_mul(int4_linear(x, packed), name))


def thresholds(table, dtype, group_size):
    """Numbers of rows beside every change of tile."""
    tiles = configs.int4_tiles(table, dtype, group_size)
    assert tiles[-1][0] is None and len(tiles) > 1
    return sorted({most + step for most, _ in tiles if most is not None for step in (-1, 0, 1)})


def assert_rows_are_alone(function, x, counts):
    """Rows of a batch have the bits that they have alone."""
    alone = {}
    for count in counts:
        out = function(x[:count])
        for row in {1 % count, count // 2, count - 1}:
            if row not in alone:
                alone[row] = function(x[row : row + 1])
            assert same_bits(out[row : row + 1], alone[row]), f"row {row} of {count}"


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize(
    ("group_size", "epilogue"), [(32, "residual bias"), (64, "gated bias"), (128, "residual bias"), (128, "gated bias")]
)
@pytest.mark.parametrize(("table", "dtype"), TABLES)
def test_bits_of_a_row_do_not_depend_on_its_company(device, monkeypatch, table, dtype, group_size, epilogue):
    if table is not None:
        monkeypatch.setattr(configs, "table_of", lambda device: table)
    # Groups of 32 and 64 end inside the last block.
    ins = 256 if group_size == 128 else 128 + group_size
    x, weight, _ = draw(129, 30, ins, group_size, dtype, group_size != 64, epilogue, True, device)
    residual, packed = None if "gated" in epilogue else torch.randn(1, 30).to(x), pack_int4(weight)

    def function(rows):
        added = None if residual is None else residual.expand(len(rows), -1).contiguous()
        return int4_linear(rows, packed, residual=added, **options(epilogue))

    assert_rows_are_alone(function, x, thresholds(configs.table_of(device), dtype, group_size))
    # In another place of a batch, over several tiles, and twice.
    assert same_bits(function(x.flip(0)).flip(0), function(x))


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
def test_control_a_split_that_depends_on_the_number_of_rows_is_noticed(device, dtype):
    x, weight, _ = draw(70, 40, 384, 128, dtype, True, "fp32", False, device)
    parts = [
        replace(weight, values=weight.values[:, k], scales=weight.scales[:, g], zeros=weight.zeros[:, g])
        for k, g in ((slice(0, 128), slice(0, 1)), (slice(128, 384), slice(1, 3)))
    ]
    whole, first, second = map(pack_int4, (weight, *parts))

    def by_company(rows):
        if len(rows) <= 16:
            return int4_linear(rows, whole, out_dtype=torch.float32)
        second_half = int4_linear(rows[:, 128:], second, out_dtype=torch.float32)
        return int4_linear(rows[:, :128], first, out_dtype=torch.float32) + second_half

    counts = thresholds(configs.table_of(device), dtype, 128)
    with pytest.raises(AssertionError, match="row .* of 17"):
        assert_rows_are_alone(by_company, x, counts)


def test_tiles_of_every_table():
    for table in configs.SHARED_BYTES:
        for dtype in DTYPES:
            for group_size in GROUP_SIZES:
                tiles = configs.int4_tiles(table, dtype, group_size)
                most = [most for most, _ in tiles[:-1]]
                assert most == sorted(set(most)) and tiles[-1][0] is None
                for rows in (1, 2, 16, 63, 64):
                    tile = configs.int4_tile(table, dtype, group_size, rows)
                    assert tile.block_rows >= rows or dtype == torch.float32, "two passes over a weight"
                if dtype != torch.float32 and table in (90, 100):
                    # What Triton chooses wgmma or tcgen05 by.
                    wide = {tile.block_out % 64 == 0 and tile.num_warps in (4, 8) for _, tile in tiles}
                    assert wide == {table == 90}, "two kinds of MMA in one route"


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["residual bias", "gated bias", "fp32"])
@pytest.mark.parametrize(("rows", "ins"), [(3, 64), (18, 160)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, epilogue, rows, ins):
    x, weight, residual = draw(rows, 33, ins, 32, dtype, True, epilogue, False, device)
    keywords, packed = {"residual": residual, **options(epilogue)}, pack_int4(weight)
    expected = int4_linear(x, packed, **keywords)
    for same in (laid_out(x, "strided"), laid_out(x, "offset"), x.repeat_interleave(2, 0)[::2]):
        assert same_bits(int4_linear(same, packed, **keywords), expected)
    one = int4_linear(x[:1].expand(rows, -1), packed, **keywords)
    if residual is None:
        assert same_bits(one, int4_linear(x[:1], packed, **keywords).expand(rows, -1).contiguous())


# --- what is written, what spreads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 1, 32), (17, 65, 160), (66, 3, 96)])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, dtype, epilogue, rows, outs, ins):
    x, weight, residual = draw(rows, outs, ins, 32, dtype, True, epilogue, False, device)
    packed = pack_int4(weight)
    given = [x, residual, packed.words, packed.scales, packed.zeros, packed.bias]
    before = [None if t is None else t.clone() for t in given]
    with guarded():
        out = int4_linear(x, packed, residual=residual, **options(epilogue))
    assert out.shape == (rows, outs) and not out.isnan().any()
    for kept, t in zip(before, given, strict=True):
        assert t is None or same_bits(t, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [5, 70])
def test_F12_a_row_that_is_not_finite_stays_alone(device, dtype, bad, rows):
    x, weight, _ = draw(rows, 65, 160, 32, dtype, True, "bias", False, device)
    packed = pack_int4(weight)
    expected = int4_linear(x, packed)
    x[2, 77] = bad
    got = int4_linear(x, packed)
    others = [row for row in range(rows) if row != 2]
    assert same_bits(got[others], expected[others])
    assert not got[2, weight.values[:, 77] != weight.zeros[:, 77 // 32]].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_F12_a_scale_that_is_not_finite_stays_in_its_output(device, dtype):
    x, weight, _ = draw(3, 65, 256, 64, dtype, False, "bias", False, device)
    expected = int4_linear(x, pack_int4(weight))
    weight.scales[64, 3] = torch.nan
    got = int4_linear(x, pack_int4(weight))
    assert same_bits(got[:, :64], expected[:, :64]) and got[:, 64].isnan().all()


@pytest.mark.parametrize(("rows", "outs"), [(0, 64), (5, 0), (0, 0)])
def test_F06_nothing_to_do_launches_nothing(device, launches, rows, outs):
    grids = launches(module, "_int4_linear_kernel")
    x, weight, residual = draw(rows, outs, 64, 32, torch.bfloat16, True, "residual bias", False, device)
    out = int4_linear(x, pack_int4(weight), residual=residual)
    assert out.shape == (rows, outs) and out.dtype == torch.bfloat16 and out.device.type == device.type
    gated = int4_linear(x, pack_int4(weight, weight), activation="silu", out_dtype=torch.float32)
    assert gated.shape == (rows, outs) and gated.dtype == torch.float32
    assert grids == []


@pytest.mark.parametrize("rows", [3, 70, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch(device, launches, dtype, rows):
    grids = launches(module, "_int4_linear_kernel", run=False)
    x, weight, _ = draw(rows, 1100, 32, 32, dtype, False, "plain", False, device)
    packed = pack_int4(weight)
    int4_linear(x, packed)
    int4_linear(x, packed, activation="silu")
    tile = configs.int4_tile(configs.table_of(device), dtype, 32, rows)
    row_tiles = -(-rows // tile.block_rows)
    assert grids == [(-(-1100 // tile.block_out) * row_tiles,), (-(-550 // (tile.block_out // 2)) * row_tiles,)]


def test_F09_more_than_65535_tiles(device, launches):
    x, weight, _ = draw(1, 1, 32, 32, torch.float32, False, "plain", False, device)
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_int4_linear_kernel", run=not INTERPRETED)
    height = configs.int4_tile(configs.table_of(device), torch.float32, 32, 2**30).block_rows
    out = int4_linear(x.expand(height * 65_536 + 3, -1), pack_int4(weight))
    assert grids == [(65_537,)]
    if not INTERPRETED:
        assert same_bits(out[-1:], out[:1])
        assert_within_bound(out[:1], x, weight, None, None)


def test_F08_rows_beyond_2_31_elements(device, huge):
    ins, stride = 64, 2**30 + 8
    near, weight, _ = draw(3, 5, ins, 32, torch.bfloat16, True, "bias", False, device)
    x = huge(2 * stride + ins, torch.bfloat16).as_strided((3, ins), (stride, 1))
    x.copy_(near)
    packed = pack_int4(weight)
    assert same_bits(int4_linear(x, packed), int4_linear(near, packed))


def test_F08_words_beyond_2_31_elements(device, huge, monkeypatch, only_programs):
    outs, ins = 2**24 + 64, 1024
    x, last, _ = draw(1, 64, ins, 128, torch.bfloat16, False, "plain", False, device)
    packed = pack_int4(last)
    words = huge(8 * outs * 16, torch.int32).view(8, outs, 16)
    scales = torch.zeros(8, outs, dtype=torch.bfloat16, device=device)
    words[:, -64:], scales[:, -64:] = packed.words, packed.scales
    if INTERPRETED:
        # The last program only: others would take minutes.
        kernel = module._int4_linear_kernel

        class Last:
            def __getitem__(self, grid):
                only_programs([grid[0] - 1])
                return kernel[(1,)]

        monkeypatch.setattr(module, "_int4_linear_kernel", Last())
    got = int4_linear(x, PlanarInt4(words, scales, None, None, ins))
    assert_within_bound(got[:, -64:], x, last, None, None)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_F02_F04_arguments_that_are_refused(device):
    x, weight, residual = draw(5, 6, 64, 32, torch.bfloat16, True, "residual bias", False, device)
    packed = pack_int4(weight)
    for x_given, keywords, message in [
        (x[0], {}, r"x must be \[num_tokens, 64\] with contiguous columns; got \(64,\)"),
        (x[:, :32], {}, r"x must be \[num_tokens, 64\] .* got \(5, 32\)"),
        (torch.cat((x, x), 1)[:, ::2], {}, r"x must be .* with contiguous columns; got \(5, 64\), stride \(128, 2\)"),
        (x.float(), {}, "scales is torch.bfloat16 and x is torch.float32; give both one dtype"),
        (x.double(), {}, "x is torch.float64; use float16, bfloat16 or float32"),
        (x, {"residual": residual.float()}, "residual is torch.float32 and x is torch.bfloat16"),
        (x, {"residual": residual[:4]}, r"residual must be \(5, 6\) and contiguous; got \(4, 6\)"),
        (x, {"residual": residual.T.contiguous().T}, r"residual must be \(5, 6\) and contiguous"),
        (x, {"out_dtype": torch.float16}, "out_dtype=torch.float16; use torch.bfloat16 or torch.float32"),
        (x, {"activation": "gelu_erf"}, "activation='gelu_erf' is unknown; use one of .*swish"),
        (x, {"activation": "silu", "residual": residual}, "activation needs .* no residual"),
    ]:
        with pytest.raises(KernelArgumentError, match=f"int4_linear: {message}"):
            int4_linear(x_given, packed, **keywords)
    odd = pack_int4(draw_weight(5, 64, 32, torch.bfloat16, False, False, device))
    with pytest.raises(KernelArgumentError, match="activation needs gate and up of equal height .* weight has 5 rows"):
        int4_linear(x, odd, activation="silu")


def test_F03_devices_and_gradients(device):
    x, weight, _ = draw(5, 6, 64, 32, torch.float32, False, "plain", False, device)
    packed = pack_int4(weight)
    with pytest.raises(KernelArgumentError, match="x is on meta; the kernel takes .*backend='reference'"):
        int4_linear(x.to("meta"), packed)
    with pytest.raises(KernelArgumentError, match="x requires grad and kernels have no backward"):
        int4_linear(x.requires_grad_(), packed)
    with torch.no_grad():
        assert int4_linear(x, packed).shape == (5, 6)
    reference_int4.int4_linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.dequantized().sum(0).expand_as(x), atol=1e-5)


# --- a model ---------------------------------------------------------------------------------------------------------

SIZES = {"page_size": 16, "split_size": 32, "max_seq_len": 64}


def int4_model(dtype, device):
    """A tiny model with every projection of its layers in 4 bits, some with zeros and some without."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = make_model(dtype, **shape)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for index, (name, linear) in enumerate(list(owner.named_children())):
                outs, ins = linear.weight.shape
                part = Int4Linear(ins, outs, group_size=32, symmetric=index % 2 == 0)
                part.weight_scale.data = part.weight_scale.data.to(dtype)
                part.weight_packed.data = pack_rows(torch.randint(0, 16, (outs, ins), dtype=torch.uint8))
                part.weight_scale.data.normal_(0.0, 0.05)
                if part.weight_zero_point is not None:
                    part.weight_zero_point.data = torch.randint(0, 17, (outs, ins // 32), dtype=torch.uint8)
                setattr(owner, name, part)
    return model.to(device)


def run_model(model, order, backend="gpu", **sizes):
    """(tokens, logits) of each sample of four prompts, some of them."""
    engine = RecordingEngine(model, backend=backend, **{"max_batch": 4, **SIZES, **sizes})
    prompts = {index: [random.Random(index).randrange(97) for _ in range(3 + 12 * index)] for index in order}
    return engine.generate(
        [make_request(model, prompts[index], index, max_tokens=3, max_seq_len=64, temperature=0.0) for index in order]
    )


def test_a_model_of_4_bits(device):
    """Prompt and generated tokens through every op, beside the reference on the same modules."""
    model = int4_model(torch.float32, device)
    expected = run_model(model, [0, 2], "reference")
    got = run_model(model, [0, 2])
    for key, (tokens, logits) in expected.items():
        assert got[key][0] == tokens
        torch.testing.assert_close(got[key][1], logits, rtol=1e-4, atol=1e-4)
    # The reference again, on words that are in the kernels' order now.
    for key, (tokens, logits) in run_model(model, [0, 2], "reference").items():
        assert tokens == expected[key][0] and torch.equal(logits, expected[key][1])


@pytest.mark.usefixtures("chained")
def test_one_answer_of_a_model_of_4_bits(device):
    model = int4_model(torch.bfloat16, device)
    alone = {key: value for index in range(4) for key, value in run_model(model, [index]).items()}
    for order, sizes in (([2, 0, 3, 1], {}), ([3, 1, 0], {"prefill_chunk": 11, "max_batch": 2})):
        for key, (tokens, logits) in run_model(model, order, **sizes).items():
            assert tokens == alone[key][0] and torch.equal(logits, alone[key][1]), key

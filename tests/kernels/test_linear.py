"""The linear kernel against plain PyTorch: accuracy, epilogues, bits across every tile, layouts, refusals."""

import contextlib
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import configs
from llama_fast.kernels import linear as module
from llama_fast.kernels.linear import linear
from llama_fast.kernels.silu_mul import ACTIVATIONS, silu_mul
from llama_fast.ops import reference
from tests.kernels.accuracy import DTYPES, assert_accurate, assert_sum_accurate, outliers, same_bits, ulp
from tests.kernels.conftest import INTERPRETED

EPILOGUES = ["plain", "bias", "residual", "residual bias", "gated", "gated bias", "fp32", "fp32 bias"]
LAYOUTS = ["contiguous", "strided", "offset"]
ROWS = [1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
OUTS = [1, 2, 3, 31, 33, 63, 64, 65, 111, 127, 128, 129, 257, 509]
INS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 509, 1024]
# (out_features, in_features): a slice of the rows of models' projections, whose sums are as long as the models'.
MODELS = [(192, 2048), (64, 8192), (128, 4096), (64, 14336)]
# The largest slope of an activation, by which an error of the gate grows.
SLOPES = {"silu": 1.1, "gelu": 1.13, "relu": 1.0}
# Every architecture's tiles run in the interpreter; a GPU runs its own.
TABLES = [(None, dtype) for dtype in DTYPES]
if INTERPRETED:
    # fp32 tiles are the same everywhere.
    TABLES = [(90, torch.float32), *((table, dtype) for table in configs.SHARED_BYTES for dtype in DTYPES[1:])]
FP32_EPS = torch.finfo(torch.float32).eps


def cases(count):
    """`count` different (rows, outs, ins, dtype, epilogue, has outliers, layout), the same in every run."""
    choose, chosen = random.Random(3), {}
    for index, (outs, ins) in enumerate(MODELS * len(DTYPES)):
        dtype, epilogue = DTYPES[index // len(MODELS)], EPILOGUES[(3 * index) % len(EPILOGUES)]
        chosen[(1 + index % 3, outs, ins, dtype, epilogue, index % 2 == 0, "contiguous")] = None
    # Every epilogue in every dtype, every size among them.
    for index, epilogue in enumerate(EPILOGUES * len(DTYPES)):
        sizes = ROWS[index % len(ROWS)], OUTS[index % len(OUTS)], INS[index % len(INS)]
        chosen[(*sizes, DTYPES[index // len(EPILOGUES)], epilogue, index % 2 == 0, LAYOUTS[index % 3])] = None
    while len(chosen) < count:
        sizes = tuple(choose.choice(sizes) for sizes in (ROWS, OUTS, INS))
        rest = choose.choice(EPILOGUES), choose.random() < 0.5, choose.choice(LAYOUTS)
        chosen[(*sizes, choose.choice(DTYPES), *rest)] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 160
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


def draw(rows, outs, ins, dtype, epilogue, has_outliers, device):
    """x, weight, bias and residual of an epilogue (None where it has none); outputs of about 1 without outliers."""
    x = torch.randn(rows, ins)
    if has_outliers:
        # fp16 ends at 65,504, and gate times up squares.
        x = outliers(x) * (0.01 if dtype == torch.float16 else 1)
    height = 2 * outs if "gated" in epilogue else outs
    weight = torch.randn(height, ins) / ins**0.5
    bias = torch.randn(height) if "bias" in epilogue else None
    residual = torch.randn(rows, outs) if "residual" in epilogue else None
    return tuple(None if t is None else t.to(dtype).to(device) for t in (x, weight, bias, residual))


def laid_out(x, layout):
    """The same numbers with padded rows, or from an address one element past an aligned one."""
    if layout == "strided":
        return torch.cat((x, torch.full_like(x[:, :1], torch.nan)), dim=1)[:, : x.shape[1]]
    return offset(x) if layout == "offset" else x


def offset(x):
    return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)


def options(epilogue, activation="silu"):
    """The kernel's keywords of an epilogue, bias and residual aside."""
    gated = {"activation": activation} if "gated" in epilogue else {}
    return gated | ({"out_dtype": torch.float32} if "fp32" in epilogue else {})


def assert_within_bound(got, x, weight, bias, residual, activation):
    """The sum's bound, carried through the roundings and the epilogue that follow it."""
    x, weight = x.double(), weight.double()
    exact, magnitude, terms = x @ weight.T, x.abs() @ weight.abs().T, x.shape[1]
    if bias is not None:
        exact, magnitude, terms = exact + bias.double(), magnitude + bias.double().abs(), terms + 1
    if residual is None and activation is None:
        assert got.shape == exact.shape and exact.abs().max() < torch.finfo(got.dtype).max / 2
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
    assert got.shape == exact.shape and exact.abs().max() < torch.finfo(got.dtype).max / 2
    assert got.isfinite().all()
    error = (got.double() - exact).abs() - ulp(exact, got.dtype)
    assert (error <= bound).all(), f"{(error - bound).max():.3g} beyond the bound"


def test_accuracy(device, case):
    rows, outs, ins, dtype, epilogue, has_outliers, layout = case
    x, weight, bias, residual = draw(rows, outs, ins, dtype, epilogue, has_outliers, device)
    activation = sorted(SLOPES)[rows % 3] if "gated" in epilogue else None
    got = linear(laid_out(x, layout), weight, bias, residual=residual, **options(epilogue, activation))
    assert got.dtype == (torch.float32 if "fp32" in epilogue else dtype) and got.device.type == device.type
    assert_within_bound(got, x, weight, bias, residual, activation)


def plain(epilogue):
    """The unfused ops in PyTorch; on fp64 arguments the oracle."""

    def run(x, weight, bias, residual):
        if "fp32" in epilogue and x.dtype != torch.float64:
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        y = F.linear(x, weight, bias)
        if "gated" in epilogue:
            return reference.silu_mul(y, "silu")
        return y if residual is None else residual + y

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_accuracy_beside_pytorch(device, dtype, epilogue):
    def kernel(x, weight, bias, residual):
        return linear(x, weight, bias, residual=residual, **options(epilogue))

    if device.type == "cuda" and (dtype == torch.float32 or "fp32" in epilogue):
        pytest.skip("cuBLAS adds partial sums there; the bound of a sum serves (test_accuracy)")
    assert_accurate(kernel, plain(epilogue), lambda: draw(33, 130, 300, dtype, epilogue, True, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["a column is missing", "a row is another's"])
def test_control_accuracy_notices_a_mistake(device, dtype, mistake):
    x, weight, bias, _ = draw(33, 65, 129, dtype, "bias", False, device)
    got = linear(x, weight, bias)
    assert_within_bound(got, x, weight, bias, None, None)
    if mistake == "a column is missing":
        got = linear(x[:, :-1], weight[:, :-1].contiguous(), bias)
    else:
        got[31] = got[30]
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within_bound(got, x, weight, bias, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_control_accuracy_notices_an_early_rounding(device, dtype):
    x, weight, _, _ = draw(33, 65, 129, dtype, "plain", False, device)
    # A bias that cancels a row's sums leaves what their rounding lost.
    bias = -linear(x[:1], weight)[0]
    assert_within_bound(linear(x, weight, bias), x, weight, bias, None, None)
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within_bound(linear(x, weight) + bias, x, weight, bias, None, None)


def integers(rows, outs, ins, dtype, epilogue, device):
    """Sums of at most 8 products of at most 4, a bias of at most 16 and a residual of at most 64: exact in bf16."""
    x, weight = torch.zeros(rows, ins), torch.randint(-2, 3, (2 * outs if "gated" in epilogue else outs, ins))
    for row in range(rows):
        where = torch.randperm(ins)[:8]
        x[row, where] = torch.randint(-2, 3, where.shape).float()
    bias = torch.randint(-16, 17, weight.shape[:1]) if "bias" in epilogue else None
    residual = torch.randint(-64, 65, (rows, outs)) if "residual" in epilogue else None
    return tuple(None if t is None else t.to(dtype).to(device) for t in (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 65, 1025), (17, 129, 100), (130, 33, 257)])
def test_sums_of_integers_are_exact(device, dtype, epilogue, rows, outs, ins):
    x, weight, bias, residual = integers(rows, outs, ins, dtype, epilogue, device)
    got = linear(x, weight, bias, residual=residual, **options(epilogue, "relu"))
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if "gated" in epilogue:
        # The product of two such sums takes more digits than bf16 has: one rounding of the exact one.
        exact = reference.silu_mul(exact, "relu").to(got.dtype).double()
    assert torch.equal(got.double(), exact if residual is None else exact + residual.double())


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 17, 65, 129])
def test_fused_is_unfused(device, dtype, rows):
    x, weight, bias, residual = draw(rows, 65, 330, dtype, "residual bias", True, device)
    stored = linear(x, weight, bias)
    assert same_bits(linear(x, weight, bias, residual=residual), stored + residual)
    assert same_bits(linear(x, weight, residual=residual), linear(x, weight) + residual)
    assert same_bits(linear(x, weight, bias, out_dtype=torch.float32).to(dtype), stored)


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_fused_activation_is_unfused(device, dtype, name):
    for epilogue, rows in (("gated", 3), ("gated bias", 70)):
        x, weight, bias, _ = draw(rows, 65, 140, dtype, epilogue, False, device)
        assert same_bits(linear(x, weight, bias, activation=name), silu_mul(linear(x, weight, bias), name))


def beside(tile):
    """Numbers of rows around those that fill a tile."""
    return [tile.block_rows - 1, tile.block_rows, tile.block_rows + 1]


@contextlib.contextmanager
def only(tile):
    """Linears take this tile, whatever their shape."""
    with mock.patch.object(configs, "linear_tile", return_value=tile):
        yield


def assert_rows_are_alone(function, x, tiles):
    """On every tile, rows of a batch have the bits that they have alone on the first."""
    alone = {}
    for tile in tiles:
        for count in beside(tile):
            with only(tile):
                out = function(x[:count])
            for row in {0, 1, count // 2, count - 1}:
                if row not in alone:
                    with only(tiles[0]):
                        alone[row] = function(x[row : row + 1])
                assert same_bits(out[row : row + 1], alone[row]), f"row {row} of {count} on {tile}"


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("table", "dtype"), TABLES)
def test_bits_of_a_row_do_not_depend_on_its_company_or_tile(device, monkeypatch, table, dtype, gated):
    if table is not None:
        monkeypatch.setattr(configs, "table_of", lambda device: table)
    epilogue = "gated bias" if gated else "residual bias"
    # 200: a last step that no tile fills.
    x, weight, bias, _ = draw(257, 70, 200, dtype, epilogue, True, device)
    residual = None if gated else torch.randn(1, 70).to(x)

    def function(rows):
        added = None if residual is None else residual.expand(len(rows), -1).contiguous()
        return linear(rows, weight, bias, residual=added, **options(epilogue))

    assert_rows_are_alone(function, x, configs.linear_tiles(configs.table_of(device), dtype, gated))
    # In another place of a batch, and twice.
    assert same_bits(function(x.flip(0)).flip(0), function(x))


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("out_features", [70, 1100])
def test_bits_do_not_change_where_another_tile_takes_over(device, monkeypatch, dtype, gated, out_features):
    # A small chip, so that the choice changes within a few hundred rows of a small weight.
    monkeypatch.setitem(configs.PROCESSORS, configs.table_of(device), 4)
    configs.linear_tile.cache_clear()
    try:
        table = configs.table_of(device)
        counts = configs.row_thresholds(table, dtype, gated, out_features, 130)
        assert counts
        x, weight, _, _ = draw(max(counts) + 1, out_features, 48, dtype, "gated" if gated else "plain", False, device)
        activation = "silu" if gated else None
        alone = {row: linear(x[row : row + 1], weight, activation=activation) for row in (0, 7)}
        for count in sorted({count + step for count in counts for step in (-1, 0, 1)}):
            out = linear(x[:count], weight, activation=activation)
            for row, expected in alone.items():
                assert row >= count or same_bits(out[row : row + 1], expected), f"row {row} of {count}"
    finally:
        configs.linear_tile.cache_clear()


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
def test_control_a_split_that_depends_on_the_number_of_rows_is_noticed(device, dtype):
    x, weight, _, _ = draw(257, 70, 200, dtype, "fp32", False, device)

    def by_company(rows):
        if len(rows) <= 16:
            return linear(rows, weight, out_dtype=torch.float32)
        halves = (slice(96), slice(96, None))
        parts = [linear(rows[:, part], weight[:, part].contiguous(), out_dtype=torch.float32) for part in halves]
        return parts[0] + parts[1]

    with pytest.raises(AssertionError, match="row .* of 17"):
        assert_rows_are_alone(by_company, x, configs.linear_tiles(configs.table_of(device), dtype, False))


def test_few_rows_take_the_narrowest_tile_and_many_the_widest():
    for table in configs.PROCESSORS:
        for dtype, gated in ((dtype, gated) for dtype in DTYPES for gated in (False, True)):
            tiles = configs.linear_tiles(table, dtype, gated)
            assert all(tile.block_k % 16 == 0 and tile.block_out % 64 == 0 for tile in tiles)
            widths = [tile.block_rows for tile in tiles]
            for outs in (2048, 6144, 128256):
                chosen = [configs.linear_tile(table, dtype, gated, outs, rows).block_rows for rows in (1, 16, 65536)]
                assert chosen == [min(widths), min(widths), max(widths)]


@pytest.mark.usefixtures("chained")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["residual bias", "gated bias", "fp32"])
@pytest.mark.parametrize(("rows", "ins"), [(3, 64), (18, 65)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, epilogue, rows, ins):
    x, weight, bias, residual = draw(rows, 33, ins, dtype, epilogue, False, device)
    keywords = options(epilogue)
    expected = linear(x, weight, bias, residual=residual, **keywords)
    moved = [None if t is None else offset(t) for t in (x, weight, bias, residual)]
    assert same_bits(linear(*moved[:3], residual=moved[3], **keywords), expected)
    for same in (laid_out(x, "strided"), x.repeat_interleave(2, 0)[::2], torch.cat((x, x), 1)[:, ins:]):
        assert not same.is_contiguous()
        assert same_bits(linear(same, weight, bias, residual=residual, **keywords), expected)
    one = linear(x[:1].expand(3, -1), weight, bias, **keywords)
    assert same_bits(one, linear(x[:1], weight, bias, **keywords).expand(3, -1).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 1, 1), (17, 65, 129), (129, 3, 20)])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, dtype, epilogue, rows, outs, ins):
    x, weight, bias, residual = draw(rows, outs, ins, dtype, epilogue, False, device)
    before = [None if t is None else t.clone() for t in (x, weight, bias, residual)]
    with guarded():
        out = linear(x, weight, bias, residual=residual, **options(epilogue))
    assert out.shape == (rows, outs) and not out.isnan().any()
    for kept, t in zip(before, (x, weight, bias, residual), strict=True):
        assert t is None or same_bits(t, kept)


@pytest.mark.parametrize(("rows", "outs"), [(0, 64), (5, 0), (0, 0)])
def test_F06_nothing_to_do_launches_nothing(device, launches, rows, outs):
    grids = launches(module, "_linear_kernel")
    x, weight, bias, residual = draw(rows, outs, 32, torch.bfloat16, "residual bias", False, device)
    out = linear(x, weight, bias, residual=residual)
    assert out.shape == (rows, outs) and out.dtype == torch.bfloat16 and out.device.type == device.type
    gated = linear(x, torch.cat((weight, weight)), activation="silu", out_dtype=torch.float32)
    assert gated.shape == (rows, outs) and gated.dtype == torch.float32
    assert grids == []


@pytest.mark.parametrize("rows", [3, 70, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch(device, launches, dtype, rows):
    grids = launches(module, "_linear_kernel", run=False)
    x, weight, _, _ = draw(rows, 1100, 20, dtype, "plain", False, device)
    linear(x, weight)
    tile = configs.linear_tile(configs.table_of(device), dtype, False, 1100, rows)
    assert grids == [(-(-1100 // tile.block_out) * -(-rows // tile.block_rows),)]


class _NoHostReads(TorchDispatchMode):
    """What waits for the device, or cannot be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_the_host_reads_nothing(device, launches, epilogue):
    grids = launches(module, "_linear_kernel", run=False)
    x, weight, bias, residual = draw(3, 65, 20, torch.bfloat16, epilogue, False, device)
    with _NoHostReads():
        linear(x, weight, bias, residual=residual, **options(epilogue))
    assert len(grids) == 1
    with pytest.raises(AssertionError, match="reads from the device"), _NoHostReads():
        x[0, 0].item()


@pytest.mark.parametrize("axis", ["outputs", "rows"])
def test_F09_more_than_65535_tiles(device, launches, axis):
    rows, outs = (1, 64 * 65_536 + 3) if axis == "outputs" else (64 * 65_536 + 3, 1)
    x, weight, _, _ = draw(rows, outs, 1, torch.float32, "plain", False, device)
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_linear_kernel", run=not INTERPRETED)
    out = linear(x, weight)
    assert grids == [(65_537,)]
    if not INTERPRETED:
        assert_within_bound(out, x, weight, None, None, None)


@pytest.fixture
def last_program(monkeypatch, only_programs):
    """Interpreted launches of the linear kernel run their last program only: others would take minutes."""
    kernel = module._linear_kernel

    class Last:
        def __getitem__(self, grid):
            only_programs([grid[0] - 1])
            return kernel[(1,)]

    if INTERPRETED:
        monkeypatch.setattr(module, "_linear_kernel", Last())


def test_F08_rows_beyond_2_31_elements(device, huge):
    ins, stride = 33, 2**30 + 8
    near, weight, bias, _ = draw(3, 5, ins, torch.bfloat16, "bias", False, device)
    x = huge(2 * stride + ins, torch.bfloat16).as_strided((3, ins), (stride, 1))
    x.copy_(near)
    assert same_bits(linear(x, weight, bias), linear(near, weight, bias))


@pytest.mark.usefixtures("last_program")
@pytest.mark.parametrize("gated", [False, True])
def test_F08_weights_beyond_2_31_elements(device, huge, gated):
    # Gated: up's half begins beyond 2^31.
    ins, outs = 1024, 2**21 + 64
    x, last, _, _ = draw(1, 64, ins, torch.bfloat16, "gated" if gated else "plain", False, device)
    weight = huge((2 if gated else 1) * outs * ins, torch.bfloat16).view(-1, ins)
    weight[outs - 64 : outs] = last[:64]
    if gated:
        weight[-64:] = last[64:]
    keywords = {"activation": "silu"} if gated else {}
    got = linear(x, weight, **keywords)[:, -64:]
    assert_within_bound(got, x, last, None, None, keywords.get("activation"))


@pytest.mark.usefixtures("last_program")
def test_F08_outputs_beyond_2_31_elements(device, huge, monkeypatch):
    rows, outs = 2**21 + 1, 1024
    x, weight, _, _ = draw(1, outs, 16, torch.bfloat16, "plain", False, device)
    residual, out = (huge(rows * outs, torch.bfloat16).view(rows, outs) for _ in range(2))
    residual[-1] = 1
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: out)
    got = linear(x.expand(rows, -1), weight, residual=residual)[-1:]
    # Interpreted: the tile of the last outputs.
    compared = slice(-128 if INTERPRETED else 0, None)
    assert_within_bound(got[:, compared], x, weight[compared], None, residual[-1:, compared], None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_F12_not_finite_values_stand_where_they_belong(device, dtype, bad):
    x, weight, bias, residual = draw(20, 70, 100, dtype, "residual bias", False, device)
    healthy = linear(x, weight, bias, residual=residual)
    broken = [t.clone() for t in (x, weight, bias, residual)]
    broken[0][3, 99], broken[1][69, 5], broken[2][7], broken[3][11, 13] = bad, bad, bad, bad
    got = linear(*broken[:3], residual=broken[3])
    twin = broken[3] + F.linear(*broken[:3])
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])
    untouched = torch.ones(20, 70, dtype=torch.bool, device=device)
    untouched[3], untouched[:, 69], untouched[:, 7], untouched[11, 13] = False, False, False, False
    assert same_bits(got[untouched], healthy[untouched])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_F12_not_finite_gates(device, bad, half):
    x, weight, bias, _ = draw(20, 70, 100, torch.float32, "gated bias", False, device)
    healthy = linear(x, weight, bias, activation="silu")
    weight[70 * half + 69, 5] = bad
    got, twin = linear(x, weight, bias, activation="silu"), reference.silu_mul(F.linear(x, weight, bias), "silu")
    assert torch.equal(got.isnan(), twin.isnan()) and torch.equal(got.isinf(), twin.isinf())
    assert same_bits(got[:, :69], healthy[:, :69])


def good(device):
    """Arguments that are accepted, by name."""
    x, weight, bias, residual = draw(3, 6, 8, torch.float32, "residual bias", False, device)
    return {"x": x, "weight": weight, "bias": bias, "residual": residual}


def assert_refused(arguments, message):
    with pytest.raises(KernelArgumentError, match=message):
        linear(**arguments)


def test_good_arguments_are_accepted(device):
    assert linear(**good(device)).shape == (3, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_F01_dtypes(device, dtype):
    arguments = {name: t.to(dtype) for name, t in good(device).items()}
    assert_refused(arguments, f"linear: x is {dtype}; use float16, bfloat16 or float32")


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_F01_mixed_dtypes(device, name):
    arguments = good(device)
    arguments[name] = arguments[name].half()
    assert_refused(arguments, f"{name} is torch.float16 and x is torch.float32; give both one dtype")


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.float64, torch.int64])
def test_F01_out_dtype(device, out_dtype):
    assert_refused(
        good(device) | {"out_dtype": out_dtype}, f"out_dtype={out_dtype}; use torch.float32 or torch.float32"
    )


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_F03_devices(device, name):
    arguments = good(device)
    arguments[name] = arguments[name].to("meta")
    assert_refused(arguments, f"{name} is on meta and x on .*; move one of them")


def test_F03_a_device_without_kernels(device):
    arguments = {name: t.to("meta") for name, t in good(device).items()}
    assert_refused(arguments, "x is on meta; the kernel takes .*backend='reference'")


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_F03_gradients(device, name):
    arguments = good(device)
    arguments[name].requires_grad_()
    assert_refused(arguments, f"{name} requires grad and kernels have no backward")
    with torch.no_grad():
        linear(**arguments)


SHAPES = r"x must be \[num_tokens, in_features\] and weight \[out_features, in_features\]; got "


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], SHAPES + r"\(8,\) and \(6, 8\)"),
        ("x", lambda t: t[None], SHAPES + r"\(1, 3, 8\)"),
        ("x", lambda t: t[:, :7], SHAPES + r"\(3, 7\)"),
        ("weight", lambda t: t[0], SHAPES + r"\(3, 8\) and \(8,\)"),
        ("weight", lambda t: t.T, SHAPES + r"\(3, 8\) and \(8, 6\)"),
        ("weight", lambda t: t[None], SHAPES),
        ("bias", lambda t: t[:5], r"bias must be \[6\] and contiguous; got \(5,\)"),
        ("bias", lambda t: t[None], r"bias must be \[6\] and contiguous; got \(1, 6\)"),
        (
            "bias",
            lambda t: t.repeat_interleave(2)[::2],
            r"bias must be \[6\] and contiguous; got \(6,\), stride \(2,\)",
        ),
        ("bias", lambda t: t[:1].expand(6), r"bias must be \[6\] and contiguous; got \(6,\), stride \(0,\)"),
        ("residual", lambda t: t[:2], r"residual must be \(3, 6\) and contiguous; got \(2, 6\)"),
        ("residual", lambda t: t[:, :1], r"residual must be \(3, 6\) and contiguous; got \(3, 1\)"),
        ("residual", lambda t: t[0], r"residual must be \(3, 6\) and contiguous; got \(6,\)"),
        ("residual", lambda t: t[:1].expand(3, -1), r"residual must be \(3, 6\) and contiguous"),
        ("residual", lambda t: t.T.contiguous().T, r"residual must be \(3, 6\) and contiguous"),
    ],
)
def test_F02_shapes(device, name, change, message):
    arguments = good(device)
    arguments[name] = change(arguments[name])
    assert_refused(arguments, message)


def test_F02_no_input_features(device):
    assert_refused({"x": torch.zeros(3, 0, device=device), "weight": torch.zeros(4, 0, device=device)}, SHAPES)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t.T.contiguous().T),
        ("x", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        ("x", lambda t: t[:, :1].expand(-1, 8)),
        ("weight", lambda t: t.T.contiguous().T),
        ("weight", lambda t: t[:1].expand(6, -1)),
        ("weight", lambda t: torch.cat((t, t), dim=1)[:, :8]),
    ],
)
def test_F04_strides_that_are_refused(device, name, change):
    arguments = good(device)
    arguments[name] = change(arguments[name])
    assert_refused(arguments, "x's columns and weight must be contiguous; got strides .* and")


def test_unknown_activation(device):
    arguments = good(device) | {"residual": None, "activation": "gelu_erf"}
    assert_refused(arguments, "activation='gelu_erf' is unknown; use one of .*silu")


def test_an_activation_needs_two_halves_and_no_residual(device):
    message = "activation needs gate and up of equal height and no residual; weight has "
    arguments = good(device) | {"activation": "silu"}
    assert_refused(arguments, message + "6 rows")
    odd = {"residual": None, "bias": None, "weight": arguments["weight"][:5]}
    assert_refused(arguments | odd, message + "5 rows")

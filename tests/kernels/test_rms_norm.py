"""The rms_norm kernel against its plain-PyTorch twin: accuracy, order of rounding, bits, layouts, refusals."""

import random

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import rms_norm as module
from llama_fast.kernels.rms_norm import MAX_HIDDEN_SIZE, rms_norm
from llama_fast.ops import reference
from tests.kernels.accuracy import DTYPES, assert_accurate, outliers, same_bits
from tests.kernels.conftest import INTERPRETED

WIDTHS = [1, 2, 3, 31, 33, 111, 127, 128, 129, 509, 511, 512, 513, 1021, 1023, 1024, 1025, 2047, 2049, 3989]
MODEL_WIDTHS = [2048, 3072, 4096, 5120, 8192, 14336, 16384]
LAYOUTS = ["contiguous", "strided", "offset", "transposed"]
MODES = ["random", "outliers", "huge", "small"]


def cases(count):
    """`count` different (rows, width, dtype, eps, values, layout), the same in every run."""
    choose, chosen = random.Random(1), {}
    for index, width in enumerate(WIDTHS * len(DTYPES)):
        dtype, mode = DTYPES[index // len(WIDTHS)], MODES[index % 4]
        chosen[(1 + index % 7, width, dtype, (1e-5, 1e-6)[index % 2], mode, LAYOUTS[index // 4 % 4])] = None
    for width in MODEL_WIDTHS:
        for index, dtype in enumerate(DTYPES):
            chosen[(1, width, dtype, 1e-5, MODES[index], "contiguous")] = None
    for dtype in DTYPES:
        chosen[(1, MAX_HIDDEN_SIZE, dtype, 1e-5, "random", "contiguous")] = None
    while len(chosen) < count:
        width = choose.choice(WIDTHS) if choose.random() < 0.7 else choose.randint(1, 5000)
        rows = choose.randint(1, min(40, 1 + 12_000 // width))
        eps = choose.choice((1e-5, 1e-6, 1e-12, 0.1))
        chosen[(rows, width, choose.choice(DTYPES), eps, choose.choice(MODES), choose.choice(LAYOUTS))] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


def draw(rows, width, dtype, mode, device):
    x = torch.randn(rows, width)
    if mode == "outliers":
        x = outliers(x)
    elif mode == "huge":
        # A sum of squares that overflows fp16, and for the wide dtypes one far from 1.
        x = x * (5000 if dtype == torch.float16 else 1e12)
    elif mode == "small":
        # eps decides here.
        x = x * 1e-3
    return x.to(dtype).to(device)


def laid_out(x, layout):
    """The same numbers with padded rows, from an address one element past an aligned one, or column by column."""
    if layout == "strided":
        return torch.cat((x, torch.full_like(x[:, :1], torch.nan)), dim=1)[:, : x.shape[1]]
    if layout == "offset":
        return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(x.shape)
    if layout == "transposed":
        return x.T.contiguous().T
    return x


def test_accuracy(device, case):
    rows, width, dtype, eps, mode, layout = case

    def both(function):
        # A narrow case gives few outputs: those of a wider draw fill the pool.
        return lambda weight, filler_weight, *inputs: torch.cat(
            [function(inputs[0], weight, eps).flatten(), function(inputs[1], filler_weight, eps).flatten()]
        )

    def inputs():
        weight, filler_weight = torch.randn(width).to(dtype).to(device), torch.randn(1021).to(dtype).to(device)
        x, filler = draw(rows, width, dtype, mode, device), draw(4, 1021, dtype, mode, device)
        return weight, filler_weight, laid_out(x, layout), filler

    assert_accurate(both(rms_norm), both(reference.rms_norm), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["no eps", "mean without its square", "width of the block"])
def test_control_accuracy_notices_a_wrong_norm(device, dtype, mistake):
    weight = torch.ones(1021, dtype=dtype, device=device)

    def wrong(x):
        if mistake == "no eps":
            return rms_norm(x, weight, 0.0)
        if mistake == "width of the block":
            return (rms_norm(x, weight, 0.1).float() * (1024 / 1021) ** 8).to(dtype)
        return (x.float() / (x.float().abs().mean(-1, keepdim=True) + 0.1)).to(dtype)

    with pytest.raises(AssertionError, match="beyond one ulp"):
        assert_accurate(
            wrong,
            lambda x: reference.rms_norm(x, weight.to(x.dtype), 0.1),
            lambda: (draw(4, 1021, dtype, "random", device),),
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [129, 2048])
def test_rounds_before_the_weight_as_hugging_face(device, dtype, width):
    x, weight = draw(32, width, dtype, "random", device), torch.randn(width).to(dtype).to(device)
    exact = reference.rms_norm(x.double(), torch.ones_like(weight, dtype=torch.float64), 1e-5)
    early = exact.to(dtype) * weight
    late = (exact * weight.double()).to(dtype)
    got = rms_norm(x, weight, 1e-5)
    # fp32's own error moves a rounding in about one of 2^12 (bf16: 2^15) values, the other order in every fourth.
    wrong_early, wrong_late = (got != early).double().mean(), (got != late).double().mean()
    assert wrong_early < 2**-8 < 2**-4 < wrong_late


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4, 16, 64, 256, 1024, 4096, 16384])
def test_one_hot_rows_are_exact(device, dtype, width):
    # The mean is 2^2k / 4^m, its root a power of two: the result is the root of the width.
    hot = [(0, -4), (width // 2, 0), (width - 1, 3)]
    x = torch.zeros(len(hot), width)
    for row, (column, exponent) in enumerate(hot):
        x[row, column] = 2.0**exponent
    weight = torch.randn(width).to(dtype).to(device)
    expected = (x > 0).to(dtype).to(device) * width**0.5 * weight
    assert torch.equal(rms_norm(x.to(dtype).to(device), weight, 0.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 33, 127, 1000, 1025, 4096])
def test_rows_of_one_magnitude_give_the_weight_exactly(device, dtype, width):
    signs = torch.randint(0, 2, (6, width)) * 2 - 1
    x = (signs * 2.0 ** torch.tensor([-6, -1, 0, 1, 4, 6])[:, None]).to(dtype).to(device)
    weight = torch.randn(width).to(dtype).to(device)
    assert torch.equal(rms_norm(x, weight, 0.0), signs.to(device) * weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_F12_not_finite_values_stand_where_the_twin_has_them(device, dtype, eps):
    info = torch.finfo(dtype)
    x = torch.randn(14, 33)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, 0.0, -0.0]):
        x[row, 5] = value
    x[8], x[9], x[10], x[11] = 0.0, info.tiny, info.max, info.smallest_normal / 4
    x[12] = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(11)
    x[13] = -0.0
    x, weight = x.to(dtype).to(device), torch.ones(33, dtype=dtype, device=device)
    weight[7], weight[8] = torch.nan, torch.inf
    got, twin = rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps)
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 64])
def test_bits_of_a_row_do_not_depend_on_its_company(device, dtype, rows):
    width = {1: 16384, 2: 4096, 3: 1025}.get(rows, 130 + rows)
    row, weight = draw(1, width, dtype, "random", device), torch.randn(width).to(dtype).to(device)
    alone = rms_norm(row, weight, 1e-5)
    assert same_bits(rms_norm(row, weight, 1e-5), alone)
    assert _alone_is_in_company(lambda x: rms_norm(x, weight, 1e-5), row, alone, rows)


def _alone_is_in_company(function, row, alone, rows):
    """Whether `function` gives the row what it got alone at every place among others."""
    batch = torch.randn(rows, row.shape[1]).to(row)
    places = range(0, rows, 1 if rows < 18 else 9)
    for place in places:
        batch[place] = row
    out = function(batch)
    return all(same_bits(out[place : place + 1], alone) for place in places)


def test_control_a_sum_split_by_the_number_of_rows_is_noticed(device):
    def by_company(x):
        # Partial sums stored in bf16, one part for each row.
        parts = torch.stack([part.square().sum(-1).bfloat16() for part in x.chunk(len(x), dim=1)])
        return x / (parts.float().sum(0) / x.shape[1] + 1e-5).sqrt()[:, None]

    row = draw(1, 1021, torch.float32, "random", device)
    alone = by_company(row)
    assert not all(_alone_is_in_company(by_company, row, alone, rows) for rows in range(1, 18))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 33), (2, 1025), (3, 128), (2, 4096)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, rows, width):
    x, weight = draw(rows, width, dtype, "outliers", device), torch.randn(width).to(dtype).to(device)
    expected = rms_norm(x, weight, 1e-5)
    for layout in LAYOUTS:
        assert same_bits(rms_norm(laid_out(x, layout), laid_out(weight[None], layout)[0], 1e-5), expected)
    assert same_bits(rms_norm(x.repeat_interleave(2, 1)[:, ::2], weight, 1e-5), expected)
    assert same_bits(rms_norm(x[:1].expand(3, -1), weight, 1e-5), expected[:1].expand(3, -1))
    assert same_bits(rms_norm(x, weight[:1].expand(width), 1e-5), rms_norm(x, weight[:1].repeat(width), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2), (7, 129), (2, 1023), (2, 1025), (2, 2048)])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, dtype, rows, width):
    x, weight = draw(rows, width, dtype, "random", device), torch.randn(width).to(dtype).to(device)
    with guarded():
        out = rms_norm(x, weight, 1e-5)
    assert not out.isnan().any()


def test_inputs_keep_their_bits(device):
    x, weight = draw(3, 129, torch.bfloat16, "random", device), torch.randn(129).to(torch.bfloat16).to(device)
    before = x.clone(), weight.clone()
    rms_norm(x, weight, 1e-5)
    assert same_bits(x, before[0]) and same_bits(weight, before[1])


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_F06_nothing_to_do_launches_nothing(device, launches, shape):
    grids = launches(module, "_rms_norm_kernel")
    x = torch.empty(*shape, dtype=torch.float16, device=device)
    out = rms_norm(x, torch.empty(shape[1], dtype=torch.float16, device=device), 1e-5)
    assert out.shape == shape and out.dtype == torch.float16 and out.device.type == device.type
    assert grids == []


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 1024), (7, 1025)])
def test_one_launch(device, launches, rows, width):
    grids = launches(module, "_rms_norm_kernel")
    rms_norm(torch.zeros(rows, width, device=device), torch.zeros(width, device=device), 1e-5)
    assert grids == [(rows,)]


def test_F09_more_than_65535_rows(device, launches):
    rows = 70_000
    x, weight = torch.randn(rows, 4).to(torch.bfloat16).to(device), torch.randn(4).to(torch.bfloat16).to(device)
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_rms_norm_kernel", run=not INTERPRETED)
    out = rms_norm(x, weight, 1e-5)
    assert grids == [(rows,)]
    if not INTERPRETED:
        assert same_bits(out[-5:], rms_norm(x[-5:], weight, 1e-5))
        assert not out.isnan().any()


def test_F08_rows_beyond_2_31_elements(device, huge, only_programs):
    width, last = 512, 2**22
    row, weight = draw(1, width, torch.bfloat16, "random", device), torch.randn(width).to(torch.bfloat16).to(device)
    expected = rms_norm(row, weight, 1e-5)
    x = huge((last + 1) * width, torch.bfloat16).view(-1, width)
    x[last] = row
    if INTERPRETED:
        out = huge((last + 1) * width, torch.bfloat16).view(-1, width)
        only_programs([last])
        module._rms_norm_kernel[(1,)](x, weight, out, 1e-5, width, width, False)
    else:
        out = rms_norm(x, weight, 1e-5)
    assert same_bits(out[last:], expected)
    assert not out[last - 1].any()


@pytest.mark.parametrize("width", [1, 511, 512, 1024, 2047, 2048, 4096, 8192, 16384, MAX_HIDDEN_SIZE])
def test_a_thread_holds_at_most_32_values(width):
    warps = module.num_warps(width)
    assert warps in (1, 2, 4, 8, 16, 32)
    assert width <= 32 * 32 * warps


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_F01_dtypes(device, dtype):
    with pytest.raises(KernelArgumentError, match=f"x is {dtype}; use float16, bfloat16 or float32"):
        rms_norm(torch.zeros(2, 8, dtype=dtype, device=device), torch.zeros(8, dtype=dtype, device=device), 1e-5)


@pytest.mark.parametrize(("x", "weight"), [(a, b) for a in DTYPES for b in DTYPES if a != b])
def test_F01_mixed_dtypes(device, x, weight):
    with pytest.raises(KernelArgumentError, match=f"weight is {weight} and x is {x}; give both one dtype"):
        rms_norm(torch.zeros(2, 8, dtype=x, device=device), torch.zeros(8, dtype=weight, device=device), 1e-5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((), (1,)),
        ((8,), (8,)),
        ((2, 3, 8), (8,)),
        ((2, 8), (7,)),
        ((2, 8), (1, 8)),
        ((2, 8), ()),
        ((1, MAX_HIDDEN_SIZE + 1), (MAX_HIDDEN_SIZE + 1,)),
    ],
)
def test_F02_shapes(device, x, weight):
    with pytest.raises(KernelArgumentError, match=r"x must be \[num_tokens, hidden_size\].*; got \(.*\) and \(.*\)"):
        rms_norm(torch.zeros(x, device=device), torch.zeros(weight, device=device), 1e-5)


def test_F03_devices(device):
    with pytest.raises(KernelArgumentError, match="x is on meta; the kernel takes .*backend='reference'"):
        rms_norm(torch.zeros(2, 8, device="meta"), torch.zeros(8, device="meta"), 1e-5)
    with pytest.raises(KernelArgumentError, match="weight is on meta and x on .*; move one of them"):
        rms_norm(torch.zeros(2, 8, device=device), torch.zeros(8, device="meta"), 1e-5)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_F03_gradients(device, which):
    tensors = {"x": torch.zeros(2, 8, device=device), "weight": torch.zeros(8, device=device)}
    tensors[which].requires_grad_()
    with pytest.raises(KernelArgumentError, match=f"{which} requires grad and kernels have no backward"):
        rms_norm(**tensors, eps=1e-5)
    with torch.no_grad():
        assert rms_norm(**tensors, eps=1e-5).shape == (2, 8)

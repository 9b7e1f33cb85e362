"""The silu_mul kernel against its plain-PyTorch twin: accuracy, bits, layouts, values that are not finite, refusals."""

import random

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import silu_mul as module
from llama_fast.kernels.silu_mul import ACTIVATIONS, silu_mul
from llama_fast.ops import activations, reference
from tests.kernels.accuracy import DTYPES, assert_accurate, outliers, same_bits
from tests.kernels.conftest import INTERPRETED

NAMES = sorted(ACTIVATIONS)
BLOCK = module._BLOCK
WIDTHS = [1, 2, 3, 31, 33, 111, 127, 128, 129, 509, 1021, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1, 2049]
MODEL_WIDTHS = [2048, 4096, 5632, 8192, 11008, 14336]
LAYOUTS = ["contiguous", "strided", "offset"]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 30.0, -30.0]


def cases(count):
    """`count` different (rows, width, dtype, activation, has outliers, layout), the same in every run."""
    choose, chosen = random.Random(0), {}
    # Every name in every dtype first, every width among them.
    for index, name in enumerate(NAMES * len(DTYPES)):
        dtype, width = DTYPES[index // len(NAMES)], WIDTHS[index % len(WIDTHS)]
        chosen[(1 + index % 7, width, dtype, name, index % 2 == 0, LAYOUTS[index % 3])] = None
    for width in MODEL_WIDTHS:
        for dtype in DTYPES:
            chosen[(2, width, dtype, "silu", False, "contiguous")] = None
    while len(chosen) < count:
        width = choose.choice(WIDTHS) if choose.random() < 0.7 else choose.randint(1, 3000)
        rows = choose.randint(1, min(33, 1 + 8192 // width))
        options = (choose.choice(DTYPES), choose.choice(NAMES), choose.random() < 0.5, choose.choice(LAYOUTS))
        chosen[(rows, width, *options)] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


def draw(rows, width, dtype, has_outliers, device):
    gate, up = torch.randn(rows, width), torch.randn(rows, width)
    if has_outliers:
        # fp16 ends at 65,504 and relu2 squares: outliers of up to 250 there.
        gate = outliers(gate * (0.05 if dtype == torch.float16 else 1))
    return torch.cat((gate, up), dim=1).to(dtype).to(device)


def laid_out(x, layout):
    """The same numbers with padded rows, or from an address one element past an aligned one."""
    rows, width = x.shape
    if layout == "strided":
        return torch.cat((x, torch.full_like(x[:, :1], torch.nan)), dim=1)[:, :width]
    if layout == "offset":
        return torch.cat((x.new_full((1,), torch.nan), x.flatten()))[1:].view(rows, width)
    return x


def test_accuracy(device, case):
    rows, width, dtype, name, has_outliers, layout = case

    def both(function):
        # A narrow case gives few outputs: those of a wider draw fill the pool.
        return lambda *inputs: torch.cat([function(x, name).flatten() for x in inputs])

    def inputs():
        filler = draw(4, 1021, dtype, has_outliers, device)
        return laid_out(draw(rows, width, dtype, has_outliers, device), layout), filler

    assert_accurate(both(silu_mul), both(reference.silu_mul), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_control_accuracy_notices_another_activation(device, dtype):
    # The two GELUs differ by 5e-4, which 16-bit dtypes hardly resolve; quick_gelu is off by 0.02.
    wrong = "gelu_new" if dtype == torch.float32 else "quick_gelu"
    with pytest.raises(AssertionError, match="beyond one ulp"):
        assert_accurate(
            lambda x: silu_mul(x, wrong),
            lambda x: reference.silu_mul(x, "gelu"),
            lambda: (draw(4, 1021, dtype, False, device).clamp(-2, 2),),
        )


def test_every_activation_of_the_configuration_is_known():
    assert set(ACTIVATIONS) == set(activations.ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["linear", "relu", "relu2", "relu6"])
def test_powers_of_two_are_exact(device, dtype, name):
    gate = torch.cat((2.0 ** torch.arange(-6, 6), -(2.0 ** torch.arange(-6, 6)), torch.zeros(1)))
    up = 2.0 ** torch.arange(-4, 4)
    x = torch.cat((gate.repeat_interleave(len(up)), up.repeat(len(gate)))).to(dtype).to(device)[None]
    assert torch.equal(silu_mul(x, name).double(), reference.silu_mul(x.double(), name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_saturated_gates_are_exact(device, dtype, name):
    # e^-128 is 3e-56: less than half an ulp beside 1, nothing in fp32.
    x = torch.tensor([[128.0, -128.0, 0.0, 1.0, 1.0, 1.0]], dtype=dtype, device=device)
    exact = reference.silu_mul(x.double(), name)
    if name == "laplace":
        x, exact = x[:, [0, 1, 3, 4]], exact[:, :2]  # 0 is not a saturated gate of it
    assert torch.equal(silu_mul(x, name), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_F12_not_finite_values_stand_where_the_twin_has_them(device, dtype, name):
    info = torch.finfo(dtype)
    values = torch.tensor([*SPECIAL, info.max, -info.max, info.tiny, info.smallest_normal / 2]).to(dtype)
    gate, up = values.repeat_interleave(len(values)), values.repeat(len(values))
    x = torch.cat((gate, up))[None].to(device)
    got, twin = silu_mul(x, name), reference.silu_mul(x, name)
    if name == "gelu":
        # PyTorch's vectorised fp32 GELU on the CPU makes NaN of infinity and infinity of 3e38; its fp64 one is right.
        twin = reference.silu_mul(x.double(), name).to(dtype)
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 18), 64])
def test_bits_of_a_row_do_not_depend_on_its_company(device, dtype, rows):
    width = {1: 2049, 2: 1025, 3: 111}.get(rows, 130 + rows)
    row = draw(1, width, dtype, False, device)
    alone = silu_mul(row)
    assert same_bits(silu_mul(row), alone)
    assert _alone_is_in_company(silu_mul, row, alone, rows)


def _alone_is_in_company(function, row, alone, rows):
    """Whether `function` gives the row what it got alone at every place among others."""
    batch = torch.randn(rows, row.shape[1]).to(row)
    places = range(0, rows, 1 if rows < 18 else 9)
    for place in places:
        batch[place] = row
    out = function(batch)
    return all(same_bits(out[place : place + 1], alone) for place in places)


def test_control_a_function_of_the_batch_is_noticed(device):
    def by_company(x):
        # The same mathematically; the number of rows decides how it is rounded.
        return silu_mul(x / len(x), "linear") * len(x) ** 2

    row = draw(1, 1021, torch.float32, False, device)
    alone = by_company(row)
    assert not all(_alone_is_in_company(by_company, row, alone, rows) for rows in range(1, 18))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 33), (2, 1025), (3, 128), (1, 4096)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, rows, width):
    x = draw(rows, width, dtype, True, device)
    expected = silu_mul(x)
    assert same_bits(silu_mul(laid_out(x, "strided")), expected)
    assert same_bits(silu_mul(laid_out(x, "offset")), expected)
    assert same_bits(silu_mul(x.repeat_interleave(2, 0)[::2]), expected)
    assert same_bits(silu_mul(x[:1].expand(3, -1)), expected[:1].expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2), (7, 129), (2, BLOCK), (2, BLOCK + 1), (1, BLOCK - 1)])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, dtype, rows, width):
    x = draw(rows, width, dtype, False, device)
    with guarded():
        out = silu_mul(x)
    assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_F06_nothing_to_do_launches_nothing(device, launches, shape):
    grids = launches(module, "_silu_mul_kernel")
    out = silu_mul(torch.empty(*shape, dtype=torch.bfloat16, device=device))
    assert out.shape == (shape[0], shape[1] // 2) and out.dtype == torch.bfloat16 and out.device.type == device.type
    assert grids == []


@pytest.mark.parametrize(("rows", "width", "programs"), [(1, 1, 1), (3, BLOCK, 3), (3, BLOCK + 1, 6)])
def test_one_launch(device, launches, rows, width, programs):
    grids = launches(module, "_silu_mul_kernel")
    silu_mul(torch.zeros(rows, 2 * width, device=device))
    assert grids == [(programs,)]


def test_F09_more_than_65535_rows(device, launches):
    rows = 70_000
    x = torch.randn(rows, 4).to(torch.bfloat16).to(device)
    # Interpreting so many programs would take minutes: there the grid shows that axis 0 takes them.
    grids = launches(module, "_silu_mul_kernel", run=not INTERPRETED)
    out = silu_mul(x)
    assert grids == [(rows,)]
    if not INTERPRETED:
        assert same_bits(out[-5:], silu_mul(x[-5:]))
        assert not out.isnan().any()


def test_F08_rows_beyond_2_31_elements(device, huge):
    width, stride = 33, 2**30 + 8
    x = huge(2 * stride + 2 * width, torch.bfloat16).as_strided((3, 2 * width), (stride, 1))
    rows = draw(3, width, torch.bfloat16, False, device)
    x.copy_(rows)
    assert same_bits(silu_mul(x), silu_mul(rows))


def test_F08_outputs_beyond_2_31_elements(device, huge, only_programs):
    # The last row of 2^22 + 1 rows of 512.
    width, last = 512, 2**22
    row = draw(1, width, torch.bfloat16, False, device)
    expected = silu_mul(row)
    out = huge((last + 1) * width, torch.bfloat16).view(-1, width)
    x = row.expand(last + 1, -1)
    if INTERPRETED:
        only_programs([last])
        module._silu_mul_kernel[(1,)](x, out, x.stride(0), width, "silu", BLOCK)
    else:
        module._silu_mul_kernel[(last + 1,)](x, out, x.stride(0), width, "silu", BLOCK)
    assert same_bits(out[last:], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_F01_dtypes(device, dtype):
    with pytest.raises(KernelArgumentError, match=f"gate_up is {dtype}; use float16, bfloat16 or float32"):
        silu_mul(torch.zeros(2, 8, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(), (8,), (2, 7), (2, 3, 8)])
def test_F02_shapes(device, shape):
    with pytest.raises(KernelArgumentError, match=r"gate_up must be \[num_tokens, 2 \* intermediate_size\]"):
        silu_mul(torch.zeros(shape, device=device))


@pytest.mark.parametrize("view", ["transposed", "every second", "expanded"])
def test_F04_columns_that_are_not_adjacent_are_refused(device, view):
    x = torch.zeros(8, 8, device=device)
    x = {"transposed": x.T, "every second": x[:, ::2], "expanded": x[:, :1].expand(-1, 6)}[view]
    with pytest.raises(KernelArgumentError, match="with contiguous columns; got shape .*, stride"):
        silu_mul(x)


def test_F03_devices():
    with pytest.raises(KernelArgumentError, match="gate_up is on meta; the kernel takes .*backend='reference'"):
        silu_mul(torch.zeros(2, 8, device="meta"))


def test_F03_gradients(device):
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    with pytest.raises(KernelArgumentError, match="gate_up requires grad and kernels have no backward"):
        silu_mul(x)
    with torch.no_grad():
        assert silu_mul(x).shape == (2, 4)


def test_unknown_activation(device):
    with pytest.raises(KernelArgumentError, match="activation='gelu_erf' is unknown; use one of .*swish"):
        silu_mul(torch.zeros(2, 8, device=device), "gelu_erf")

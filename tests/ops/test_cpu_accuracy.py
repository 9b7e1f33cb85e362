"""The native CPU ops against plain PyTorch: accuracy, exact results, layouts, values that are not finite, memory.

Cases and criteria are those of the GPU kernels' tests. What is refused stands in tests/bad_inputs/f_cpu.py, sampling in
test_cpu_sample.py.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import cpu, reference
from llama_fast.ops.activations import ACTIVATIONS
from tests.kernels import test_attention as attention_tests
from tests.kernels import test_linear as linear_tests
from tests.kernels import test_rms_norm as norm_tests
from tests.kernels import test_rope_and_cache as rope_tests
from tests.kernels import test_silu_mul as silu_tests
from tests.kernels.accuracy import DTYPES, POOL, assert_accurate, same_bits
from tests.ops.cpu_cases import gate_up_of, offset, prepared, projection

pytestmark = pytest.mark.usefixtures("instruction_set", "uninitialised_memory_is_nan")

CPU = torch.device("cpu")
CASES = {
    "linear_case": linear_tests.cases,
    "norm_case": norm_tests.cases,
    "silu_case": silu_tests.cases,
    "rope_case": rope_tests.cases,
    "attention_case": attention_tests.cases,
}
# Two columns of registers and their tails, a step of the unrolled loop, a row of 4,096 bytes.
WIDTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 100, 127, 129, 1000, 1024, 2048]
# Below, on and beyond the heights of tiles and of the change from weights in place to weights laid out.
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 33, 65, 129]


def pytest_generate_tests(metafunc):
    count = 1500 if metafunc.config.getoption("--full", default=False) else 150
    for name, cases in CASES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, cases(count), ids=str)


def norm_of(width, dtype, eps=1e-5):
    return SimpleNamespace(weight=(1 + 0.2 * torch.randn(width)).to(dtype), eps=eps)


def test_unwritten_memory_shows():
    assert torch.empty(7).isnan().all() and torch.empty(7, dtype=torch.bfloat16).isnan().all()


# --- linear -----------------------------------------------------------------------------------------------------------


def test_linear_accuracy(linear_case):
    rows, outs, ins, dtype, epilogue, has_outliers, layout = linear_case
    x, weight, bias, residual = linear_tests.draw(rows, outs, ins, dtype, epilogue, has_outliers, CPU)
    laid_out = linear_tests.laid_out(x, layout)
    num_parts = 1 + (rows + outs) % 3 if outs >= 4 else 1
    activation, norm = None, norm_of(ins, dtype)
    if "gated" in epilogue:
        activation = sorted(linear_tests.SLOPES)[rows % 3]
        got = cpu.norm_gate_up_act(laid_out, norm, gate_up_of(weight, bias, activation), None)
    elif "fp32" in epilogue:
        got = cpu.norm_lm_head(laid_out, norm, prepared(weight, bias, num_parts))
    elif residual is not None:
        got = cpu.linear_residual(laid_out, prepared(weight, bias, num_parts), residual, None)
    else:
        got = cpu.linear(laid_out, prepared(weight, bias, num_parts))
    if "gated" in epilogue or "fp32" in epilogue:
        x = cpu.rms_norm(x, norm.weight, norm.eps)  # its own accuracy: test_rms_norm_accuracy
    assert got.dtype == (torch.float32 if "fp32" in epilogue else dtype)
    linear_tests.assert_within_bound(got, x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "linear_residual", "norm_gate_up_act", "norm_lm_head"])
@pytest.mark.parametrize("has_outliers", [False, True])
def test_graph_ops_beside_the_reference(dtype, op, has_outliers):
    def run(ops):
        def call(x, weight, bias, residual, norm_weight):
            norm = SimpleNamespace(weight=norm_weight, eps=1e-5)
            if op == "norm_gate_up_act":
                return ops.norm_gate_up_act(x, norm, gate_up_of(weight, bias, ops=ops), batch)
            if op == "norm_lm_head":
                return ops.norm_lm_head(x, norm, prepared(weight, ops=ops))
            whole = prepared(weight, bias, 3, ops=ops)
            return ops.linear(x, whole) if op == "linear" else ops.linear_residual(x, whole, residual, batch)

        return call

    batch = SimpleNamespace(generated=False)
    epilogue = "gated bias" if op == "norm_gate_up_act" else "residual bias"

    def inputs():
        drawn = linear_tests.draw(33, 130, 300, dtype, epilogue, has_outliers, CPU)
        return *drawn, norm_of(300, dtype).weight

    assert_accurate(run(cpu), run(reference), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["a column is missing", "a row is another's"])
def test_control_accuracy_notices_a_mistake_in_linear(dtype, mistake):
    x, weight, bias, _ = linear_tests.draw(33, 65, 129, dtype, "bias", False, CPU)
    got = cpu.linear(x, prepared(weight, bias))
    linear_tests.assert_within_bound(got, x, weight, bias, None, None)
    if mistake == "a column is missing":
        got = cpu.linear(x[:, :-1], prepared(weight[:, :-1], bias))
    else:
        got[31] = got[30]
    with pytest.raises(AssertionError, match="beyond the bound"):
        linear_tests.assert_within_bound(got, x, weight, bias, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["plain", "bias", "residual", "residual bias"])
def test_sums_of_integers_are_exact(dtype, epilogue):
    for index, width in enumerate(WIDTHS):
        rows, outs = ROWS[index % len(ROWS)], (1, 3, 65, 129, 7)[index % 5]
        x, weight, bias, residual = linear_tests.integers(rows, outs, max(width, 8), dtype, epilogue, CPU)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        whole = prepared(weight, bias, 2 if outs > 4 else 1)
        if residual is None:
            got = cpu.linear(x, whole)
        else:
            got, exact = cpu.linear_residual(x, whole, residual, None), exact + residual.double()
        assert torch.equal(got.double(), exact), (rows, outs, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_fused_is_unfused(dtype, rows):
    x, weight, bias, residual = linear_tests.draw(rows, 65, 330, dtype, "residual bias", True, CPU)
    norm, whole = norm_of(330, dtype), prepared(weight, bias, 2)
    assert same_bits(cpu.linear_residual(x, whole, residual, None), residual + cpu.linear(x, whole))
    normed = cpu.rms_norm(x, norm.weight, norm.eps)
    logits = cpu.norm_lm_head(x, norm, whole)
    assert logits.dtype == torch.float32 and same_bits(logits.to(dtype), cpu.linear(normed, whole))
    assert same_bits(logits, cpu._linear("linear", normed, whole, epilogue=cpu._STORE_FLOAT))
    weight, bias = torch.cat((weight, weight.flip(0))), torch.cat((bias, -bias))
    for gate_up in (gate_up_of(weight, bias), gate_up_of(weight)):
        unfused = cpu.silu_mul(cpu.linear(normed, gate_up))
        assert same_bits(cpu.norm_gate_up_act(x, norm, gate_up, None), unfused)


def _double_relu(x):
    return 2 * x.clamp(min=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*sorted(ACTIVATIONS), _double_relu])
def test_fused_activation_is_unfused(dtype, activation):
    for rows in (3, 70):
        x, weight, bias, _ = linear_tests.draw(rows, 65, 140, dtype, "gated bias", False, CPU)
        norm, gate_up = norm_of(140, dtype), gate_up_of(weight, bias, activation)
        unfused = cpu.silu_mul(cpu.linear(cpu.rms_norm(x, norm.weight, norm.eps), gate_up), activation)
        assert same_bits(cpu.norm_gate_up_act(x, norm, gate_up, None), unfused)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("heads", [(8, 2), (3, 3)])
def test_fused_qkv_is_unfused(dtype, rows, heads):
    head_dim, hidden_size = 20, 100
    batch, num_pages = rope_tests.make_batch([(rows, 5)], 16, 16, CPU)
    x, weight, bias, _ = linear_tests.draw(rows, (heads[0] + 2 * heads[1]) * head_dim, 100, dtype, "bias", False, CPU)
    sizes = (heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim)
    parts = [projection(*part) for part in zip(weight.split(sizes), bias.split(sizes), strict=True)]
    qkv, norm = cpu.prepare_linear(parts), norm_of(hidden_size, dtype)
    fused_pages, pages = (LayerPages(*torch.zeros(2, num_pages, heads[1], 16, head_dim).to(dtype)) for _ in range(2))
    fused = cpu.norm_qkv_rope_cache(x, norm, qkv, batch, fused_pages)
    packed = cpu.linear(cpu.rms_norm(x, norm.weight, norm.eps), qkv).view(rows, -1, head_dim)
    q = cpu.rope_and_cache(*packed.tensor_split((heads[0], sum(heads)), dim=1), batch, pages)
    assert same_bits(fused, q) and same_bits(fused_pages.k, pages.k) and same_bits(fused_pages.v, pages.v)
    assert pages.k.count_nonzero() and pages.v.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "ins"), [(1, 1), (3, 64), (2, 65), (18, 127), (14, 1000)])
def test_F04_F05_strides_and_addresses_change_no_bit_of_linear(dtype, rows, ins):
    x, weight, bias, residual = linear_tests.draw(rows, 33, ins, dtype, "residual bias", False, CPU)
    norm = norm_of(ins, dtype)

    def results(x, weight, bias, residual, norm_weight):
        whole, moved = prepared(weight, bias, 2), SimpleNamespace(weight=norm_weight, eps=norm.eps)
        return torch.cat(
            (cpu.linear_residual(x, whole, residual, None).float(), cpu.norm_lm_head(x, moved, whole)), dim=1
        )

    arguments = (x, weight, bias, residual, norm.weight)
    expected = results(*arguments)
    for elements in (1, 3, 5):
        assert same_bits(results(*(offset(t, elements) for t in arguments)), expected), elements
    padded = torch.cat((x, torch.full_like(x[:, :1], torch.nan)), dim=1)[:, :ins]
    for same in (padded, x.repeat_interleave(2, 0)[::2], x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(results(same, *arguments[1:]), expected)
    for same in (weight.T.contiguous().T, torch.cat((weight, weight), dim=1)[:, :ins], weight.repeat(2, 1)[33:]):
        assert same_bits(results(x, same, *arguments[2:]), expected)
    one = x[:1].expand(rows, -1)
    assert same_bits(results(one, *arguments[1:]), results(one.clone(), *arguments[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, "max", -0.0, 1e-45])
@pytest.mark.parametrize("rows", [5, 20])
def test_F12_special_values_in_linear_stand_where_they_belong(dtype, bad, rows):
    bad = torch.finfo(dtype).max if bad == "max" else bad
    x, weight, bias, residual = linear_tests.draw(rows, 70, 100, dtype, "residual bias", False, CPU)
    healthy = cpu.linear_residual(x, prepared(weight, bias), residual, None)
    broken = [t.clone() for t in (x, weight, bias, residual)]
    broken[0][3, 99], broken[1][69, 5], broken[2][7], broken[3][2, 13] = bad, bad, bad, bad
    got = cpu.linear_residual(broken[0], prepared(*broken[1:3]), broken[3], None)
    twin = reference.linear_residual(
        broken[0], prepared(*broken[1:3], ops=reference), broken[3], SimpleNamespace(generated=False)
    )
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])
    untouched = torch.ones(rows, 70, dtype=torch.bool)
    untouched[3], untouched[:, 69], untouched[:, 7], untouched[2, 13] = False, False, False, False
    assert same_bits(got[untouched], healthy[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "linear_residual", "norm_gate_up_act", "norm_lm_head"])
@pytest.mark.parametrize(("rows", "outs", "ins"), [(1, 1, 1), (2, 25, 33), (13, 65, 129), (130, 3, 20)])
def test_F13_every_output_of_linear_is_written_and_nothing_beside(guarded, dtype, op, rows, outs, ins):
    epilogue = "gated bias" if op == "norm_gate_up_act" else "residual bias"
    x, weight, bias, residual = linear_tests.draw(rows, outs, ins, dtype, epilogue, False, CPU)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    before, norm = [t.clone() for t in inputs], norm_of(ins, dtype)
    with guarded():
        if op == "norm_gate_up_act":
            out = cpu.norm_gate_up_act(x, norm, gate_up_of(weight, bias), None)
        elif op == "norm_lm_head":
            out = cpu.norm_lm_head(x, norm, prepared(weight, bias))
        elif op == "linear":
            out = cpu.linear(x, prepared(weight, bias))
        else:
            out = cpu.linear_residual(x, prepared(weight, bias), residual, None)
    assert out.shape == (rows, outs) and not out.isnan().any()
    assert all(map(same_bits, inputs, before))


def test_F08_rows_beyond_2_31_elements(huge):
    ins, stride = 33, 2**30 + 8
    near, weight, bias, _ = linear_tests.draw(3, 5, ins, torch.bfloat16, "bias", False, CPU)
    x = huge(2 * stride + ins, torch.bfloat16).as_strided((3, ins), (stride, 1))
    x.copy_(near)
    norm = norm_of(ins, torch.bfloat16)
    assert same_bits(cpu.linear(x, prepared(weight, bias)), cpu.linear(near, prepared(weight, bias)))
    assert same_bits(cpu.rms_norm(x, norm.weight, 1e-5), cpu.rms_norm(near, norm.weight, 1e-5))
    assert same_bits(cpu.silu_mul(x[:, :32]), cpu.silu_mul(near[:, :32]))


def test_weights_are_used_where_they_lie():
    weight, bias = torch.randn(6, 8), torch.randn(6)
    parts = prepared(weight, bias, 2)
    assert parts.tensors[0].data_ptr() == weight.data_ptr()
    x = torch.randn(2, 8)
    before = cpu.linear(x, parts)
    weight[0] += 1
    assert same_bits(cpu.linear(x, parts)[:, 1:], before[:, 1:])
    assert same_bits(cpu.linear(x, parts), cpu.linear(x, prepared(weight.clone(), bias.clone(), 2)))


def test_a_prepared_weight_keeps_its_tensors_alive():
    expected, x = None, torch.randn(3, 500)
    for attempt in range(2):
        torch.manual_seed(5)
        weight = prepared(torch.randn(300, 500).T.contiguous().T, torch.randn(300))
        clutter = [torch.full((300, 500), torch.nan) for _ in range(attempt * 5)]
        got = cpu.linear(x, weight)
        assert expected is None or same_bits(got, expected)
        expected = got
    assert len(clutter) == 5


# --- rms_norm ---------------------------------------------------------------------------------------------------------


def test_rms_norm_accuracy(norm_case):
    rows, width, dtype, eps, mode, layout = norm_case

    def both(function):
        return lambda weight, filler_weight, *inputs: torch.cat(
            [function(inputs[0], weight, eps).flatten(), function(inputs[1], filler_weight, eps).flatten()]
        )

    def inputs():
        weight, filler_weight = torch.randn(width).to(dtype), torch.randn(1021).to(dtype)
        x, filler = (norm_tests.draw(*size, dtype, mode, CPU) for size in ((rows, width), (4, 1021)))
        return weight, filler_weight, norm_tests.laid_out(x, layout), filler

    assert_accurate(both(cpu.rms_norm), both(reference.rms_norm), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [129, 2048])
def test_rms_norm_rounds_before_the_weight_as_hugging_face(dtype, width):
    x, weight = torch.randn(32, width).to(dtype), torch.randn(width).to(dtype)
    exact = reference.rms_norm(x.double(), torch.ones(width, dtype=torch.float64), 1e-5)
    early, late = exact.to(dtype) * weight, (exact * weight.double()).to(dtype)
    got = cpu.rms_norm(x, weight, 1e-5)
    # fp32's own error moves a rounding in about one of 2^12 (bf16: 2^15) values, the other order in every fourth.
    assert (got != early).double().mean() < 2**-8 < 2**-4 < (got != late).double().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4, 16, 64, 256, 1024, 4096])
def test_one_hot_rows_are_exact(dtype, width):
    # The mean is 2^2k / 4^m, its root a power of two: the result is the root of the width.
    x = torch.zeros(3, width)
    x[0, 0], x[1, width // 2], x[2, width - 1] = 2.0**-4, 1.0, 8.0
    weight = torch.randn(width).to(dtype)
    assert torch.equal(cpu.rms_norm(x.to(dtype), weight, 0.0), (x > 0).to(dtype) * width**0.5 * weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_F12_special_values_in_rms_norm_stand_where_the_reference_has_them(dtype, eps):
    info = torch.finfo(dtype)
    x = torch.randn(14, 33)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, 0.0, -0.0]):
        x[row, 5] = value
    x[8], x[9], x[10], x[11] = 0.0, info.tiny, info.max, info.smallest_normal / 4
    x[12] = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(11)
    x[13] = -0.0
    x, weight = x.to(dtype), torch.ones(33, dtype=dtype)
    weight[7], weight[8] = torch.nan, torch.inf
    got, twin = cpu.rms_norm(x, weight, eps), reference.rms_norm(x, weight, eps)
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (2, 1025), (3, 128), (40, 17)])
def test_F04_F05_F13_layouts_and_memory_of_rms_norm(guarded, dtype, rows, width):
    x, weight = norm_tests.draw(rows, width, dtype, "outliers", CPU), torch.randn(width).to(dtype)
    expected = cpu.rms_norm(x, weight, 1e-5)
    for layout in norm_tests.LAYOUTS:
        moved = norm_tests.laid_out(x, layout), norm_tests.laid_out(weight[None], layout)[0]
        assert same_bits(cpu.rms_norm(*moved, 1e-5), expected)
    for elements in (1, 3, 5):
        assert same_bits(cpu.rms_norm(offset(x, elements), offset(weight, elements), 1e-5), expected)
    assert same_bits(cpu.rms_norm(x[:1].expand(3, -1), weight, 1e-5), expected[:1].expand(3, -1))
    assert same_bits(cpu.rms_norm(x, weight[:1].expand(width), 1e-5), cpu.rms_norm(x, weight[:1].repeat(width), 1e-5))
    with guarded():
        out = cpu.rms_norm(x, weight, 1e-5)
    assert same_bits(out, expected) and not out.isnan().any()


# --- silu_mul ---------------------------------------------------------------------------------------------------------


def test_silu_mul_accuracy(silu_case):
    rows, width, dtype, name, has_outliers, layout = silu_case

    def both(function):
        return lambda *inputs: torch.cat([function(x, name).flatten() for x in inputs])

    def inputs():
        filler = silu_tests.draw(4, 1021, dtype, has_outliers, CPU)
        return silu_tests.laid_out(silu_tests.draw(rows, width, dtype, has_outliers, CPU), layout), filler

    assert_accurate(both(cpu.silu_mul), both(reference.silu_mul), inputs)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_far_out(name):
    """Each gate from -30 to 30: what is small there is small, not zero or noise."""
    gate = torch.cat((torch.linspace(-30, 30, 3001), torch.linspace(-0.01, 0.01, 1101)))
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    assert_accurate(lambda x: cpu.silu_mul(x, name), lambda x: reference.silu_mul(x, name), lambda: (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_control_accuracy_notices_another_activation(dtype):
    # The two GELUs differ by 5e-4, which 16-bit dtypes hardly resolve; quick_gelu is off by 0.02.
    wrong = "gelu_new" if dtype == torch.float32 else "quick_gelu"
    with pytest.raises(AssertionError, match="beyond one ulp"):
        assert_accurate(
            lambda x: cpu.silu_mul(x, wrong),
            lambda x: reference.silu_mul(x, "gelu"),
            lambda: (silu_tests.draw(4, 1021, dtype, False, CPU).clamp(-2, 2),),
        )


def test_every_activation_has_a_number():
    assert set(cpu.ACTIVATION_NUMBERS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_saturated_gates_are_exact(dtype, name):
    # e^-128 is 3e-56: less than half an ulp beside 1, nothing in fp32.
    x = torch.tensor([[128.0, -128.0, 0.0, 1.0, 1.0, 1.0]], dtype=dtype)
    exact = reference.silu_mul(x.double(), name)
    if name == "laplace":
        x, exact = x[:, [0, 1, 3, 4]], exact[:, :2]  # 0 is not a saturated gate of it
    assert torch.equal(cpu.silu_mul(x, name), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_F12_special_values_in_silu_mul_stand_where_the_reference_has_them(dtype, name):
    info = torch.finfo(dtype)
    values = [*silu_tests.SPECIAL, info.max, -info.max, info.tiny, info.smallest_normal / 2]
    values = torch.tensor(values, dtype=torch.float64).to(dtype)
    x = torch.cat((values.repeat_interleave(len(values)), values.repeat(len(values))))[None]
    got, twin = cpu.silu_mul(x, name), reference.silu_mul(x, name)
    if name == "gelu":
        # PyTorch's vectorised fp32 GELU makes NaN of infinity and infinity of 3e38; its fp64 one is right.
        twin = reference.silu_mul(x.double(), name).to(dtype)
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 33), (2, 1025), (3, 128), (2, 4097)])
def test_F04_F05_F13_layouts_and_memory_of_silu_mul(guarded, dtype, rows, width):
    x = silu_tests.draw(rows, width, dtype, True, CPU)
    expected = cpu.silu_mul(x)
    for same in (silu_tests.laid_out(x, "strided"), *(offset(x, elements) for elements in (1, 3, 5))):
        assert same_bits(cpu.silu_mul(same), expected)
    for same in (x.repeat_interleave(2, 0)[::2], x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(cpu.silu_mul(same), expected)
    assert same_bits(cpu.silu_mul(x[:1].expand(3, -1)), expected[:1].expand(3, -1))
    with guarded():
        out = cpu.silu_mul(x)
    assert same_bits(out, expected) and not out.isnan().any()


# --- rope_and_cache ---------------------------------------------------------------------------------------------------


def test_rope_accuracy(rope_case):
    index, heads, (head_dim, rotary_dim), page_size, dtype, has_outliers, layout = rope_case
    batch, num_pages = rope_tests.make_batch(rope_tests.SEQUENCES[index], page_size, rotary_dim, CPU)
    filler, filler_pages = rope_tests.make_batch([(4, 3)], 16, 64, CPU)

    def both(function):
        small, large = (
            rope_tests.everything(function, *args)
            for args in ((batch, num_pages, page_size), (filler, filler_pages, 16))
        )
        return lambda *x: torch.cat((small(*x[:5]), large(*x[5:])))

    def inputs():
        small = rope_tests.draw(len(batch.slots), heads, head_dim, dtype, has_outliers, CPU, layout)
        large = rope_tests.draw(4, (8, 4), 64, dtype, has_outliers, CPU)
        return *small, batch.cos, batch.sin, *large, filler.cos, filler.sin

    assert_accurate(both(cpu.rope_and_cache), both(reference.rope_and_cache), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [16, 64, 5, 1])
@pytest.mark.parametrize(
    ("heads", "dims"), [((8, 2), (64, 64)), ((3, 3), (80, 20)), ((5, 1), (6, 6)), ((4, 2), (8, 6)), ((2, 1), (33, 2))]
)
def test_only_the_slots_of_the_batch_are_written(dtype, page_size, heads, dims):
    head_dim, rotary_dim = dims
    batch, num_pages = rope_tests.make_batch([(3, 14), (1, 0), (6, 61)], page_size, rotary_dim, CPU)
    pages = rope_tests.new_pages(num_pages, heads[1], page_size, head_dim, dtype, CPU)
    q, k, v = rope_tests.draw(10, heads, head_dim, dtype, False, CPU)
    # v and the dims that do not turn are copied: signs of zero and subnormals too.
    v.view(-1)[::7], v.view(-1)[::11] = -0.0, -torch.finfo(dtype).smallest_normal / 4
    expected = LayerPages(pages.k.clone(), pages.v.clone())
    rotated = cpu.rope_and_cache(q, k, v, batch, pages)
    page, slot = batch.pages_of_slots(page_size)
    new_k, new_v = rope_tests.slot_values(batch, pages)
    assert same_bits(new_v, v)
    assert same_bits(new_k[..., rotary_dim:], k[..., rotary_dim:])
    assert same_bits(rotated[..., rotary_dim:], q[..., rotary_dim:])
    assert rotated.isfinite().all() and new_k.isfinite().all()
    expected.k[page, :, slot], expected.v[page, :, slot] = new_k, new_v
    assert same_bits(pages.k, expected.k) and same_bits(pages.v, expected.v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (64, 64), (96, 24), (20, 20), (256, 2)])
def test_quarter_turns_are_exact(dtype, head_dim, rotary_dim):
    batch, num_pages = rope_tests.make_batch([(4, 2)], 16, rotary_dim, CPU)
    cos, sin = torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    cos, sin = cos[:, None].repeat(1, rotary_dim), sin[:, None].repeat(1, rotary_dim)
    q, k, v = rope_tests.draw(4, (4, 2), head_dim, dtype, True, CPU)
    got = rope_tests.everything(cpu.rope_and_cache, batch, num_pages, 16)(q, k, v, cos, sin)
    turned, half = got[: q.numel()].view_as(q), rotary_dim // 2
    assert torch.equal(turned[0], q[0])
    assert torch.equal(turned[1, :, :half], -q[1, :, half:rotary_dim])
    assert torch.equal(turned[1, :, half:rotary_dim], q[1, :, :half])
    assert torch.equal(turned[2, :, :rotary_dim], -q[2, :, :rotary_dim])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("heads", "dims"), [((3, 3), (64, 64)), ((8, 2), (80, 20))])
def test_F12_a_v_that_is_not_finite_breaks_its_own_head_alone(dtype, bad, heads, dims):
    batch, num_pages = rope_tests.make_batch([(4, 14)], 16, dims[1], CPU)
    q, k, v = rope_tests.draw(4, heads, dims[0], dtype, False, CPU)

    def cached(v):
        pages = rope_tests.new_pages(num_pages, heads[1], 16, dims[0], dtype, CPU)
        rotated = cpu.rope_and_cache(q, k, v, batch, pages)
        return rotated, *rope_tests.slot_values(batch, pages)

    healthy, bad_v = cached(v), v.clone()
    bad_v[2, 1, dims[0] - 1], bad_v[0, 0, 0] = bad, bad
    got, broken = cached(bad_v), ((2, 0), (1, 0))
    assert same_bits(got[0], healthy[0])
    assert got[1][broken].isnan().all() and not got[2][broken].any()
    for mine, theirs in zip(got[1:], healthy[1:], strict=True):
        mine[broken], theirs[broken] = 0, 0
        assert same_bits(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (80, 20)])
def test_F12_special_values_in_rope_stand_where_the_reference_has_them(dtype, head_dim, rotary_dim):
    info = torch.finfo(dtype)
    values = [torch.nan, torch.inf, -torch.inf, info.max, -info.max, info.tiny, -info.smallest_normal / 4, 0.0, -0.0]
    batch, num_pages = rope_tests.make_batch([(len(values), 1)], 16, rotary_dim, CPU)
    q, k, v = rope_tests.draw(len(values), (3, 1), head_dim, dtype, False, CPU)
    for token, value in enumerate(values):
        q[token, 0], q[token, 1, 3], q[token, 2, head_dim - 1] = value, value, value
        k[token, 0, token], v[token, 0, token] = value, value
    # With no angle at all and a quarter turn infinity meets zero.
    batch.cos[3:5, :4], batch.sin[3:5, :4] = 0.0, 1.0
    batch.cos[0:3, 4:8], batch.sin[0:3, 4:8] = 1.0, 0.0
    got, twin = (
        rope_tests.everything(ops.rope_and_cache, batch, num_pages, 16)(q, k, v, batch.cos, batch.sin)
        for ops in (cpu, reference)
    )
    assert torch.equal(got.isnan(), twin.isnan())
    assert torch.equal(got.isinf(), twin.isinf()) and torch.equal(got[got.isinf()], twin[twin.isinf()])


def by_token(q, k, v, batch, num_pages):
    return rope_tests._by_token(q, k, v, batch, num_pages, cpu.rope_and_cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [((4, 2), (64, 64)), ((3, 1), (33, 10)), ((2, 2), (6, 6))])
def test_F04_F05_strides_and_addresses_change_no_bit_of_rope(dtype, heads, dims):
    batch, num_pages = rope_tests.make_batch([(4, 15), (2, 3)], 16, dims[1], CPU)
    q, k, v = rope_tests.draw(6, heads, dims[0], dtype, False, CPU)
    expected = by_token(q, k, v, batch, num_pages)
    packed = torch.cat((q, k, v), dim=1).tensor_split((heads[0], sum(heads)), dim=1)
    views = [packed, [x.repeat_interleave(2, 0)[::2] for x in (q, k, v)], [_apart(x) for x in (q, k, v)]]
    views += [[offset(x, elements) for x in (q, k, v)] for elements in (1, 3, 5)]
    views += [[x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]]
    for view in views:
        assert same_bits(by_token(*view, batch, num_pages), expected)
    for change in (lambda x: offset(x, 1), _apart, lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]]):
        names = ("cos", "sin", "slots", "seq_ids", "page_table", "query_starts", "seq_lens")
        moved = dataclasses.replace(batch, **{name: change(getattr(batch, name)) for name in names})
        assert same_bits(by_token(q, k, v, moved, num_pages), expected)
    # Another layer of a pool, and a cache from an odd address.
    pool = rope_tests.noise((3, 2, num_pages, heads[1], 16, dims[0]), dtype, CPU)
    before = pool.clone()
    for pages in (LayerPages(pool[1, 0], pool[1, 1]), LayerPages(offset(pool[0, 0], 3), offset(pool[0, 1], 3))):
        rotated = cpu.rope_and_cache(q, k, v, batch, pages)
        got = torch.cat([x.flatten(1) for x in (rotated, *rope_tests.slot_values(batch, pages))], dim=1)
        assert same_bits(got, expected)
    assert same_bits(pool[::2], before[::2])


def _apart(x):
    """The same numbers, the last dimension strided."""
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dims"), [((1, 1), (8, 8)), ((33, 11), (64, 64)), ((9, 3), (96, 24))])
def test_F13_every_output_of_rope_is_written_and_nothing_beside(guarded, dtype, heads, dims):
    batch, num_pages = rope_tests.make_batch([(3, 1)], 4, dims[1], CPU)
    q, k, v = rope_tests.draw(3, heads, dims[0], dtype, False, CPU)
    watched = (q, k, v, batch.cos, batch.sin, batch.slots, batch.seq_ids, batch.page_table)
    before = [x.clone() for x in watched]
    with guarded():
        pages = LayerPages(*(torch.empty(num_pages, heads[1], 4, dims[0], dtype=dtype) for _ in range(2)))
        out = cpu.rope_and_cache(q, k, v, batch, pages)
    assert not out.isnan().any()
    assert (~pages.k.isnan()).sum() == (~pages.v.isnan()).sum() == k.numel()
    assert all(map(same_bits, watched, before))


@pytest.mark.parametrize("where", ["pages", "heads"])
def test_F08_a_pool_beyond_2_31_elements(huge, where):
    # Pages 2^26 elements apart, or heads 2^30 apart: the last of each begins beyond 2^31.
    heads, page_size, head_dim = 3, 16, 16
    page_stride, head_stride, num_pages = (2**26, 256, 34) if where == "pages" else (256, 2**30 + 64, 6)
    count = (num_pages - 1) * page_stride + (heads - 1) * head_stride + page_size * head_dim
    shape, stride = (num_pages, heads, page_size, head_dim), (page_stride, head_stride, head_dim, 1)
    far = LayerPages(*(huge(count, torch.bfloat16).as_strided(shape, stride) for _ in range(2)))
    near = LayerPages(*torch.zeros(2, *shape, dtype=torch.bfloat16))
    batch, _ = rope_tests.make_batch([(20, 0), (3, 12)], page_size, head_dim, CPU)
    batch = dataclasses.replace(batch, page_table=num_pages - 1 - batch.page_table, split_size=32)
    q, k, v = rope_tests.draw(23, (6, heads), head_dim, torch.bfloat16, False, CPU)
    results = []
    for pages in (far, near):
        rotated = cpu.rope_and_cache(q, k, v, batch, pages)
        results.append((rotated, *rope_tests.slot_values(batch, pages), cpu.attention(rotated, pages, batch)))
    assert all(map(same_bits, *results))


def test_F08_tokens_beyond_2_31_elements(huge):
    stride = 2**30 + 8
    batch, num_pages = rope_tests.make_batch([(3, 2)], 16, 32, CPU)
    near = rope_tests.draw(3, (2, 2), 32, torch.bfloat16, False, CPU)
    memory = huge(2 * stride + 3 * 64, torch.bfloat16)
    far = [memory[64 * i :].as_strided((3, 2, 32), (stride, 32, 1)) for i in range(3)]
    for x, y in zip(far, near, strict=True):
        x.copy_(y)
    assert same_bits(by_token(*far, batch, num_pages), by_token(*near, batch, num_pages))


# --- attention --------------------------------------------------------------------------------------------------------


def attention_error(sequences, generated, heads, head_dim, sizes, dtype, factor):
    """As the kernels' test_accuracy."""
    batch = attention_tests.make_batch(sequences, sizes, CPU, generated)
    if dtype == torch.float32:
        q, contents = attention_tests.draw(sequences, heads, head_dim, dtype, CPU, factor)
        got = cpu.attention(q, attention_tests.make_pages(batch, sizes[0], contents), batch)
        assert got.dtype == dtype and got.shape == (len(q), heads[0] * head_dim)
        attention_tests.assert_within_bound(got, q, contents, batch)
        return
    kernel, pytorch = attention_tests.both(batch, sizes[0], cpu.attention)
    count = 1 + 2 * len(sequences)

    def pooled(function):
        return lambda *x: torch.cat([function(*part).flatten() for part in (x[:count], x[count:]) if part])

    def inputs():
        # Where a case gives few outputs, those of more heads and dims fill the pool, at hardly any cost.
        def draw(heads, head_dim):
            return attention_tests.flat(*attention_tests.draw(sequences, heads, head_dim, dtype, CPU, factor))

        small = draw(heads, head_dim)
        return small if small[0].numel() >= POOL else (*small, *draw((16, 1), 256))

    assert_accurate(pooled(kernel), pooled(pytorch), inputs)


def test_attention_accuracy(attention_case):
    attention_error(*attention_case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (5, 10), (8, 32), (3, 96), (40, 40), (1, 256)])
@pytest.mark.parametrize("generated", [False, True])
def test_attention_accuracy_with_any_page_and_split(dtype, sizes, generated):
    sequences = [(1, 0), (1, 9), (1, 10), (1, 71)] if generated else [(9, 3), (1, 40), (0, 2), (33, 0), (5, 62)]
    for heads, head_dim in (((4, 2), 20), ((6, 1), 6), ((3, 3), 72)):
        attention_error(sequences, generated, heads, head_dim, sizes, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [*range(1, 9), 32, 65])
def test_attention_accuracy_of_every_group(dtype, group):
    attention_error([(5, 60), (1, 33)], False, (2 * group, 2), 20, (8, 32), dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_beside_the_reference(dtype):
    """The worst error is at most twice the reference backend's; in fp32 both sum in lanes."""
    sequences, sizes = [(40, 3), (1, 700), (20, 500)], (64, 256)
    batch = attention_tests.make_batch(sequences, sizes, CPU)
    mine, theirs = (attention_tests.both(batch, sizes[0], ops.attention)[0] for ops in (cpu, reference))
    assert_accurate(
        mine, theirs, lambda: attention_tests.flat(*attention_tests.draw(sequences, (8, 2), 64, dtype, CPU, 2))
    )


@pytest.fixture
def kernels_tests(monkeypatch):
    """The tests of the GPU's attention, on the native op."""
    monkeypatch.setattr(attention_tests, "attention", cpu.attention)
    return attention_tests


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", attention_tests.MISTAKES)
def test_control_accuracy_notices_a_mistake_in_attention(kernels_tests, dtype, mistake):
    kernels_tests.test_control_accuracy_notices_a_mistake(CPU, dtype, mistake)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("generated", [False, True])
def test_one_slot_in_sight_is_exact(kernels_tests, dtype, generated):
    kernels_tests.test_one_slot_in_sight_is_exact(CPU, dtype, generated, 64)
    kernels_tests.test_one_slot_in_sight_is_exact(CPU, dtype, generated, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(16, 32), (64, 64), (8, 256)])
def test_equal_weights_of_integers_are_exact(kernels_tests, dtype, sizes):
    kernels_tests.test_equal_weights_of_integers_are_exact(CPU, dtype, True, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stale", [torch.nan, torch.inf, -torch.inf])
def test_slots_that_nobody_wrote_are_not_read(dtype, stale):
    """Behind a sequence's last slot, in pages of its own and of others; and a token does not see what comes later."""
    sequences, sizes = [(3, 5), (1, 33), (9, 0)], (8, 32)
    batch = attention_tests.make_batch(sequences, sizes, CPU)
    q, contents = attention_tests.draw(sequences, (4, 2), 20, dtype, CPU)
    clean = LayerPages(*torch.zeros(2, int(batch.page_table.max()) + 3, 2, 8, 20).to(dtype))
    dirty = LayerPages(*(torch.full_like(x, stale) for x in (clean.k, clean.v)))
    for pages in (clean, dirty):
        attention_tests.write(batch, pages, contents)
    expected = cpu.attention(q, clean, batch)
    assert same_bits(cpu.attention(q, dirty, batch), expected) and expected.isfinite().all()
    # The third sequence has one token in its second page.
    first_page, second_page = batch.page_table[2, :2]
    future = LayerPages(clean.k.clone(), clean.v.clone())
    future.k[second_page], future.v[second_page] = stale, stale
    assert same_bits(cpu.attention(q, future, batch)[:-1], expected[:-1])
    future.k[first_page, :, 4:], future.v[first_page, :, 4:] = stale, stale
    rows = slice(4, 8)  # tokens at slots 0 to 3
    assert same_bits(cpu.attention(q, future, batch)[rows], expected[rows])


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_F12_special_values_in_attention_stand_where_the_reference_has_them(kernels_tests, dtype, generated):
    for where in ("key", "query"):
        for bad in (torch.nan, torch.inf, -torch.inf):
            kernels_tests.test_F12_not_finite_values_reach_exactly_the_rows_that_see_them(
                CPU, generated, dtype, where, bad
            )
    kernels_tests.test_F12_not_finite_values_reach_exactly_the_rows_that_see_them(
        CPU, generated, dtype, "token", torch.nan
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_F12_one_special_value_on_its_way_through_the_cache(dtype, which):
    info = torch.finfo(dtype)
    for value in (torch.nan, torch.inf, -torch.inf, -0.0, info.tiny / 4, info.max, -info.max):
        for token in (0, 3, 31, 32, 39):
            batch, num_pages = rope_tests.make_batch([(40, 0)], 8, 16, CPU)
            batch = dataclasses.replace(batch, split_size=32)
            tensors = dict(zip("qkv", rope_tests.draw(40, (4, 2), 16, dtype, False, CPU), strict=True))
            tensors[which][token, 1, 3] = value
            results = []
            for ops in (cpu, reference):
                pages = rope_tests.new_pages(num_pages, 2, 8, 16, dtype, CPU)
                q = ops.rope_and_cache(*tensors.values(), batch, pages)
                results.append((q, ops.attention(q, pages, batch)))
            for got, twin in zip(*results, strict=True):
                assert torch.equal(got.isnan(), twin.isnan()), (value, token)
                assert torch.equal(got.isinf(), twin.isinf()), (value, token)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_F04_F05_layouts_and_addresses_change_no_bit_of_attention(kernels_tests, dtype, generated):
    kernels_tests.test_F04_F05_pages_tables_and_addresses_change_no_bit(CPU, generated, dtype)
    sequences = [(9, 3), (1, 40), (5, 30)]
    batch = attention_tests.make_batch(sequences, (8, 32), CPU)
    q, contents = attention_tests.draw(sequences, (4, 2), 20, dtype, CPU)
    pages = attention_tests.make_pages(batch, 8, contents)
    expected = cpu.attention(q, pages, batch)
    packed = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)[:, :4]
    for same in (packed, _apart(q), q.transpose(0, 1).contiguous().transpose(0, 1), offset(q, 3), offset(q, 5)):
        assert same_bits(cpu.attention(same, pages, batch), expected)
    for elements in (3, 5):
        moved = LayerPages(offset(pages.k, elements), offset(pages.v, elements))
        assert same_bits(cpu.attention(q, moved, batch), expected)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((1, 1), 8), ((20, 1), 48), ((6, 2), 96), ((3, 3), 33)])
def test_F13_every_output_of_attention_is_written_and_nothing_beside(
    guarded, kernels_tests, dtype, generated, heads, head_dim
):
    kernels_tests.test_F13_every_output_is_written_and_nothing_beside(CPU, guarded, generated, dtype, heads, head_dim)

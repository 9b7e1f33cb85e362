"""The native CPU ops over weights of 4-bit integers: accuracy, one answer, the order of the words, memory, the path."""

import contextlib
import copy
import pickle
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llama_fast.engine.engine import Engine
from llama_fast.model.kv_cache import LayerPages
from llama_fast.ops import cpu, reference, reference_int4
from llama_fast.ops.int4 import Int4Linear, pack_rows
from tests.kernels import test_linear as linear_tests
from tests.kernels import test_rope_and_cache as rope_tests
from tests.kernels.accuracy import DTYPES, outliers, same_bits
from tests.ops.cpu_cases import offset
from tests.ops.test_int4 import make_int4
from tests.tiny import make_model, make_request, op_by_op

pytestmark = pytest.mark.usefixtures("instruction_set", "uninitialised_memory_is_nan")

CPU = torch.device("cpu")
GROUPS = (32, 64, 128)
# Whole registers and every rest of one: 4, 8 and 12 words; deeper than what is laid out at a time.
WIDTHS = {32: (32, 64, 96, 128, 160, 224, 480, 1120, 2080), 64: (64, 128, 192, 320, 1088), 128: (128, 256, 384, 2048)}
OUTS = (1, 2, 3, 7, 24, 33, 65, 129)
# Around every height of a tile and the change from words in place to numbers laid out.
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64, 127, 128, 129, 200)
EPILOGUES = ("plain", "bias", "residual", "residual bias", "gated", "gated bias", "fp32", "fp32 bias")


def cases(count):
    """`count` cases, the same in every run; every epilogue in every dtype and group among them."""
    choose, chosen = random.Random(5), {}
    while len(chosen) < count:
        index = len(chosen)
        dtype, group_size = DTYPES[index % 3], GROUPS[index // 3 % 3]
        sizes = choose.choice(ROWS), choose.choice(OUTS), choose.choice(WIDTHS[group_size])
        rest = EPILOGUES[index // 9 % 8], choose.random() < 0.5, choose.random() < 0.5
        chosen[(*sizes, group_size, dtype, *rest)] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize(
            "case", cases(1500 if metafunc.config.getoption("--full", default=False) else 144), ids=str
        )


def norm_of(width, dtype):
    return SimpleNamespace(weight=(1 + 0.2 * torch.randn(width)).to(dtype), eps=1e-5)


def parts_of(heights, ins, group_size, dtype, symmetric, bias):
    """Modules and their dequantized weights in fp64, every second with zeros unless all are symmetric."""
    made = [
        make_int4(outs, ins, group_size, dtype, symmetric or index % 2 == 1, bias) for index, outs in enumerate(heights)
    ]
    return [module for module, _ in made], torch.cat([dense for _, dense in made])


def biases_of(parts):
    return None if parts[0].bias is None else torch.cat([part.bias for part in parts])


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy(case):
    rows, outs, ins, group_size, dtype, epilogue, has_outliers, symmetric = case
    x, norm = torch.randn(rows, ins), norm_of(ins, dtype)
    if has_outliers:
        x = outliers(x) * (0.01 if dtype == torch.float16 else 1)
    x = x.to(dtype)
    heights = (outs, outs) if "gated" in epilogue else (outs // 3 + 1, outs) if outs > 3 else (outs,)
    parts, dense = parts_of(heights, ins, group_size, dtype, symmetric, "bias" in epilogue)
    activation = sorted(linear_tests.SLOPES)[rows % 3] if "gated" in epilogue else None
    weight, residual = cpu.prepare_linear(parts, activation), None
    if activation:
        got = cpu.norm_gate_up_act(x, norm, weight, None)
    elif "fp32" in epilogue:
        got = cpu.norm_lm_head(x, norm, weight)
    elif "residual" in epilogue:
        residual = torch.randn(rows, sum(heights)).to(dtype)
        got = cpu.linear_residual(x, weight, residual, None)
    else:
        got = cpu.linear(x, weight)
    assert got.dtype == (torch.float32 if "fp32" in epilogue else dtype)
    assert got.shape == (rows, outs if activation else sum(heights))
    if activation or "fp32" in epilogue:
        x = cpu.rms_norm(x, norm.weight, norm.eps)  # its own accuracy: test_cpu_accuracy.py
    if rows:
        linear_tests.assert_within_bound(got, x, dense, biases_of(parts), residual, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_each_weight_stands_where_it_belongs(dtype, symmetric, group_size):
    """Rows that are zero but for one feature give the dequantized weight itself, rounded once."""
    for ins in WIDTHS[group_size][:6]:
        module, dense = make_int4(19, ins, group_size, dtype, symmetric)
        weight, eye = cpu.prepare_linear([module]), torch.eye(ins, dtype=dtype)
        expected = dense.T.to(dtype)
        assert torch.equal(cpu.linear(eye, weight), expected)
        few = torch.cat([cpu.linear(rows, weight) for rows in eye.split(3)])
        assert torch.equal(few, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_sums_of_integers_are_exact(dtype, symmetric, rows):
    for group_size in GROUPS:
        ins = WIDTHS[group_size][-1]
        module, _ = make_int4(21, ins, group_size, dtype, symmetric)
        module.weight_scale.data = 2.0 ** torch.randint(-3, 1, module.weight_scale.shape).to(dtype)
        dense = module.unpacked().dequantized(dtype=torch.float64)
        x = torch.randint(-2, 3, (rows, ins)).to(dtype)
        got = cpu.norm_lm_head(
            x, SimpleNamespace(weight=torch.ones(ins, dtype=dtype), eps=0.0), cpu.prepare_linear([module])
        )
        normed = cpu.rms_norm(x, torch.ones(ins, dtype=dtype), 0.0)
        plain = cpu._linear("linear", x, cpu.prepare_linear([module]), epilogue=cpu._STORE_FLOAT)
        assert torch.equal(plain.double(), x.double() @ dense.T)
        assert same_bits(got, cpu._linear("linear", normed, cpu.prepare_linear([module]), epilogue=cpu._STORE_FLOAT))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUPS)
def test_a_large_x_whose_weight_is_zero_adds_nothing(dtype, symmetric, group_size):
    """The zero is taken from the integer: a sum of x times it would round the rest away."""
    ins = 2 * group_size
    module, _ = make_int4(9, ins, group_size, dtype, symmetric)
    values = module.unpacked().values
    zeros = torch.full((9, 2), 8, dtype=torch.uint8) if symmetric else module.weight_zero_point.data.clamp_(max=15)
    values[:, 5] = zeros[:, 0]
    module.weight_packed.data = pack_rows(values)
    weight, x = cpu.prepare_linear([module]), torch.randn(3, ins).to(dtype)
    x[:, 5] = 0
    expected = cpu.linear(x, weight)
    x[:, 5] = 6e4
    assert torch.equal(cpu.linear(x, weight), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", ["neighbouring nibbles", "another group's scale", "a zero off by one"])
def test_control_accuracy_notices_a_mistake(dtype, mistake):
    module, dense = make_int4(40, 256, 64, dtype, symmetric=False)
    x = torch.randn(5, 256).to(dtype)
    linear_tests.assert_within_bound(cpu.linear(x, cpu.prepare_linear([module])), x, dense, None, None, None)
    if mistake == "neighbouring nibbles":
        module.weight_packed.data = pack_rows(module.unpacked().values.view(40, -1, 2).flip(-1).reshape(40, 256))
    elif mistake == "another group's scale":
        module.weight_scale.data = module.weight_scale.data.roll(1, dims=1)
    else:
        module.weight_zero_point.data = (module.weight_zero_point.data + 1).clamp(max=16)
    with pytest.raises(AssertionError, match="beyond the bound"):
        linear_tests.assert_within_bound(cpu.linear(x, cpu.prepare_linear([module])), x, dense, None, None, None)


# --- one answer -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def op_of(epilogue, ins, group_size, dtype, symmetric, outs=70):
    """An op of rows of x alone, with weights in parts."""
    norm, bias = norm_of(ins, dtype), epilogue != "normed"
    if epilogue == "gated":
        gate_up = cpu.prepare_linear(parts_of((outs, outs), ins, group_size, dtype, symmetric, bias)[0], "silu")
        return lambda x: cpu.norm_gate_up_act(x, norm, gate_up, None)
    weight = cpu.prepare_linear(parts_of((33, 1, outs - 34), ins, group_size, dtype, symmetric, bias)[0])
    residual = torch.randn(1, outs).to(dtype)
    return {
        "store": lambda x: cpu.linear(x, weight),
        "residual": lambda x: cpu.linear_residual(x, weight, residual.expand(len(x), -1), None),
        "head": lambda x: cpu.norm_lm_head(x, norm, weight),
        "normed": lambda x: cpu.linear(cpu.rms_norm(x, norm.weight, norm.eps), weight),
    }[epilogue]


def assert_rows_are_alone(function, x, counts):
    """Every row of a batch has the bits that it has in the whole, wherever the batch is cut."""
    whole = function(x)
    for count in counts:
        start = (7 * count) % (len(x) - count + 1)
        rows = slice(start, start + count)
        assert same_bits(function(x[rows]), whole[rows]), f"rows {start} to {start + count} of {len(x)}"
    assert same_bits(function(x.flip(0)).flip(0), whole), "the order of the rows shows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["store", "residual", "gated", "head", "normed"])
@pytest.mark.parametrize(("group_size", "ins"), [(32, 32), (32, 224), (64, 320), (128, 384), (32, 1120), (128, 1152)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_of_a_row_do_not_depend_on_its_company(dtype, epilogue, group_size, ins, symmetric):
    counts = range(1, 201) if ins == 224 else [*range(1, 23), 31, 33, 63, 64, 127, 128, 129, 159, 160, 161, 191, 192]
    x = torch.randn(200, ins).to(dtype)
    assert_rows_are_alone(op_of(epilogue, ins, group_size, dtype, symmetric), x, counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["store", "residual", "gated", "head"])
@pytest.mark.parametrize("rows", [1, 5, 140])
def test_any_number_of_threads_gives_the_bits_of_one(dtype, epilogue, rows):
    # So many outputs that the blocks of a task end elsewhere for every number of threads.
    function, x = op_of(epilogue, 160, 32, dtype, False, outs=900), torch.randn(rows, 160).to(dtype)
    with on_threads(1):
        expected = function(x)
    for count in (1, 2, 3, 8):
        with on_threads(count):
            for _ in range(2):
                assert same_bits(function(x), expected), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES)
def test_control_a_sum_that_depends_on_the_number_of_rows_is_noticed(dtype):
    parts, _ = parts_of((70,), 256, 64, dtype, True, False)
    halves = []
    for half in range(2):
        module = Int4Linear(128, 70, group_size=64)
        module.weight_packed.data = parts[0].weight_packed.data.chunk(2, 1)[half].contiguous()
        module.weight_scale.data = parts[0].weight_scale.data.chunk(2, 1)[half].contiguous()
        halves.append(cpu.prepare_linear([module]))
    whole, x = cpu.prepare_linear(parts), torch.randn(64, 256).to(dtype)

    def by_rows(rows):
        if len(rows) > 8:
            return cpu.linear(rows, whole)
        return sum(cpu.linear(part, half) for part, half in zip(rows.chunk(2, dim=1), halves, strict=True))

    assert_rows_are_alone(lambda rows: cpu.linear(rows, whole), x, range(1, 65))
    with pytest.raises(AssertionError, match="rows .* of 64"):
        assert_rows_are_alone(by_rows, x, range(1, 65))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 5, 130])
@pytest.mark.parametrize("group_size", GROUPS)
def test_fused_is_unfused(dtype, rows, group_size):
    ins = WIDTHS[group_size][3]
    x, norm = torch.randn(rows, ins).to(dtype), norm_of(ins, dtype)
    parts, _ = parts_of((65, 65), ins, group_size, dtype, False, True)
    whole, residual = cpu.prepare_linear(parts), torch.randn(rows, 130).to(dtype)
    normed = cpu.rms_norm(x, norm.weight, norm.eps)
    assert same_bits(cpu.linear_residual(x, whole, residual, None), residual + cpu.linear(x, whole))
    assert same_bits(cpu.norm_lm_head(x, norm, whole).to(dtype), cpu.linear(normed, whole))
    assert same_bits(cpu.norm_gate_up_act(x, norm, whole, None), cpu.silu_mul(cpu.linear(normed, whole)))
    # Parts with zeros and parts without beside each other are as each alone.
    alone = torch.cat([cpu.linear(x, cpu.prepare_linear([part])) for part in parts], dim=1)
    if dtype != torch.bfloat16 or group_size == 128:  # else the kernel of bf16 pairs takes the one without zeros
        assert same_bits(cpu.linear(x, whole), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 16])
def test_fused_qkv_is_unfused(dtype, rows):
    heads, head_dim, ins = (3, 1), 20, 96
    batch, num_pages = rope_tests.make_batch([(rows, 5)], 16, 16, CPU)
    parts, _ = parts_of((60, 20, 20), ins, 32, dtype, False, True)
    qkv, norm, x = cpu.prepare_linear(parts), norm_of(ins, dtype), torch.randn(rows, ins).to(dtype)
    fused_pages, pages = (LayerPages(*torch.zeros(2, num_pages, heads[1], 16, head_dim).to(dtype)) for _ in range(2))
    fused = cpu.norm_qkv_rope_cache(x, norm, qkv, batch, fused_pages)
    packed = cpu.linear(cpu.rms_norm(x, norm.weight, norm.eps), qkv).view(rows, -1, head_dim)
    q = cpu.rope_and_cache(*packed.tensor_split((heads[0], sum(heads)), dim=1), batch, pages)
    assert same_bits(fused, q) and same_bits(fused_pages.k, pages.k) and same_bits(fused_pages.v, pages.v)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_words_are_used_where_they_lie():
    parts, _ = parts_of((6, 8), 64, 32, torch.float32, False, False)
    weight, x = cpu.prepare_linear(parts), torch.randn(2, 64)
    addresses = {tensor.data_ptr() for tensor in weight.tensors}
    for part in parts:
        held = (part.weight_packed, part.weight_scale, part.weight_zero_point)
        assert all(tensor.data_ptr() in addresses for tensor in held if tensor is not None)
    before = cpu.linear(x, weight)
    parts[0].weight_packed.data[0] ^= 1
    after = cpu.linear(x, weight)
    assert same_bits(after[:, 1:], before[:, 1:]) and not same_bits(after[:, :1], before[:, :1])


def test_values_that_another_backend_reordered_are_restored():
    (module,), _ = parts_of((8,), 64, 32, torch.float32, True, False)
    x = torch.randn(2, 64)
    expected = cpu.linear(x, cpu.prepare_linear([module]))
    module.reorder(module.weight_packed.data.flip(0), lambda words: words.flip(0))
    assert same_bits(cpu.linear(x, cpu.prepare_linear([module])), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "ins", "rows"), [(32, 96, 1), (32, 224, 131), (64, 192, 3), (128, 128, 7)])
def test_F04_F05_layouts_and_what_stands_beside_change_no_bit(dtype, symmetric, group_size, ins, rows):
    (module,), _ = parts_of((33,), ins, group_size, dtype, symmetric, True)
    x = torch.randn(rows, ins).to(dtype)
    expected = cpu.linear(x, cpu.prepare_linear([module]))

    def moved(change):
        other = copy.deepcopy(module)
        for name in ("weight_packed", "weight_scale", "weight_zero_point", "bias"):
            tensor = getattr(other, name)
            if tensor is not None:
                tensor.data = change(tensor.data)
                assert torch.equal(tensor.data, getattr(module, name).data)
        return other

    def between_others(tensor):
        other = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.full_like(tensor, 255)
        return torch.cat((other, tensor, other))[len(tensor) : 2 * len(tensor)]

    changes = [lambda t: offset(t, 1), lambda t: offset(t, 3), between_others]
    changes.append(lambda t: t.T.contiguous().T if t.ndim == 2 else t)
    for change in changes:
        assert same_bits(cpu.linear(x, cpu.prepare_linear([moved(change)])), expected)
    padded = torch.cat((x, torch.full_like(x[:, :1], torch.nan)), dim=1)[:, :ins]
    for same in (padded, x.T.contiguous().T, offset(x, 1)):
        assert same_bits(cpu.linear(same, cpu.prepare_linear([module])), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -0.0, 1e-45])
@pytest.mark.parametrize("rows", [5, 140])
def test_F12_special_values_stand_where_they_belong(dtype, bad, rows):
    (module,), _ = parts_of((70,), 96, 32, dtype, True, True)
    x, weight = torch.randn(rows, 96).to(dtype), cpu.prepare_linear([module])
    healthy = cpu.linear(x, weight)
    x[3, 95] = bad
    got, plain = cpu.linear(x, weight), reference.linear(x, reference.prepare_linear([module]))
    assert torch.equal(got.isfinite(), plain.isfinite())
    others = torch.arange(rows) != 3
    assert same_bits(got[others], healthy[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["linear", "linear_residual", "norm_gate_up_act", "norm_lm_head"])
@pytest.mark.parametrize(("rows", "outs", "ins", "group_size"), [(1, 1, 32, 32), (6, 25, 96, 32), (131, 3, 128, 128)])
def test_F13_every_output_is_written_and_nothing_beside(guarded, dtype, op, rows, outs, ins, group_size):
    parts, _ = parts_of((outs, outs), ins, group_size, dtype, False, True)
    x, norm, weight = torch.randn(rows, ins).to(dtype), norm_of(ins, dtype), cpu.prepare_linear(parts, "silu")
    residual = torch.randn(rows, 2 * outs).to(dtype)
    with guarded():
        got = {
            "linear": lambda: cpu.linear(x, weight),
            "linear_residual": lambda: cpu.linear_residual(x, weight, residual, None),
            "norm_gate_up_act": lambda: cpu.norm_gate_up_act(x, norm, weight, None),
            "norm_lm_head": lambda: cpu.norm_lm_head(x, norm, weight),
        }[op]()
    assert got.shape == (rows, outs if op == "norm_gate_up_act" else 2 * outs) and got.isfinite().all()


def test_a_copy_holds_no_address():
    parts, _ = parts_of((4, 4), 64, 32, torch.float32, False, False)
    weight = cpu.prepare_linear(parts, "silu")
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert other.native is None and other.tensors == () and other.pair and weight.pair
        assert other.dtype == torch.float32 and (other.in_features, other.out_features) == (64, 8)


# --- on the path ------------------------------------------------------------------------------------------------------


def quantized(model, group_size, symmetric):
    """Every projection of the layers replaced by one of 4-bit integers."""
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, plain in list(block.named_children()):
                outs, ins = plain.weight.shape
                dtype, has_bias = plain.weight.dtype, plain.bias is not None
                module, _ = make_int4(outs, ins, group_size, dtype, symmetric, has_bias)
                module.weight_scale.data /= 4  # else attention is all or nothing and multiplies every error
                setattr(block, name, module)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, True), (32, False), (64, False)])
@pytest.mark.parametrize("layers_at_once", [True, False])
def test_whole_models_run_on_the_native_kernels_alone(monkeypatch, dtype, group_size, symmetric, layers_at_once):
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 32}
    model = quantized(make_model(dtype, attention_bias=True, **sizes), group_size, symmetric)
    prompt = [index * 31 % 97 for index in range(70)]

    exact_model = copy.deepcopy(model).double()

    def logits(model, backend):
        engine = Engine(model, backend=backend, max_batch=2, max_seq_len=80, page_size=8, split_size=32)
        request = make_request(model, prompt, max_tokens=4, temperature=0.0, prompt_logprobs=97)
        for _ in engine.run([request]):
            pass
        rows = [[position[token].logprob for token in range(97)] for position in request.prompt_logprobs if position]
        return torch.tensor(rows, dtype=torch.float64)

    exact, plain, calls = logits(exact_model, "reference"), logits(model, "reference"), []
    if not layers_at_once:
        op_by_op(monkeypatch, cpu)

    class Counted:
        def __getattr__(self, name):
            value = getattr(native, name)
            return value if isinstance(value, type) else lambda *args: calls.append(name) or value(*args)

    def refuse(*_):
        raise AssertionError("the reference's int4_linear was called")

    native = cpu._C
    monkeypatch.setattr(cpu, "_C", Counted())
    monkeypatch.setattr(reference_int4, "int4_linear", refuse)
    ours = logits(model, "cpu")
    expected = "run_layers" if layers_at_once else "norm_qkv_rope_cache"
    assert calls.count(expected) == 4 * (1 if layers_at_once else 2)
    assert calls.count("linear") >= (1 if layers_at_once else 25)
    # As for models of plain weights: twice the reference's own error in that dtype, plus one ulp.
    assert ours.numel() >= 4096 and exact.std() > 0.1
    worst = (plain - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * worst + torch.finfo(dtype).eps * exact.abs().max()


def test_all_layers_in_one_call_are_the_ops_one_by_one(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    model = quantized(make_model(torch.bfloat16, **sizes), 32, False)

    def tokens():
        engine = Engine(model, backend="cpu", max_batch=2, max_seq_len=80, page_size=8, split_size=32)
        request = make_request(model, list(range(40)), max_tokens=20, temperature=0.0, logprobs=5)
        for _ in engine.run([request]):
            pass
        return [{token: entry.logprob for token, entry in at.items()} for at in request.samples[0].logprobs]

    at_once = tokens()
    op_by_op(monkeypatch, cpu)
    assert tokens() == at_once


def test_accuracy_of_a_model_s_shapes():
    for outs, ins in ((192, 2048), (64, 8192)):
        module, dense = make_int4(outs, ins, 128, torch.bfloat16)
        x = outliers(torch.randn(2, ins)).to(torch.bfloat16)
        got = cpu._linear("linear", x, cpu.prepare_linear([module]), epilogue=cpu._STORE_FLOAT)
        exact, magnitude = F.linear(x.double(), dense), F.linear(x.double().abs(), dense.abs())
        assert ((got.double() - exact).abs() <= 4 * ins**0.5 * 2**-24 * magnitude).all()

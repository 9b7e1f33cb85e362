"""The Python side of the CUDA linear: what it serves, hands over and refuses, and which rows are sent to it."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama_fast.errors import BackendError, KernelArgumentError
from llama_fast.kernels import arguments
from llama_fast.kernels.silu_mul import ACTIVATIONS
from llama_fast.ops import cuda_extension, gpu
from llama_fast.ops.cuda_extension import linear, serves
from tests.cuda_kernels import emulation
from tests.cuda_kernels.fakes import Emulated, Module, forget
from tests.kernels.accuracy import same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about compiled kernels")

BF16 = torch.bfloat16


# --- what it serves ---------------------------------------------------------------------------------------------------


def _weight(rows=16, ins=32, dtype=BF16):
    return torch.randn(rows, ins).to(dtype)


@pytest.fixture
def fresh(monkeypatch):
    """The module is looked for anew, in this test and after it."""
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.fixture
def used(fresh):
    """As on a GPU where the extension is in use, with CPU tensors in place of the GPU's."""
    fresh.setattr(cuda_extension, "in_use", lambda device: True)
    fresh.setattr(arguments, "_DEVICE_TYPE", "cpu")
    fresh.setattr(cuda_extension, "_stream", lambda device: 77)


@pytest.mark.usefixtures("used")
def test_serves():
    assert serves(_weight()) and serves(_weight(), "silu")
    for dtype in (torch.float16, torch.float32):
        assert not serves(_weight(dtype=dtype))
    for ins in (1, 4, 12, 31):
        assert not serves(_weight(ins=ins))
    assert not serves(torch.empty(1, 2**24 + 8, dtype=BF16, device="meta"))
    assert not serves(_weight().flatten()[1:33].view(1, 32))
    served = {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"}
    assert {name for name in ACTIVATIONS if serves(_weight(), name)} == served
    assert not serves(_weight(), "unknown")


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(used, fresh):
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler for the emulation")
    module = Emulated()
    fresh.setattr(cuda_extension, "extension", lambda: (module, ""))
    return module


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_the_call_hands_everything_over(served, guarded, rows):
    x, weight, bias = torch.randn(rows, 40).to(BF16), _weight(34, 40), torch.randn(34).to(BF16)
    residual = torch.randn(rows, 34).to(BF16)
    direct = emulation.emulation()
    with guarded():
        for given in (None, bias):
            for dtype in (None, BF16, torch.float32):
                out = linear(x, weight, given, out_dtype=dtype)
                assert out.shape == (rows, 34) and out.dtype == (dtype or BF16)
                assert not rows or same_bits(out, direct(x, weight, given, out_dtype=dtype or BF16))
            out = linear(x, weight, given, residual=residual)
            assert not rows or same_bits(out, direct(x, weight, given, residual))
            for name in ("silu", "gelu", "gelu_new", "relu"):
                out = linear(x, weight, given, activation=name)
                assert out.shape == (rows, 17)
                assert not rows or same_bits(out, direct(x, weight, given, activation=ACTIVATIONS[name]))
    assert all(args[-1] == 77 for args in served.calls)  # the stream
    assert bool(served.calls) == bool(rows)


def test_rows_that_are_apart(served):
    x, weight = torch.randn(5, 80).to(BF16), _weight(34, 40)
    assert same_bits(linear(x[:, 40:], weight), linear(x[:, 40:].contiguous(), weight))
    # The stride of a single row says nothing.
    assert same_bits(linear(x[:, :40].as_strided((1, 40), (41, 1)), weight), linear(x[:1, :40], weight))


REFUSED = {
    "fp16": (torch.float16, {}, "x is torch.float16; the CUDA extension takes bfloat16"),
    "fp32": (torch.float32, {}, "x is torch.float32; the CUDA extension takes bfloat16"),
    "width": (BF16, {"ins": 12}, "in_features=12 must be a multiple of 8 and at most 16777216 for the CUDA extension"),
    "activation": (BF16, {"activation": "mish"}, "activation='mish' is not in the CUDA extension; set .*=off"),
    "unknown": (BF16, {"activation": "swiglu"}, "activation='swiglu' is unknown; use one of gelu, "),
    "odd": (BF16, {"rows": 15, "activation": "silu"}, "activation needs gate and up of equal height"),
    "out_dtype": (BF16, {"out_dtype": torch.float16}, "out_dtype=torch.float16; use torch.bfloat16 or torch.float32"),
    "bias": (BF16, {"bias": torch.zeros(15, dtype=BF16)}, r"bias must be \[16\] and contiguous; got \(15,\)"),
    "bias dtype": (BF16, {"bias": torch.zeros(16)}, "bias is torch.float32 and x is torch.bfloat16; give both"),
    "residual": (BF16, {"residual": torch.zeros(3, 15, dtype=BF16)}, r"residual must be \(3, 16\) and contiguous"),
    "both": (
        BF16,
        {"residual": torch.zeros(3, 16, dtype=BF16), "activation": "silu"},
        "activation needs gate and up of equal height and no residual",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused(served, case):
    dtype, options, message = REFUSED[case]
    options = dict(options)
    ins, rows = options.pop("ins", 32), options.pop("rows", 16)
    with pytest.raises(KernelArgumentError, match=f"^linear: {message}"):
        linear(torch.ones(3, ins, dtype=dtype), _weight(rows, ins, dtype), **options)
    assert not served.calls


def test_layouts_are_refused(served):
    x, weight = torch.ones(3, 64, dtype=BF16), _weight()
    apart = (
        "x's rows must start at multiples of 16 bytes, at most 16777216 elements apart, for the CUDA extension; got "
    )
    for view in (x[:, 1:33], x[:, :40].flatten()[:105].as_strided((3, 32), (36, 1)), x[1:, 4:36]):
        with pytest.raises(KernelArgumentError, match=f"{apart}address 0x[0-9a-f]+ and stride .*; use x.contiguous"):
            linear(view, weight)
    with pytest.raises(KernelArgumentError, match="weight must start at a multiple of 16 bytes for the CUDA extension"):
        linear(x[:, :32], torch.ones(16 * 32 + 1, dtype=BF16)[1:].view(16, 32))
    with pytest.raises(KernelArgumentError, match="x's columns and weight must be contiguous"):
        linear(x.T[:32].T[:, ::2].T[:3], torch.ones(4, 3, dtype=BF16))
    with pytest.raises(KernelArgumentError, match=r"x must be \[num_tokens, in_features\]"):
        linear(x, weight)
    assert not served.calls


def test_F03_a_cpu_tensor_is_refused():
    with pytest.raises(KernelArgumentError, match="x is on cpu; the kernel takes a CUDA tensor"):
        linear(torch.ones(1, 8, dtype=BF16), torch.ones(1, 8, dtype=BF16))


def test_errors_of_the_launch(used, fresh):
    x, weight = torch.ones(1, 32, dtype=BF16), _weight()
    fresh.setattr(cuda_extension, "extension", lambda: (Module(problem="CUDA error 700 (x)"), ""))
    with pytest.raises(BackendError, match="linear: CUDA error 700"):
        linear(x, weight)
    fresh.setattr(cuda_extension, "extension", lambda: (None, "llama_fast._cuda was not built"))
    with pytest.raises(BackendError, match="linear: llama_fast._cuda was not built"):
        linear(x, weight)


# --- the route of a role ----------------------------------------------------------------------------------------------


@pytest.fixture
def routes(fresh):
    """Names of the kernels that ran, in order; nothing is computed."""
    ran = []

    def watched(name):
        def call(x, weight, bias=None, *, residual=None, activation=None, out_dtype=None):
            ran.append((name, len(x), activation, residual is not None))
            return x.new_zeros(len(x), len(weight) // (2 if activation else 1), dtype=out_dtype or x.dtype)

        return call

    fresh.setattr(cuda_extension, "in_use", lambda device: True)
    fresh.setattr(cuda_extension, "linear", watched("cuda"))
    fresh.setattr(gpu.linear_kernel, "linear", watched("triton"))
    fresh.setattr(gpu, "rms_norm", lambda x, weight, eps: x)
    fresh.setattr(gpu, "silu_mul", lambda gate_up, activation: gate_up)
    return ran


def _prepared(activation=None, ins=32, dtype=BF16):
    return gpu.prepare_linear([nn.Linear(ins, 16, bias=False, dtype=dtype).requires_grad_(False)], activation)


@pytest.mark.parametrize("generated", [False, True])
def test_generated_rows_take_the_extension_and_prompt_rows_do_not(routes, generated):
    plain, gated, called = _prepared(), _prepared("silu"), _prepared(torch.sin)
    norm, batch = SimpleNamespace(weight=None, eps=1e-5), SimpleNamespace(generated=generated)
    name = "cuda" if generated else "triton"
    for rows in (1, 8, 9, 64, 65, 300):
        x, residual = torch.zeros(rows, 32, dtype=BF16), torch.zeros(rows, 16, dtype=BF16)
        routes.clear()
        gpu.linear(x, plain, generated)
        gpu.linear_residual(x, plain, residual, batch)
        gpu.norm_gate_up_act(x, norm, gated, batch)
        gpu.norm_gate_up_act(x, norm, plain, batch)  # no activation is silu
        gpu.norm_gate_up_act(x, norm, called, batch)
        forms = [(None, False), (None, True), ("silu", False), ("silu", False), (None, False)]
        assert routes == [(name, rows, *form) for form in forms]


def test_the_lm_head_serves_both_roles_and_stays(routes):
    gpu.norm_lm_head(torch.zeros(2, 32, dtype=BF16), SimpleNamespace(weight=None, eps=1e-5), _prepared())
    assert routes == [("triton", 2, None, False)]


@pytest.mark.parametrize(("activation", "ins", "dtype"), [("mish", 32, BF16), (None, 36, BF16), (None, 32, torch.half)])
def test_a_weight_that_the_extension_does_not_serve(routes, activation, ins, dtype):
    weight, batch = _prepared(activation, ins, dtype), SimpleNamespace(generated=True)
    gpu.linear_residual(torch.zeros(2, ins, dtype=dtype), weight, torch.zeros(2, 16, dtype=dtype), batch)
    assert routes == [("triton", 2, None, True)] and not weight.by_extension


def test_a_weight_keeps_its_route(routes, fresh):
    """Decided when it is prepared, not with every call."""
    weight = _prepared()
    fresh.setattr(cuda_extension, "in_use", lambda device: False)
    gpu.linear(torch.zeros(2, 32, dtype=BF16), weight, True)
    gpu.linear(torch.zeros(2, 32, dtype=BF16), _prepared(), True)
    assert [name for name, *_ in routes] == ["cuda", "triton"]

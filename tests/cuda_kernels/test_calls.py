"""The Python side of the CUDA int4_linear: what it serves, hands over and refuses, and which rows are sent to it."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama_fast.errors import BackendError, KernelArgumentError
from llama_fast.kernels import arguments
from llama_fast.kernels.int4_linear import PlanarInt4, pack_int4
from llama_fast.kernels.silu_mul import ACTIVATIONS
from llama_fast.ops import cuda_extension, gpu
from llama_fast.ops.cuda_extension import int4_linear, serves
from llama_fast.ops.int4 import Int4Linear, Int4Weight
from tests.cuda_kernels import emulation
from tests.cuda_kernels.fakes import Emulated, Module, forget
from tests.kernels.accuracy import same_bits

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about compiled kernels")

BF16 = torch.bfloat16


# --- what it serves ---------------------------------------------------------------------------------------------------


def _weight(rows=16, ins=64, dtype=BF16, group_size=32, zeros=True, bias=False):
    return Int4Weight(
        torch.randint(0, 16, (rows, ins), dtype=torch.uint8),
        torch.randn(rows, ins // group_size).to(dtype),
        torch.randint(0, 17, (rows, ins // group_size), dtype=torch.uint8) if zeros else None,
        torch.randn(rows).to(dtype) if bias else None,
    )


def _packed(*args, **options):
    return emulation.packed_of(_weight(*args, **options))


def _shifted(tensor):
    """The same, one element past an aligned address."""
    return torch.cat((tensor.flatten()[:1], tensor.flatten()))[1:].view(tensor.shape)


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
    assert serves(_packed()) and serves(_packed(), "silu") and serves(_packed(zeros=False))
    for dtype in (torch.float16, torch.float32):
        assert not serves(_packed(dtype=dtype))
    assert not serves(_packed(rows=15)) and serves(_packed(rows=14)) and not serves(_packed(rows=14), "silu")
    wide = torch.empty(2**24 // 128 + 1, 2, dtype=BF16, device="meta")
    words = torch.empty(2**24 // 128 + 1, 2, 16, dtype=torch.int32, device="meta")
    assert not serves(PlanarInt4(words, wide, None, None, 2**24 + 128))
    packed = _packed()
    for name in ("words", "scales", "zeros"):
        assert not serves(replace(packed, **{name: _shifted(getattr(packed, name))}))
    served = {"silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"}
    assert {name for name in ACTIVATIONS if serves(_packed(), name)} == served
    assert not serves(_packed(), "unknown")


# --- the call ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(used, fresh):
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler for the emulation")
    module = Emulated()
    fresh.setattr(cuda_extension, "extension", lambda: (module, ""))
    return module


@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_call_hands_everything_over(served, guarded, rows, group_size):
    x, residual = torch.randn(rows, 384).to(BF16), torch.randn(rows, 36).to(BF16)
    direct = emulation.emulation()
    for zeros, bias in ((False, True), (True, False)):
        # The package's own packing, which Triton's kernel reads too.
        packed = pack_int4(_weight(36, 384, group_size=group_size, zeros=zeros, bias=bias))
        with guarded():
            for dtype in (None, BF16, torch.float32):
                out = int4_linear(x, packed, out_dtype=dtype)
                assert out.shape == (rows, 36) and out.dtype == (dtype or BF16)
                assert not rows or same_bits(out, direct(x, packed, out_dtype=dtype or BF16))
            out = int4_linear(x, packed, residual=residual)
            assert not rows or same_bits(out, direct(x, packed, residual))
            for name in ("silu", "gelu", "gelu_new", "relu"):
                out = int4_linear(x, packed, activation=name)
                assert out.shape == (rows, 18)
                assert not rows or same_bits(out, direct(x, packed, activation=ACTIVATIONS[name]))
    assert all(args[-1] == 77 for args in served.calls)  # the stream
    assert bool(served.calls) == bool(rows)


def test_rows_that_are_apart(served):
    x, packed = torch.randn(5, 128).to(BF16), _packed(34)
    assert same_bits(int4_linear(x[:, 64:], packed), int4_linear(x[:, 64:].contiguous(), packed))
    # The stride of a single row says nothing.
    assert same_bits(int4_linear(x[:, :64].as_strided((1, 64), (65, 1)), packed), int4_linear(x[:1, :64], packed))


REFUSED = {
    "fp16": (torch.float16, {}, "x is torch.float16; the CUDA extension takes bfloat16"),
    "fp32": (torch.float32, {}, "x is torch.float32; the CUDA extension takes bfloat16"),
    "activation": (BF16, {"activation": "mish"}, "activation='mish' is not in the CUDA extension; set .*=off"),
    "unknown": (BF16, {"activation": "swiglu"}, "activation='swiglu' is unknown; use one of gelu, "),
    "odd": (BF16, {"rows": 15}, "out_features=15 must be even for the CUDA extension; set .*=off"),
    "odd half": (BF16, {"rows": 14, "activation": "silu"}, "out_features=7 must be even for the CUDA extension"),
    "half": (BF16, {"rows": 15, "activation": "silu"}, "activation needs gate and up of equal height"),
    "out_dtype": (BF16, {"out_dtype": torch.float16}, "out_dtype=torch.float16; use torch.bfloat16 or torch.float32"),
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
    rows = options.pop("rows", 16)
    with pytest.raises(KernelArgumentError, match=f"^int4_linear: {message}"):
        int4_linear(torch.ones(3, 64, dtype=dtype), _packed(rows, dtype=dtype), **options)
    assert not served.calls


def test_layouts_are_refused(served):
    x, packed = torch.ones(3, 128, dtype=BF16), _packed()
    apart = (
        "x's rows must start at multiples of 16 bytes, at most 16777216 elements apart, for the CUDA extension; got "
    )
    for view in (x[:, 1:65], x.flatten()[:204].as_strided((3, 64), (68, 1)), x[1:, 4:68]):
        with pytest.raises(KernelArgumentError, match=f"{apart}address 0x[0-9a-f]+ and stride .*; use x.contiguous"):
            int4_linear(view, packed)
    for name, alignment in (("words", 16), ("scales", 4), ("zeros", 4)):
        with pytest.raises(
            KernelArgumentError, match=f"{name} must be contiguous and start at a multiple of {alignment} "
        ):
            int4_linear(x[:, :64], replace(packed, **{name: _shifted(getattr(packed, name))}))
    with pytest.raises(KernelArgumentError, match=r"x must be \[num_tokens, 64\]"):
        int4_linear(x, packed)
    assert not served.calls


def test_F03_a_cpu_tensor_is_refused():
    with pytest.raises(KernelArgumentError, match="x is on cpu; the kernel takes a CUDA tensor"):
        int4_linear(torch.ones(1, 64, dtype=BF16), _packed())


def test_errors_of_the_launch(used, fresh):
    x, packed = torch.ones(1, 64, dtype=BF16), _packed()
    fresh.setattr(cuda_extension, "extension", lambda: (Module(problem="CUDA error 700 (x)"), ""))
    with pytest.raises(BackendError, match="int4_linear: CUDA error 700"):
        int4_linear(x, packed)
    fresh.setattr(cuda_extension, "extension", lambda: (None, "llama_fast._cuda was not built"))
    with pytest.raises(BackendError, match="int4_linear: llama_fast._cuda was not built"):
        int4_linear(x, packed)


# --- the route of a role ----------------------------------------------------------------------------------------------


@pytest.fixture
def routes(fresh):
    """Names of the kernels that ran, in order; nothing is computed."""
    ran = []

    def watched(name):
        def call(x, weight, bias=None, *, residual=None, activation=None, out_dtype=None):
            ran.append((name, len(x), activation, residual is not None))
            height = weight.out_features if isinstance(weight, PlanarInt4) else len(weight)
            return x.new_zeros(len(x), height // (2 if activation else 1), dtype=out_dtype or x.dtype)

        return call

    fresh.setattr(cuda_extension, "in_use", lambda device: True)
    fresh.setattr(cuda_extension, "int4_linear", watched("cuda"))
    fresh.setattr(gpu.int4_kernel, "int4_linear", watched("triton"))
    fresh.setattr(gpu.linear_kernel, "linear", watched("plain"))
    fresh.setattr(gpu, "rms_norm", lambda x, weight, eps: x)
    fresh.setattr(gpu, "silu_mul", lambda gate_up, activation: gate_up)
    return ran


def _prepared(activation=None, outs=16, dtype=BF16):
    part = Int4Linear(64, outs, group_size=32)
    part.weight_packed.data.random_()
    part.weight_scale.data.fill_(1)
    return gpu.prepare_linear([part.to(dtype)], activation)


NORM = SimpleNamespace(weight=None, eps=1e-5)


@pytest.mark.parametrize("generated", [False, True])
def test_generated_rows_take_the_extension_and_prompt_rows_do_not(routes, generated):
    plain, gated, called = _prepared(), _prepared("silu"), _prepared(torch.sin)
    batch, name = SimpleNamespace(generated=generated), "cuda" if generated else "triton"
    for rows in (1, 8, 9, 64, 65, 300):
        x, residual = torch.zeros(rows, 64, dtype=BF16), torch.zeros(rows, 16, dtype=BF16)
        routes.clear()
        gpu.linear(x, plain, generated)
        gpu.linear_residual(x, plain, residual, batch)
        gpu.norm_gate_up_act(x, NORM, gated, batch)
        gpu.norm_gate_up_act(x, NORM, plain, batch)  # no activation is silu
        gpu.norm_gate_up_act(x, NORM, called, batch)
        forms = [(None, False), (None, True), ("silu", False), ("silu", False), (None, False)]
        assert routes == [(name, rows, *form) for form in forms]


@pytest.mark.parametrize("generated", [False, True])
def test_weights_that_are_not_quantized_take_one_kernel(routes, generated):
    weight = gpu.prepare_linear([nn.Linear(64, 16, bias=False, dtype=BF16).requires_grad_(False)], "silu")
    batch, x = SimpleNamespace(generated=generated), torch.zeros(2, 64, dtype=BF16)
    gpu.linear_residual(x, weight, torch.zeros(2, 16, dtype=BF16), batch)
    gpu.norm_gate_up_act(x, NORM, weight, batch)
    assert [name for name, *_ in routes] == ["plain", "plain"] and not weight.by_extension


def test_the_lm_head_serves_both_roles_and_stays(routes):
    assert gpu.norm_lm_head(torch.zeros(2, 64, dtype=BF16), NORM, _prepared()).dtype == torch.float32
    assert routes == [("cuda", 2, None, False)]
    routes.clear()
    gpu.norm_lm_head(torch.zeros(1024, 64, dtype=BF16), NORM, _prepared(outs=15))
    assert routes == [("triton", 1024, None, False)]


@pytest.mark.parametrize(
    ("activation", "outs", "dtype"), [("mish", 16, BF16), (None, 15, BF16), (None, 16, torch.half)]
)
def test_a_weight_that_the_extension_does_not_serve(routes, activation, outs, dtype):
    weight, batch = _prepared(activation, outs, dtype), SimpleNamespace(generated=True)
    gpu.linear_residual(torch.zeros(2, 64, dtype=dtype), weight, torch.zeros(2, outs, dtype=dtype), batch)
    assert routes == [("triton", 2, None, True)] and not weight.by_extension


def test_a_weight_keeps_its_route(routes, fresh):
    """Decided when it is prepared, not with every call."""
    weight = _prepared()
    fresh.setattr(cuda_extension, "in_use", lambda device: False)
    gpu.linear(torch.zeros(2, 64, dtype=BF16), weight, True)
    gpu.linear(torch.zeros(2, 64, dtype=BF16), _prepared(), True)
    assert [name for name, *_ in routes] == ["cuda", "triton"]

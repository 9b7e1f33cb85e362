"""silu_mul: out = activation(gate) * up, straight from the packed gate_up projection.

Fused    split, activation, multiply. Nothing in between is written to memory.
Traffic  3 * num_tokens * intermediate_size * itemsize bytes: memory-bound.
Shapes   gate_up [num_tokens, 2 * intermediate_size] -> [num_tokens, intermediate_size]
Dtypes   fp16, bf16 or fp32 in and out; fp32 arithmetic, rounded once.
Source   SwiGLU, arXiv:2002.05202; the activations as in ops/activations.py.
"""

import torch
import triton
import triton.language as tl

from llama_fast.kernels.arguments import check_tensors, refuse

_BLOCK = 1024

# Hugging Face's names of one function each; the kernels know the first of them.
_SAME = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}
_KNOWN = (
    "gelu",
    "gelu_tanh",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "tanh",
)
ACTIVATIONS = {name: name for name in _KNOWN if name != "gelu_tanh"} | _SAME


@triton.jit
def _tanh(x):
    # exp of a negative number never overflows; below 1/8 the difference 1 - exp loses digits, and the odd series
    # to x^9 is exact to fp32's last bit there.
    magnitude = tl.abs(x)
    decay = tl.exp(-2.0 * magnitude)
    large = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    series = magnitude + magnitude * square * series
    result = tl.where(magnitude < 0.125, series, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of ACTIVATIONS' values, elementwise in fp32; NaN stays NaN."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "laplace":
        # Mean sqrt(1/2), standard deviation sqrt(1 / (4 pi)) times sqrt(2).
        y = 0.5 * (1.0 + tl.erf((x - 0.7071067811865476) / 0.3989422804014327))
    elif ACTIVATION == "leaky_relu":
        y = tl.where(x < 0, 0.01 * x, x)
    elif ACTIVATION == "linear":
        y = x
    elif ACTIVATION == "mish":
        # tanh(log(1 + e^x)) as a quotient; from 20 on it is 1, and later e^(2x) overflows.
        e = tl.exp(x)
        n = e * (e + 2.0)
        y = tl.where(x > 20.0, x, x * (n / (n + 2.0)))
    elif ACTIVATION == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "relu6":
        y = tl.where(x < 0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "tanh", "unknown activation")
        y = _tanh(x)
    return y


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr, out_ptr, stride, INTERMEDIATE_SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    # Blocks of columns on axis 0, the only one that may exceed 65,535. int64: row * stride leaves int32 after 37,449
    # tokens at 70B's width of 57,344.
    NUM_BLOCKS: tl.constexpr = tl.cdiv(INTERMEDIATE_SIZE, BLOCK)
    program = tl.program_id(0)
    row = (program // NUM_BLOCKS).to(tl.int64)
    cols = (program % NUM_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE_SIZE

    gate_ptrs = gate_up_ptr + row * stride + cols
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTERMEDIATE_SIZE, mask, other=0.0).to(tl.float32)
    out = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * INTERMEDIATE_SIZE + cols, out.to(out_ptr.dtype.element_ty), mask)


def silu_mul(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """Gated activation of the Llama MLP.

    Args:
        gate_up: [num_tokens, 2 * intermediate_size], gate first; rows may be strided, columns may not.
        activation: one of ACTIVATIONS' names, Hugging Face's.

    Returns:
        [num_tokens, intermediate_size], dtype and device of `gate_up`.

    Raises:
        KernelArgumentError: a dtype, device, shape or stride that is not as above, or an unknown activation.
    """
    check_tensors("silu_mul", gate_up=gate_up)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        refuse(
            "silu_mul",
            "gate_up must be [num_tokens, 2 * intermediate_size] with contiguous columns; "
            f"got shape {tuple(gate_up.shape)}, stride {gate_up.stride()}",
        )
    if activation not in ACTIVATIONS:
        refuse("silu_mul", f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    num_tokens, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_tokens, intermediate_size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (num_tokens * triton.cdiv(intermediate_size, _BLOCK),)
        _silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), intermediate_size, ACTIVATIONS[activation], _BLOCK)
    return out

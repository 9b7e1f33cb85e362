"""What Triton's interpreter gets wrong and the tests need right.

bf16     The interpreter keeps bf16 as uint16 and computes with those bits: `+`, `*`, comparisons and tl.dot are wrong
         without a word, and fp32 -> bf16 truncates. `patch_bf16` computes in fp32 and rounds to nearest even.
         test_interpreter.py's canary fails when upstream no longer needs it.
tl.fma   Rounds the product. `patch_fma` rounds once.
tl.dot   Is numpy's BLAS, whose last bits depend on the tile's shape. `exact_dot` takes the MMA's steps one after the
         other, each exact and rounded once, so that tiles of different shapes can be compared bitwise.
"""

import contextlib
from unittest import mock

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The K of one MMA in 16-bit dtypes, and at most that of every tile.
_MMA_STEP = 16
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _to_fp32(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_bf16(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest_even = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest_even)


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return TensorHandle(_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def patch_bf16():
    """Replace the interpreter's bf16 arithmetic for the rest of the process."""
    plain_cast, plain_fp_to_fp = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    plain_dot, plain_binary = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op
    plain_unary, plain_ternary = InterpreterBuilder.unary_op, InterpreterBuilder.ternary_op

    def cast_impl(self, src, dst_type):
        src = _widened(src)
        if dst_type.scalar == tl.bfloat16:
            return TensorHandle(_to_bf16(plain_cast(self, src, tl.float32).data), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if not _is_bf16(src) and dst_type.scalar != tl.bfloat16:
            return plain_fp_to_fp(self, src, dst_type, rounding_mode)
        if dst_type.scalar == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTZ:
            return plain_fp_to_fp(self, src, dst_type, rounding_mode)
        return cast_impl(self, src, dst_type)

    def create_dot(self, a, b, d, *options):
        return plain_dot(self, _widened(a), _widened(b), d, *options)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)) or op in _BITWISE:
            return plain_binary(self, lhs, rhs, op)
        out = op(_to_fp32(lhs.data), _to_fp32(rhs.data))
        return TensorHandle(out, tl.int1) if out.dtype == bool else TensorHandle(_to_bf16(out), tl.bfloat16)

    def unary_op(self, arg, op):
        if _is_bf16(arg):
            return TensorHandle(_to_bf16(op(_to_fp32(arg.data))), tl.bfloat16)
        return plain_unary(self, arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if _is_bf16(rhs) and op is not np.where:
            out = op(_widened(lhs).data, _widened(rhs).data, _widened(other).data)
            return TensorHandle(_to_bf16(out), tl.bfloat16)
        return plain_ternary(self, lhs, rhs, other, op)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.unary_op = unary_op
    InterpreterBuilder.ternary_op = ternary_op
    InterpreterBuilder.get_bf16 = lambda self, value: TensorHandle(_to_bf16([value]), tl.bfloat16)


def patch_fma():
    """Replace the interpreter's fp32 multiply-add for the rest of the process."""
    plain_fma = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if z.data.dtype != np.float32:
            return plain_fma(self, x, y, z)
        # The product is exact in fp64; that the sum is rounded there first shows in one of 2^29 results.
        return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


@contextlib.contextmanager
def exact_dot():
    """tl.dot as hardware chains it: steps along K in ascending order, each in fp64 and rounded to the accumulator."""

    def create_dot(self, a, b, d, *options):
        left, right, acc = _widened(a).data.astype(np.float64), _widened(b).data.astype(np.float64), d.data
        for k in range(0, left.shape[-1], _MMA_STEP):
            step = np.matmul(left[..., k : k + _MMA_STEP], right[..., k : k + _MMA_STEP, :])
            acc = (step + acc).astype(acc.dtype)
        return TensorHandle(acc, d.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield

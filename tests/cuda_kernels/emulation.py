"""The CUDA kernels on a CPU: the very headers of csrc/cuda, compiled by g++ against emulated_cuda.h."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from llama_fast.kernels.int4_linear import PlanarInt4

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# Token tiles, weight tiles and slices of the kernel's instances, by whether it is gated; eight are for long sums.
TILES = {
    False: [(4, 4, 2), (2, 2, 4), (1, 1, 8), (1, 1, 4)],
    True: [(4, 4, 2), (2, 2, 4), (1, 2, 4)],
}
DEPTHS = (4, 3, 2)
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
# By compute capability: bytes of shared memory that a block may have, multiprocessors, the capability's first number.
DEVICES = {
    80: (163 * 1024, 108, 8),
    89: (99 * 1024, 128, 8),
    90: (227 * 1024, 132, 9),
    100: (227 * 1024, 148, 10),
}


def num_slices(in_features):
    """As csrc/cuda/int4_linear_call.h has it."""
    return 8 if in_features >= 8192 else 4


def tiles_of(gated, in_features):
    """Those that may serve such a weight."""
    return [tile for tile in TILES[gated] if tile[2] <= num_slices(in_features)]


def planar(values):
    """PlanarInt4's words of uint8 [out_features, in_features], made without the package's own packing."""
    outs, ins = values.shape
    planes = F.pad(values, (0, -ins % 128)).view(outs, -1, 8, 16).long()
    words = (planes << torch.arange(0, 32, 4)[:, None]).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).transpose(0, 1).contiguous()


def packed_of(weight):
    """An Int4Weight as the kernels read it."""
    zeros = None if weight.zeros is None else weight.zeros.t().to(weight.scales.dtype).contiguous()
    return PlanarInt4(planar(weight.values), weight.scales.t().contiguous(), zeros, weight.bias, weight.values.shape[1])


class Emulation:
    """The int4_linear kernel in the shape of llama_fast._cuda, on addresses of CPU tensors."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._linear = self._library.emulated_int4_linear
        self._linear.restype = ctypes.c_char_p
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear.argtypes = [pointer, size, size, *[pointer] * 6, size, *[number] * 4, pointer, size, size]

    def int4_linear(  # the arguments are those of llama_fast/_cuda.pyi
        self,
        x,
        x_stride,
        num_rows,
        words,
        scales,
        zeros,
        bias,
        residual,
        out,
        out_features,
        in_features,
        group_size,
        activation,
        out_is_float,
        stream=0,
        tile=None,
        blocks=(0, -1),
    ):
        tile = tile or self.tile(num_rows, in_features, group_size, activation > 0, out_features=out_features)[0]
        problem = self._linear(
            *(x, x_stride, num_rows, words, scales, zeros, bias, residual, out, out_features, in_features),
            *(group_size, activation, out_is_float, (ctypes.c_int * 4)(*tile), *blocks),
        )
        if problem is not None:
            raise RuntimeError(problem.decode())

    def tile(self, num_rows, in_features, group_size, gated, device=DEVICES[90], out_features=4096):
        """What the launcher would choose: token tiles, weight tiles, slices, depth; and its bytes of shared memory."""
        tile = (ctypes.c_int * 4)()
        sizes = ctypes.c_int64(num_rows), ctypes.c_int64(out_features), in_features, group_size, int(gated)
        taken = self._library.emulated_tile(*sizes, (ctypes.c_int * 3)(*device), tile)
        return tuple(tile), taken

    def __call__(self, x, packed, residual=None, activation=None, out_dtype=torch.bfloat16, tile=None):
        """The result, which lies between guard bytes and was NaN before."""
        num_rows, out_features = len(x), packed.out_features // (2 if activation else 1)
        margin, size = 256, num_rows * out_features * out_dtype.itemsize
        raw = torch.full((2 * margin + size,), 0xA5, dtype=torch.uint8)
        out = raw[margin : margin + size].view(out_dtype)
        out.fill_(torch.nan)
        self.int4_linear(
            *(x.data_ptr(), x.stride(0), num_rows, packed.words.data_ptr(), packed.scales.data_ptr()),
            *(0 if given is None else given.data_ptr() for given in (packed.zeros, packed.bias, residual)),
            *(out.data_ptr(), out_features, packed.in_features, packed.group_size, ACTIVATIONS[activation]),
            *(out_dtype == torch.float32, 0, tile),
        )
        assert (torch.cat((raw[:margin], raw[margin + size :])) == 0xA5).all(), "a store beside the output"
        return out.view(num_rows, out_features)


@lru_cache
def emulation():
    """The kernels as they are, compiled once."""
    folder = tempfile.TemporaryDirectory(prefix="emulated-")
    built = build(Path(folder.name))
    built.folder = folder
    return built


def build(folder, changes=(), options=("-O1",)):
    """Compile into `folder`; `changes` are (file of csrc/cuda, text, what to put in its place), each found once."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    for name, text, other in changes:
        path = sources / name
        before = path.read_text(encoding="utf-8")
        assert before.count(text) == 1, f"{name} has {before.count(text)} times {text!r}"
        path.write_text(before.replace(text, other), encoding="utf-8")
    library = folder / "emulated.so"
    flags = ["-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *options]
    command = [COMPILER, *flags, f"-I{sources}", f"-I{HERE}", HERE / "emulated_int4_linear.cpp", "-o", library]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return Emulation(library)

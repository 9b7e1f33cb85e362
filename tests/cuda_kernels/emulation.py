"""The CUDA kernels on a CPU: the very headers of csrc/cuda, compiled by g++ against emulated_cuda.h."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# Token and weight tiles of the kernel's instances, by whether it is gated.
TILES = {
    False: [(tokens, weights) for weights in (1, 2) for tokens in (1, 2, 4, 8)],
    True: [(tokens, 1) for tokens in (1, 2, 4, 8)],
}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


class Emulation:
    """The linear kernel in the shape of llama_fast._cuda, on addresses of CPU tensors."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._linear = self._library.emulated_linear
        self._linear.restype = ctypes.c_char_p
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._linear.argtypes = [pointer, size, size, *[pointer] * 4, size, *[number] * 5, size, size]

    def linear(  # the arguments are those of llama_fast/_cuda.pyi
        self,
        x,
        x_stride,
        num_rows,
        weight,
        bias,
        residual,
        out,
        out_features,
        in_features,
        activation,
        out_is_float,
        stream=0,
        token_tiles=0,
        weight_tiles=0,
        blocks=(0, -1),
    ):
        problem = self._linear(
            *(x, x_stride, num_rows, weight, bias, residual, out, out_features, in_features),
            *(activation, out_is_float, token_tiles, weight_tiles, *blocks),
        )
        if problem is not None:
            raise RuntimeError(problem.decode())

    def tile(self, num_rows, out_features, gated):
        """What the launcher would choose: token tiles and weight tiles."""
        tiles = (ctypes.c_int * 2)()
        self._library.emulated_tile(ctypes.c_int64(num_rows), ctypes.c_int64(out_features), int(gated), tiles)
        return tuple(tiles)

    def __call__(self, x, weight, bias=None, residual=None, activation=None, out_dtype=torch.bfloat16, tile=(0, 0)):
        """The result, which lies between guard bytes and was NaN before."""
        num_rows, out_features = len(x), len(weight) // (2 if activation else 1)
        margin, size = 256, num_rows * out_features * out_dtype.itemsize
        raw = torch.full((2 * margin + size,), 0xA5, dtype=torch.uint8)
        out = raw[margin : margin + size].view(out_dtype)
        out.fill_(torch.nan)
        self.linear(
            *(x.data_ptr(), x.stride(0), num_rows, weight.data_ptr()),
            *(0 if given is None else given.data_ptr() for given in (bias, residual)),
            *(out.data_ptr(), out_features, weight.shape[1], ACTIVATIONS[activation]),
            *(out_dtype == torch.float32, 0, *tile),
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
    command = [COMPILER, *flags, f"-I{sources}", f"-I{HERE}", HERE / "emulated_linear.cpp", "-o", library]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return Emulation(library)

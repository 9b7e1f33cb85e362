"""What stands in for the CUDA extension in tests without a GPU."""

from llama_fast.ops import cuda_extension
from llama_fast.ops.cuda_extension import INTERFACE
from tests.cuda_kernels import emulation


def forget():
    """The module is looked for anew from here on."""
    for cached in (cuda_extension.extension, cuda_extension._in_use):
        cached.cache_clear()


class Module:
    """In place of llama_fast._cuda."""

    interface = INTERFACE
    source_hash = "abc"

    def __init__(self, architectures=(80, 90, 100), problem=None):
        self.architectures, self.problem, self.loads, self.calls = list(architectures), problem, 0, []

    def load(self):
        self.loads += 1
        if self.problem:
            raise RuntimeError(self.problem)

    def int4_linear(self, *args):
        self.calls.append(args)
        if self.problem:
            raise RuntimeError(self.problem)


class Emulated(Module):
    """The kernel's own source on CPU tensors."""

    def int4_linear(self, *args):
        self.calls.append(args)
        emulation.emulation().int4_linear(*args)

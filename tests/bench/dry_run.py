"""Runs a GPU bench without a GPU: kernels in Triton's interpreter, times made up.

TRITON_INTERPRET=1 python -m tests.bench.dry_run bench_kernels --smoke
"""

import importlib
import sys
from pathlib import Path

import torch

from tests.kernels.interpreter import exact_dot, patch_bf16

BENCH = Path(__file__).resolve().parents[2] / "bench"


class PretendedGpu:
    """In the place of gpu_timing.Gpu: calls everything once a set, and says that it took 2 us."""

    device = torch.device("cpu")
    name = "pretended"
    l2_bytes = 0
    bandwidth, flops, launch_us = 3e12, 8e14, 1.0

    def time(self, function, sets):
        from timing import Summary

        for arguments in sets:
            function(*arguments)
        return Summary(2.0, 1.0, 3.0)

    def release(self):
        pass


def whole_numbers(shape, **options):
    """In the place of torch.randn: sums of their products are exact, so that no tile can give other bits."""
    return torch.randint(-2, 3, shape).to(options["dtype"])


def main():
    patch_bf16()
    sys.path.insert(0, str(BENCH))
    bench = importlib.import_module(sys.argv[1])
    if sys.argv[1] == "tune":
        torch.randn = whole_numbers
    with exact_dot():
        return bench.main(sys.argv[2:], gpu=PretendedGpu())


if __name__ == "__main__":
    sys.exit(main())

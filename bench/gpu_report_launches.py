"""Launches every kernel once on small shapes: what gpu_report.py runs under compute-sanitizer."""

from __future__ import annotations

import sys

import torch
from gpu_report_extension import launch_extension
from kernel_cases import KERNELS, cases

from llama_fast.engine.decode_rows import DecodeRows
from llama_fast.kernels.advance import advance


def launch_each() -> int:
    """Every kernel once on small shapes, with rows on both sides of a tile."""
    device = torch.device("cuda")
    with torch.no_grad():
        for case in cases(["smoke"], list(KERNELS), [1, 3, 17], [40], [300]):
            torch.manual_seed(0)
            setup = case.build(device, 0)
            setup.ours(*setup.sets[0])
            torch.cuda.synchronize()
            print(case.name)
        for counted in (False, True):
            _advance(device, counted)
        torch.cuda.synchronize()
        print("advance")
        launch_extension(device)
    return 0


def _advance(device: torch.device, counted: bool) -> None:
    """Three rows of which one ends, by the first rows and by indices."""
    rows = DecodeRows(3, 2, 100, 7, device)
    rows.done.zero_()
    rows.limits.copy_(torch.arange(len(rows.limits), device=device) + 2)
    tokens = torch.arange(3, device=device)
    advance(tokens, None, rows, counted)
    advance(tokens, tokens.flip(0), rows, counted)


if __name__ == "__main__":
    sys.exit(launch_each())

"""advance in plain PyTorch and native: against the loop in Python, and the arguments that are refused."""

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.ops import cpu, shared
from tests.ops import advance_cases

IMPLEMENTATIONS = pytest.mark.parametrize("ops", [shared, cpu], ids=["torch", "native"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (5, 3), (16, 16), (33, 0), (130, 129)])
def test_rows_as_spelled_out_in_python(ops, num_rows, count, chosen, counted):
    for seed in range(5):
        advance_cases.check(ops.advance, num_rows, count, chosen, counted, seed)


@pytest.mark.parametrize(
    ("tokens", "indices", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), None, "tokens must be contiguous int64 .2. on the CPU; got torch.int32"),
        (torch.zeros(4, dtype=torch.int64)[::2], None, "tokens must be contiguous"),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            "indices must be .* got torch.int64 .3,",
        ),
        (torch.zeros(5, dtype=torch.int64), None, "5 tokens are more than the 4 rows"),
    ],
)
def test_what_the_native_one_refuses(tokens, indices, message):
    rows = advance_cases.make_rows(4, 0)
    with pytest.raises(KernelArgumentError, match=message):
        cpu.advance(tokens, indices, rows, False)

"""The kernel of advance against the loop in Python, and the arguments it refuses."""

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels.advance import advance
from tests.ops import advance_cases


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (5, 3), (16, 16), (33, 0), (130, 129)])
def test_rows_as_spelled_out_in_python(device, num_rows, count, chosen, counted):
    for seed in range(5):
        advance_cases.check(advance, num_rows, count, chosen, counted, seed, device)


@pytest.mark.parametrize(
    ("tokens", "indices", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), None, "tokens is torch.int32; use int64"),
        (torch.zeros(2, 1, dtype=torch.int64), None, r"tokens and indices must be \[n\] and contiguous; got \(2, 1\)"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"got \(2,\), \(3,\)"),
        (torch.zeros(1, dtype=torch.int64).expand(2), None, "contiguous"),
        (torch.zeros(5, dtype=torch.int64), None, "5 tokens are more than the 4 rows"),
    ],
)
def test_what_is_refused(device, tokens, indices, message):
    rows = advance_cases.make_rows(4, 0, device)
    before = {name: getattr(rows, name).clone() for name in advance_cases.FIELDS}
    with pytest.raises(KernelArgumentError, match=message):
        advance(tokens.to(device), None if indices is None else indices.to(device), rows, False)
    assert all(torch.equal(getattr(rows, name), value) for name, value in before.items())

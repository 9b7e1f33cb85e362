"""advance in plain PyTorch, which every backend but the GPU's exports."""

import pytest

from llama_fast.ops.shared import advance
from tests.ops import advance_cases


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize(("num_rows", "count"), [(1, 1), (5, 3), (16, 16), (33, 0), (130, 129)])
def test_rows_as_spelled_out_in_python(num_rows, count, chosen, counted):
    for seed in range(5):
        advance_cases.check(advance, num_rows, count, chosen, counted, seed)

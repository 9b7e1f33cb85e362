"""A row's bits must not depend on its company."""

import pytest
import torch
import torch.nn.functional as F

from llama_fast.ops.rows import ROW_BLOCK, elementwise, in_row_blocks


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


# GELU is cut into threads' slices sooner than the others.
FUNCTIONS = [torch.exp, torch.log1p, torch.cos, torch.tanh, F.silu, F.gelu, gelu_tanh]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("width", [1, 7, 33, 64, 172, 2048, 40000])
def test_elementwise_row_alone_equals_row_in_company(fn, width):
    torch.manual_seed(width)
    rows = torch.rand(19, width) * 300  # beyond 125 vector cosines take another path for a whole register
    together = elementwise(fn, rows)
    for index in (0, 1, 18):
        assert torch.equal(together[index], elementwise(fn, rows[index : index + 1])[0])
    # Another thread count must not move a boundary either.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, elementwise(fn, rows))
    finally:
        torch.set_num_threads(threads)


def test_elementwise_matches_plain_torch():
    x = torch.randn(5, 3, 77)
    torch.testing.assert_close(elementwise(torch.exp, x), torch.exp(x))
    assert elementwise(torch.exp, x[:0]).shape == (0, 3, 77)


def test_elementwise_is_differentiable():
    x = torch.randn(4, 9, requires_grad=True)
    elementwise(F.silu, x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_negative_control_plain_elementwise_depends_on_the_row():
    """What `elementwise` is for: some width shows that a plain call is not row-invariant (43 did)."""
    torch.manual_seed(0)

    def varies(width: int) -> bool:
        row = torch.randn(1, width) * 2
        return any(not torch.equal(F.silu(row.repeat(41, 1))[i], F.silu(row)[0]) for i in range(41))

    if not any(varies(width) for width in range(1, 128)):
        pytest.skip("this CPU's elementwise kernels do not depend on the row")


@pytest.mark.parametrize("num_rows", [0, 1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 3 * ROW_BLOCK])
def test_in_row_blocks_shapes(num_rows):
    x = torch.randn(num_rows, 5)
    seen = []

    def double(block):
        seen.append(block.shape)
        return torch.cat([block, block], dim=1)

    assert torch.equal(in_row_blocks(double, x), torch.cat([x, x], dim=1))
    assert set(seen) == {(ROW_BLOCK, 5)}

"""The log_probs kernels against their plain-PyTorch twin: values, ranks, ids, bits, layouts, refusals."""

import random

import pytest
import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import log_probs as module
from llama_fast.kernels import probability
from llama_fast.kernels.log_probs import log_probs
from llama_fast.ops import reference_sample
from tests.kernels.accuracy import DTYPES, same_bits, ulp
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_sample import NoHostReads, assert_batch_invariant, draw

CHUNK = probability.CHUNK
VOCABS = [1, 2, 3, 31, 33, 111, 127, 128, 509, 1021, CHUNK - 1, CHUNK, CHUNK + 1, 4099]
VALUES = ["random", "flat", "peaked", "ties", "equal", "forbidden", "shifted"]
KERNELS = ["_best_kernel", "_sums_kernel", "_top_kernel"]


def cases(count):
    """`count` different (rows, vocab_size, dtype, num_top, values), the same in every run."""
    choose, chosen = random.Random(2), {}
    for index, vocab_size in enumerate(VOCABS * len(DTYPES)):
        dtype, values = DTYPES[index // len(VOCABS)], VALUES[index % len(VALUES)]
        chosen[(1 + index % 3, vocab_size, dtype, (0, 1, 5, 20)[index % 4], values)] = None
    while len(chosen) < count:
        vocab_size = choose.choice(VOCABS) if choose.random() < 0.5 else choose.randint(1, 3000)
        options = (choose.choice(DTYPES), choose.choice((0, 1, 2, 7, 20)), choose.choice(VALUES))
        chosen[(choose.randint(1, 3), vocab_size, *options)] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


def run(logits, token_ids, num_top, device):
    results = log_probs(logits.to(device), token_ids.to(device), num_top)
    assert [result.dtype for result in results] == [torch.float32, torch.int64, torch.float32, torch.int64]
    assert all(result.device.type == device.type for result in results)
    return [result.cpu() for result in results]


def assert_as_twin(got, logits, token_ids, num_top):
    """Ranks and ids are the twin's; values within the bound of the twin's own test."""
    expected = reference_sample.log_probs(logits, token_ids, num_top)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[3], expected[3])
    exact = logits.double().log_softmax(-1)
    for values, twin, ids in ((got[0], expected[0], token_ids[:, None]), (got[2], expected[2], expected[3])):
        assert values.shape == twin.shape
        assert torch.equal(values.isnan(), twin.isnan()) and torch.equal(values.isinf(), twin.isinf())
        picked = exact.gather(1, ids.clamp(min=0)).view_as(values)
        # Subtracting the maximum, exp, the sum and the result: each within two units in the last place.
        error = (values - picked).abs()[twin.isfinite()]
        assert (error <= 2.0**-21 * (1 + picked.abs()[twin.isfinite()])).all()


def test_results_are_those_of_the_twin(device, case):
    rows, vocab_size, dtype, num_top, values = case
    logits = draw(rows, vocab_size, dtype, values)
    token_ids = torch.randint(0, vocab_size, (rows,))
    assert_as_twin(run(logits, token_ids, num_top, device), logits, token_ids, num_top)


@pytest.mark.parametrize("vocab_size", [8191, 128_256])
def test_model_vocabularies(device, vocab_size):
    logits, token_ids = draw(1, vocab_size, torch.float32, "random"), torch.tensor([vocab_size - 1])
    assert_as_twin(run(logits, token_ids, 20, device), logits, token_ids, 20)


@pytest.mark.parametrize("num_top", [255, 256, 257, 300])
def test_as_many_as_the_vocabulary_has(device, num_top):
    logits, token_ids = draw(2, 256, torch.float32, "ties"), torch.tensor([0, 255])
    got = run(logits, token_ids, num_top, device)
    assert got[2].shape == (2, min(num_top, 256))
    assert_as_twin(got, logits, token_ids, num_top)


def test_values_are_as_accurate_as_the_twin(device):
    """The worst error over 4,096 values is at most twice the twin's, plus an ulp."""
    num_top, worst, errors = 256, 0.0, []
    for scale in (0.5, 2.0, 4.0, 10.0):
        logits, token_ids = scale * torch.randn(4, 600), torch.randint(0, 600, (4,))
        exact = logits.double().log_softmax(-1)
        _, _, values, ids = run(logits, token_ids, num_top, device)
        twin = reference_sample.log_probs(logits, token_ids, num_top)[2]
        picked = exact.gather(1, ids)
        worst = max(worst, (twin - picked).abs().max().item())
        errors.append(((values - picked).abs() - ulp(picked, torch.float32)).flatten())
    assert torch.cat(errors).numel() >= 4096
    assert torch.cat(errors).max() <= 2 * worst


def test_equal_logits_rank_by_id(device):
    logits, token_ids = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]).repeat(5, 1), torch.arange(5)
    _, ranks, _, top_ids = run(logits, token_ids, 4, device)
    assert ranks.tolist() == [3, 1, 4, 2, 5]
    assert top_ids[0].tolist() == [1, 3, 0, 2]


def test_logits_that_are_equal_only_after_subtracting_the_maximum(device):
    logits, token_ids = torch.tensor([[1.0, 2.0, 1e9, 0.0]]).repeat(2, 1), torch.tensor([1, 3])
    got = run(logits, token_ids, 4, device)
    assert got[3][0].tolist() == [2, 0, 1, 3] and got[1].tolist() == [3, 4]
    assert_as_twin(got, logits, token_ids, 4)


def test_forbidden_tokens(device):
    logits, token_ids = torch.tensor([[0.0, -torch.inf, -torch.inf, -0.0]]).repeat(2, 1), torch.tensor([2, 3])
    got = run(logits, token_ids, 4, device)
    assert got[0].tolist()[0] == -torch.inf and got[1].tolist() == [4, 2] and got[3][0].tolist() == [0, 3, 1, 2]
    assert_as_twin(got, logits, token_ids, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [50, CHUNK + 5])
def test_rows_without_a_finite_maximum_stop_no_other(device, dtype, vocab_size):
    logits, token_ids = draw(5, vocab_size, dtype, "random"), torch.arange(5)
    good = run(logits, token_ids, 3, device)
    broken = logits.clone()
    broken[1, 40] = torch.nan
    broken[2, -1] = torch.inf
    broken[4] = -torch.inf
    got = run(broken, token_ids, 3, device)
    for result, healthy in zip(got, good, strict=True):
        assert same_bits(result[[0, 3]], healthy[[0, 3]])
    chosen, ranks, top_values, top_ids = (result[[1, 2, 4]] for result in got)
    assert chosen.isnan().all() and top_values.isnan().all()
    assert ranks.tolist() == [0] * 3 and top_ids.tolist() == [[-1] * 3] * 3


def test_token_ids_outside_the_vocabulary_are_not_read(device):
    logits = torch.randn(3, 33)
    chosen, ranks, _, top_ids = run(logits, torch.tensor([-1, 33, 5]), 2, device)
    assert chosen.isnan().tolist() == [True, True, False] and ranks.tolist()[:2] == [0, 0] and ranks[2] > 0
    assert (top_ids >= 0).all()


@pytest.mark.parametrize("vocab_size", [1, 2, 333, 4097])
def test_one_answer_does_not_depend_on_the_batch(device, vocab_size):
    num_rows = 7 if INTERPRETED else 17
    logits, token_ids = 4 * torch.randn(num_rows, vocab_size), torch.randint(0, vocab_size, (num_rows,))
    assert_batch_invariant(lambda rows: run(logits[rows], token_ids[rows], 5, device), num_rows)


def test_one_answer_negative_control_sum_over_the_flat_batch(device):
    """A prefix sum over the packed batch in place of one sum a row must fail the test above."""
    logits = 4 * torch.randn(7, 4097)

    def flat(rows):
        ends = logits[rows].to(device).exp().flatten().cumsum(0)[4096::4097].cpu()
        return (torch.diff(ends, prepend=torch.zeros(1)).log(),)

    with pytest.raises(AssertionError):
        assert_batch_invariant(flat, 7)


@pytest.mark.parametrize(("dtype", "vocab_size"), [*((dtype, 33) for dtype in DTYPES), (torch.bfloat16, CHUNK + 1)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, vocab_size):
    logits = draw(2, vocab_size, dtype, "random").to(device)
    token_ids = torch.tensor([0, vocab_size - 1], device=device)
    expected = log_probs(logits, token_ids, 5)
    padded = torch.cat((logits, torch.full_like(logits[:, :3], torch.nan)), dim=1)[:, :vocab_size]
    offset = torch.cat((logits.new_full((1,), torch.nan), logits.flatten()))[1:].view(2, vocab_size)
    for same in (padded, offset, logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2]):
        assert all(map(same_bits, log_probs(same, token_ids, 5), expected))
    assert all(map(same_bits, log_probs(logits, token_ids.repeat_interleave(2)[::2], 5), expected))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab_size", [1, 33, CHUNK + 1])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, rows, vocab_size):
    logits, token_ids = torch.randn(rows, vocab_size, device=device), torch.zeros(rows, dtype=torch.int64).to(device)
    expected = log_probs(logits, token_ids, 5)
    with guarded():
        got = log_probs(logits, token_ids, 5)
    assert all(map(same_bits, got, expected))
    assert not got[0].isnan().any() and not got[2].isnan().any()


def test_F08_rows_beyond_2_31_elements(device, huge):
    vocab_size, stride = 33, 2**30 + 8
    logits, token_ids = torch.randn(3, vocab_size).to(device), torch.arange(3, device=device)
    far = huge(2 * stride + vocab_size, torch.float32).as_strided((3, vocab_size), (stride, 1))
    far.copy_(logits)
    assert all(map(same_bits, log_probs(far, token_ids, 5), log_probs(logits, token_ids, 5)))


def test_F06_nothing_to_do_launches_nothing(device, launches):
    grids = [launches(module, name) for name in KERNELS]
    got = log_probs(torch.empty(0, 33, device=device), torch.empty(0, dtype=torch.int64, device=device), 5)
    assert [tuple(t.shape) for t in got] == [(0,), (0,), (0, 5), (0, 5)]
    assert grids == [[]] * 3


@pytest.mark.parametrize(("rows", "vocab_size", "programs"), [(1, 1, 1), (3, CHUNK, 3), (3, CHUNK + 1, 6)])
def test_three_launches(device, launches, rows, vocab_size, programs):
    grids = [launches(module, name) for name in KERNELS]
    run(torch.zeros(rows, vocab_size), torch.zeros(rows, dtype=torch.int64), 2, device)
    assert grids == [[(programs,)], [(programs,)], [(rows,)]]


def test_C8_nothing_is_read_on_the_host(device):
    logits, token_ids = torch.randn(3, 333, device=device), torch.arange(3, device=device)
    with NoHostReads():
        log_probs(logits, token_ids, 3)
    with pytest.raises(AssertionError, match="reads on the host"), NoHostReads():
        reference_sample.log_probs(logits, token_ids, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_F01_dtypes(device, dtype):
    with pytest.raises(KernelArgumentError, match=f"log_probs: logits must be float16.*; got {dtype}"):
        log_probs(torch.zeros(2, 3, dtype=dtype, device=device), torch.zeros(2, dtype=torch.int64, device=device), 1)
    if dtype != torch.int64:
        with pytest.raises(KernelArgumentError, match=f"token_ids is {dtype}; use int64"):
            log_probs(torch.zeros(2, 3, device=device), torch.zeros(2, dtype=dtype, device=device), 1)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 0), (1, 2**20 + 1)])
def test_F02_shapes(device, shape):
    logits = torch.zeros((1,) * len(shape), device=device).expand(shape)
    with pytest.raises(KernelArgumentError, match=r"\[rows, vocab_size\] with 1 to 1048576 tokens"):
        log_probs(logits, torch.zeros(2, dtype=torch.int64, device=device), 1)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
def test_F02_shapes_of_token_ids(device, shape):
    with pytest.raises(KernelArgumentError, match=r"token_ids must have shape \(2,\); got"):
        log_probs(torch.zeros(2, 3, device=device), torch.zeros(shape, dtype=torch.int64, device=device), 1)


def test_F03_devices(device):
    token_ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelArgumentError, match="logits is on meta; the kernel takes .*backend='reference'"):
        log_probs(torch.zeros(2, 5, device="meta"), token_ids, 1)
    with pytest.raises(KernelArgumentError, match="token_ids is on meta and logits on"):
        log_probs(torch.zeros(2, 5, device=device), token_ids.to("meta"), 1)


def test_F03_gradients(device):
    logits, token_ids = (
        torch.zeros(2, 5, device=device, requires_grad=True),
        torch.zeros(2, dtype=torch.int64).to(device),
    )
    with pytest.raises(KernelArgumentError, match="logits requires grad and kernels have no backward"):
        log_probs(logits, token_ids, 1)


def test_negative_num_top(device):
    with pytest.raises(KernelArgumentError, match="log_probs: num_top=-1 is negative"):
        log_probs(torch.zeros(2, 5, device=device), torch.zeros(2, dtype=torch.int64, device=device), -1)

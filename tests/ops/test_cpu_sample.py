"""The native sample and log_probs against their plain-PyTorch twins: tokens, survivors, ties, bits, layouts, memory."""

import dataclasses
import random

import pytest
import torch

from llama_fast.ops import reference_sample
from llama_fast.ops.cpu import log_probs, sample
from llama_fast.ops.reference_sample import SamplingBatch, filter_row, process_logits
from tests.kernels import test_log_probs as log_probs_tests
from tests.kernels import test_sample as sample_tests
from tests.kernels.accuracy import DTYPES, same_bits, ulp
from tests.kernels.test_sample import EDGES, VALUES, draw
from tests.ops.cpu_cases import offset
from tests.ops.test_reference_sample import assert_chi_square, batch_of, mixed_batch, rows_of

pytestmark = pytest.mark.usefixtures("instruction_set", "uninitialised_memory_is_nan")

VOCABS = [1, 2, 3, 7, 8, 9, 31, 33, 63, 64, 65, 100, 127, 129, 333, 1000]


def pytest_generate_tests(metafunc):
    count = 1500 if metafunc.config.getoption("--full", default=False) else 150
    for name, module in (("sample_case", sample_tests), ("log_probs_case", log_probs_tests)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, module.cases(count), ids=str)


@pytest.fixture(scope="module")
def near_ties():
    """Rows whose token differed from the twin's and was excused; hardly any may."""
    rows = []
    yield rows
    # Two noisy scores are within 1e-5 in one of 100,000 draws; a few thousand rows are drawn here.
    assert len(rows) <= 2, rows


def assert_as_twin(logits, batch, near_ties):
    sample_tests.assert_as_twin(sample(logits, batch), logits, batch, near_ties)


# --- sample -----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_twin(near_ties, sample_case):
    rows, vocab_size, dtype, name, values = sample_case
    logits = draw(rows, vocab_size, dtype, values)
    batch = sample_tests.featured(rows, vocab_size, name, random.Random(str(sample_case)))
    assert_as_twin(logits, batch, near_ties)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_different_rows_in_one_batch(near_ties, dtype):
    logits, batch = mixed_batch(200, 333)
    assert_as_twin(logits.to(dtype), batch, near_ties)


@pytest.mark.parametrize(("vocab_size", "name"), [(128_256, "everything"), (262_144, "top-k, top-p")])
def test_model_vocabularies(near_ties, vocab_size, name):
    logits = draw(1, vocab_size, torch.float32, "random")
    assert_as_twin(logits, sample_tests.featured(1, vocab_size, name, random.Random(0)), near_ties)


def test_the_largest_vocabulary(near_ties):
    logits = torch.zeros(1, reference_sample.MAX_VOCAB_SIZE)
    for batch in (batch_of(1, top_p=0.5), batch_of(1, top_k=9, temperature=0.0)):
        assert_as_twin(logits, batch, near_ties)


NUM_DRAWS = 3000


def drawn_tokens(logits, **parameters):
    """The tokens that come up in NUM_DRAWS draws from one row, as far as they are at all likely."""
    rows = logits.expand(NUM_DRAWS, -1)
    return sample(rows, batch_of(NUM_DRAWS, **parameters, seeds=range(NUM_DRAWS))).unique()


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("vocab_size", [33, 100])
def test_survivors_are_exactly_those_of_the_twin(values, vocab_size):
    """At temperature 30 the tokens are about equally likely: all that survive are drawn, and no others."""
    logits = draw(1, vocab_size, torch.float32, values)
    for top_k, top_p in EDGES:
        tokens = drawn_tokens(logits, temperature=30.0, top_k=top_k, top_p=top_p)
        x = (logits[0] - logits.max()) / 30
        distance = (-x).view(torch.int32).bitwise_and(0x7FFFFFFF)
        threshold = distance[tokens].max()
        assert torch.equal(tokens, (distance <= threshold).nonzero()[:, 0]), (top_k, top_p)
        batch = batch_of(1, temperature=30.0, top_k=top_k, top_p=top_p)
        sample_tests.assert_survivors(logits, batch, threshold[None])


def test_control_another_survivor_is_noticed():
    logits = draw(1, 33, torch.float32, "random")
    x = (logits[0] - logits.max()) / 30
    distance = (-x).view(torch.int32).bitwise_and(0x7FFFFFFF)
    for top_k, top_p in ((6, 1.0), (0, 0.5)):
        threshold = distance[drawn_tokens(logits, temperature=30.0, top_k=top_k, top_p=top_p)].max()
        one_more = distance[distance > threshold].min()
        batch = batch_of(1, temperature=30.0, top_k=top_k, top_p=top_p)
        for wrong in (one_more, threshold - 1):
            with pytest.raises(AssertionError):
                sample_tests.assert_survivors(logits, batch, wrong[None])


@pytest.mark.parametrize("min_p", [1e-3, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("values", VALUES)
def test_min_p_keeps_what_the_twin_keeps(values, min_p):
    logits = draw(1, 33, torch.float32, values)
    for top_k, top_p in ((0, 1.0), (20, 0.9)):
        parameters = (torch.tensor(30.0), top_k, torch.tensor(top_p), torch.tensor(min_p))
        expected, x = filter_row(logits[0], *parameters)
        edge = (x.double().exp() - min_p).abs().min()
        assert edge > 2.0**-22 or min_p == 1.0, "an edge that rounding of exp cannot tell: choose other inputs"
        tokens = drawn_tokens(logits, temperature=30.0, top_k=top_k, top_p=top_p, min_p=min_p)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 5), (4, 5), (5, 5), (6, 6), (7, 7), (8, 7), (0, 7), (-1, 7)])
def test_ties_are_kept_together(top_k, kept):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 2.0, -torch.inf]])
    assert len(drawn_tokens(logits, temperature=5.0, top_k=top_k)) == kept


def test_top_p_at_an_exact_mass():
    """Half of the mass each, and tokens so unlikely that they have none: a share has an exact edge."""
    halves = torch.tensor([[-90.0, 0.0, -90.0, 0.0, -95.0]])
    for top_p in (0.0, 1e-50, 0.5, 0.500001, 1 - 2.0**-24):
        assert drawn_tokens(halves, top_p=top_p).tolist() == [1, 3]  # ties stay together
    one = torch.tensor([[-90.0, 0.0, -90.0]])
    assert drawn_tokens(one, top_p=1 - 2.0**-24).tolist() == [1]
    # Above another of a third of its mass: 3/4 and 1/4, the edge moved by less than exp's rounding.
    quarter = torch.tensor([[0.0, -1.0986123]])
    assert drawn_tokens(quarter, top_p=0.7499).tolist() == [0] and drawn_tokens(quarter, top_p=0.7501).tolist() == [
        0,
        1,
    ]


def test_top_p_works_on_what_top_k_left():
    logits = torch.tensor(
        [[4.0, 3.0, 3.5, 2.0]]
    ).log()  # p = 0.32, 0.24, 0.28, 0.16; of the first three 0.38, 0.29, 0.33
    assert drawn_tokens(logits, top_p=0.7).tolist() == [0, 1, 2]
    assert drawn_tokens(logits, top_k=3, top_p=0.7).tolist() == [0, 2]


@pytest.mark.parametrize("vocab_size", [2, 7, 8, 9, 33, 32_000])
def test_G9_greedy_ties_go_to_the_lowest_id(vocab_size):
    logits = torch.zeros(4, vocab_size)
    logits[0, ::2] = -0.0  # equal to 0.0
    logits[1, [vocab_size // 2, vocab_size - 1]] = 1.0
    logits[2, vocab_size - 1] = 1.0
    logits[3] = -7.0
    batch = batch_of(4, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)  # filters do nothing to greedy
    assert sample(logits, batch).tolist() == [0, vocab_size // 2, vocab_size - 1, 0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_low_temperature_is_greedy_and_splits_ties(scale):
    logits = scale * torch.tensor([[0.5, 1.0, -1.0, 1.0]]).repeat(30, 1)
    assert set(sample(logits, batch_of(30, temperature=1e-4, seeds=range(30))).tolist()) == {1, 3}


def test_huge_logits(near_ties):
    logits = torch.tensor([[1e4, -1e4, -torch.inf], [-1e4, -1e4, -torch.inf], [3e38, -3e38, 0.0]])
    assert_as_twin(logits, batch_of(3, top_p=0.99, min_p=0.01), near_ties)
    assert_as_twin(logits, batch_of(3, top_k=2, top_p=0.99, temperature=1e-45), near_ties)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [51, 64, 333])
def test_F12_rows_without_a_finite_maximum_stop_no_other(dtype, vocab_size):
    logits, batch = mixed_batch(8, vocab_size)
    batch = dataclasses.replace(batch, prompt_mask=None, output_counts=None, bias=None)
    logits = logits.to(dtype)
    good, broken = sample(logits, batch), logits.clone()
    broken[1, 50], broken[3, 7], broken[4, -1], broken[6] = torch.nan, torch.inf, -torch.nan, -torch.inf
    healthy, broken_rows = [0, 2, 5, 7], [1, 3, 4, 6]
    tokens = sample(broken, batch)
    assert torch.equal(tokens[healthy], good[healthy])
    assert (tokens == -1).nonzero()[:, 0].tolist() == broken_rows
    for temperature in (0.0, 1.0):
        forced = dataclasses.replace(batch, temperature=torch.full((8,), temperature))
        assert sample(broken[broken_rows], rows_of(forced, broken_rows)).tolist() == [-1] * 4


def test_F12_one_value_that_is_not_finite_at_every_place():
    for vocab_size in (1, 7, 16, 33):
        logits = torch.randn(1, vocab_size).repeat(vocab_size, 1)
        places = torch.arange(vocab_size)
        for value in (torch.nan, torch.inf):
            broken = logits.clone()
            broken[places, places] = value
            for temperature in (0.0, 1.0):
                assert sample(broken, batch_of(vocab_size, temperature=temperature)).tolist() == [-1] * vocab_size
        if vocab_size > 1:
            forbidden = logits.clone()
            forbidden[places, places] = -torch.inf
            assert torch.equal(sample(forbidden, batch_of(vocab_size, temperature=0.0)), forbidden.argmax(-1))


def test_bias_that_forbids_everything_samples_nothing():
    forbidden = torch.tensor([[-torch.inf] * 3, [-torch.inf, 0.0, -torch.inf], [torch.inf, -torch.inf, 0.0]])
    logits = torch.tensor([[0.0] * 3, [0.0] * 3, [-torch.inf, 0.0, 0.0]])  # -inf + inf is NaN
    assert sample(logits, batch_of(3, bias=forbidden)).tolist() == [-1, 1, -1]


@pytest.mark.parametrize("fields", [("prompt_mask",), ("output_counts",), ("bias",), ("prompt_mask", "bias")])
def test_some_tables_are_missing(near_ties, fields):
    logits, batch = mixed_batch(6, 333)
    missing = {name: None for name in ("prompt_mask", "output_counts", "bias") if name not in fields}
    assert_as_twin(logits, dataclasses.replace(batch, **missing), near_ties)


def test_penalties_and_bias_are_bitwise_those_of_the_twin():
    """A greedy choice among scores that differ in their last bits sees every one of them."""
    logits, batch = mixed_batch(64, 257)
    batch = dataclasses.replace(batch, temperature=torch.zeros(64))
    scores = process_logits(logits, batch)
    best = scores.argmax(-1)
    # Another token one bit below, then one bit above the best.
    for towards in (-torch.inf, torch.inf):
        bias, other = batch.bias.clone(), (best + 1) % 257
        rows = torch.arange(64)
        bias[rows, other] = 0
        wanted = torch.nextafter(scores[rows, best], torch.tensor(towards))
        bias[rows, other] = wanted - process_logits(logits, dataclasses.replace(batch, bias=bias))[rows, other]
        changed = dataclasses.replace(batch, bias=bias)
        assert torch.equal(sample(logits, changed), process_logits(logits, changed).argmax(-1))


def test_G06_neutral_values_beside_active_rows_change_nothing():
    logits, mixed = mixed_batch(6, 333)
    neutral = batch_of(6, seeds=mixed.seeds, position=mixed.position, sample_index=mixed.sample_index)
    alone = sample(logits, neutral)
    tables = {"prompt_mask": mixed.prompt_mask, "output_counts": mixed.output_counts, "bias": torch.zeros(6, 333)}
    assert torch.equal(sample(logits, dataclasses.replace(neutral, **tables)), alone)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1, -(2**63), -1])
def test_every_bit_of_seed_position_and_sample_index_counts(near_ties, seed):
    """Philox's key and counter: each changed word gives the twin's other draws."""
    logits = torch.zeros(1, 300).repeat(16, 1)
    positions = [0, 3, 2**32 - 1, 2**32 + 3, 2**40 + 7, 2**62, 1, 2] * 2
    batch = batch_of(16, seeds=seed, position=positions, sample_index=[0] * 8 + [2**31 - 1] * 8)
    assert_as_twin(logits, batch, near_ties)
    assert len(set(sample(logits, batch).tolist())) > 8


def test_frequencies_match_the_softmax():
    num_draws = 20_000
    logits = torch.tensor([3.0, 1.5, 0.5, -torch.inf, 0.0, -0.5])
    batch = batch_of(num_draws, temperature=1.25, seeds=range(num_draws))
    counts = torch.bincount(sample(logits.repeat(num_draws, 1), batch), minlength=6).double()
    expected = num_draws * torch.softmax(logits.double() / 1.25, -1)
    assert counts[3] == 0
    assert_chi_square(counts[expected > 0], expected[expected > 0])


@pytest.mark.parametrize("vocab_size", [1, 2, 333, 4097])
def test_one_answer_sample_does_not_depend_on_the_batch(vocab_size):
    logits, batch = mixed_batch(17, vocab_size)
    sample_tests.assert_batch_invariant(lambda rows: (sample(logits[rows], rows_of(batch, rows)),), 17)


def test_one_answer_negative_control_noise_by_batch_row():
    """Keying the noise by batch row, as some engines do, must fail the test above."""
    logits, batch = mixed_batch(5, 333)
    batch = dataclasses.replace(batch, temperature=torch.full((5,), 2.0))

    def by_row(rows):
        keyed = dataclasses.replace(rows_of(batch, rows), sample_index=torch.arange(len(rows), dtype=torch.int32))
        return (sample(logits[rows], keyed),)

    with pytest.raises(AssertionError):
        sample_tests.assert_batch_invariant(by_row, 5)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_one_answer_sample_and_log_probs_with_any_number_of_threads(threads, num_threads):
    logits, batch = mixed_batch(40, 333)
    token_ids = torch.randint(0, 333, (40,))
    expected = sample(logits, batch), *log_probs(logits, token_ids, 5)
    threads(num_threads)
    for _ in range(3):
        assert all(map(same_bits, (sample(logits, batch), *log_probs(logits, token_ids, 5)), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [33, 1000])
def test_F04_F05_strides_and_addresses_change_no_bit(dtype, vocab_size):
    logits, batch = mixed_batch(2, vocab_size)
    logits, token_ids = logits.to(dtype), torch.tensor([0, vocab_size - 1])
    expected = sample(logits, batch), *log_probs(logits, token_ids, 5)
    padded = torch.cat((logits, torch.full_like(logits[:, :3], torch.nan)), dim=1)[:, :vocab_size]
    views = [padded, logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2]]
    for same in (*views, *(offset(logits, elements) for elements in (1, 3, 5))):
        got = sample(same, batch), *log_probs(same, token_ids, 5)
        assert all(map(same_bits, got, expected))
    one = sample(logits[:1].expand(2, -1), batch), *log_probs(logits[:1].expand(2, -1), token_ids, 5)
    assert all(same_bits(mine[:1], theirs[:1]) for mine, theirs in zip(one, expected, strict=True))
    for elements in (1, 3):
        moved = SamplingBatch(**{name: offset(tensor, elements) for name, tensor in vars(batch).items()})
        assert torch.equal(sample(logits, moved), expected[0])
    spread = {name: torch.stack((tensor, tensor), dim=-1)[..., 0] for name, tensor in vars(batch).items()}
    assert torch.equal(sample(logits, SamplingBatch(**spread)), expected[0])
    assert all(map(same_bits, log_probs(logits, token_ids.repeat_interleave(2)[::2], 5), expected[1:]))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab_size", VOCABS)
def test_F07_F13_every_output_is_written_and_nothing_beside(guarded, rows, vocab_size):
    logits, batch = mixed_batch(rows, vocab_size)
    token_ids = torch.randint(0, vocab_size, (rows,))
    inputs = [logits, token_ids, *vars(batch).values()]
    before = [x.clone() for x in inputs]
    expected = sample(logits, batch), *log_probs(logits, token_ids, 5)
    with guarded():
        got = sample(logits, batch), *log_probs(logits, token_ids, 5)
    assert all(map(same_bits, got, expected)) and all(map(same_bits, inputs, before))
    assert ((got[0] >= 0) & (got[0] < vocab_size)).all()
    assert not got[1].isnan().any() and not got[3].isnan().any()
    assert ((got[2] > 0) & (got[2] <= vocab_size)).all()


def test_F08_rows_beyond_2_31_elements(huge):
    vocab_size, stride = 33, 2**30 + 8
    logits, batch = mixed_batch(3, vocab_size)
    far = huge(2 * stride + vocab_size, torch.float32).as_strided((3, vocab_size), (stride, 1))
    far.copy_(logits)
    token_ids = torch.arange(3)
    assert torch.equal(sample(far, batch), sample(logits, batch))
    assert all(map(same_bits, log_probs(far, token_ids, 5), log_probs(logits, token_ids, 5)))


# --- log_probs --------------------------------------------------------------------------------------------------------


def assert_log_probs_as_twin(logits, token_ids, num_top):
    got = log_probs(logits, token_ids, num_top)
    log_probs_tests.assert_as_twin(got, logits, token_ids, num_top)
    return got


def test_log_probs_are_those_of_the_twin(log_probs_case):
    rows, vocab_size, dtype, num_top, values = log_probs_case
    logits = draw(rows, vocab_size, dtype, values)
    assert_log_probs_as_twin(logits, torch.randint(0, vocab_size, (rows,)), num_top)


@pytest.mark.parametrize("vocab_size", [8191, 128_256])
def test_log_probs_of_model_vocabularies(vocab_size):
    assert_log_probs_as_twin(draw(1, vocab_size, torch.float32, "random"), torch.tensor([vocab_size - 1]), 20)


@pytest.mark.parametrize("num_top", [0, 1, 255, 256, 257, 300])
def test_as_many_as_the_vocabulary_has(num_top):
    got = assert_log_probs_as_twin(draw(2, 256, torch.float32, "ties"), torch.tensor([0, 255]), num_top)
    assert got[2].shape == (2, min(num_top, 256))


def test_log_probs_are_as_accurate_as_the_twin():
    """The worst error over 4,096 values is at most twice the twin's, plus an ulp."""
    worst, errors = 0.0, []
    for scale in (0.5, 2.0, 4.0, 10.0):
        logits, token_ids = scale * torch.randn(4, 600), torch.randint(0, 600, (4,))
        exact = logits.double().log_softmax(-1)
        _, _, values, ids = log_probs(logits, token_ids, 256)
        twin, picked = reference_sample.log_probs(logits, token_ids, 256)[2], exact.gather(1, ids)
        worst = max(worst, (twin - picked).abs().max().item())
        errors.append(((values - picked).abs() - ulp(picked, torch.float32)).flatten())
    assert torch.cat(errors).numel() >= 4096
    assert torch.cat(errors).max() <= 2 * worst


def test_equal_logits_rank_by_id():
    logits, token_ids = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]).repeat(5, 1), torch.arange(5)
    _, ranks, _, top_ids = log_probs(logits, token_ids, 4)
    assert ranks.tolist() == [3, 1, 4, 2, 5]
    assert top_ids[0].tolist() == [1, 3, 0, 2]


def test_logits_that_are_equal_only_after_subtracting_the_maximum():
    logits, token_ids = torch.tensor([[1.0, 2.0, 1e9, 0.0]]).repeat(2, 1), torch.tensor([1, 3])
    got = assert_log_probs_as_twin(logits, token_ids, 4)
    assert got[3][0].tolist() == [2, 0, 1, 3] and got[1].tolist() == [3, 4]


def test_forbidden_tokens():
    logits, token_ids = torch.tensor([[0.0, -torch.inf, -torch.inf, -0.0]]).repeat(2, 1), torch.tensor([2, 3])
    got = assert_log_probs_as_twin(logits, token_ids, 4)
    assert got[0].tolist()[0] == -torch.inf and got[1].tolist() == [4, 2] and got[3][0].tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [50, 1029])
def test_F12_log_probs_of_rows_without_a_finite_maximum(dtype, vocab_size):
    logits, token_ids = draw(5, vocab_size, dtype, "random"), torch.arange(5)
    good, broken = log_probs(logits, token_ids, 3), logits.clone()
    broken[1, 40], broken[2, -1], broken[4] = torch.nan, torch.inf, -torch.inf
    got = assert_log_probs_as_twin(broken, token_ids, 3)
    for result, healthy in zip(got, good, strict=True):
        assert same_bits(result[[0, 3]], healthy[[0, 3]])
    chosen, ranks, top_values, top_ids = (result[[1, 2, 4]] for result in got)
    assert chosen.isnan().all() and top_values.isnan().all()
    assert ranks.tolist() == [0] * 3 and top_ids.tolist() == [[-1] * 3] * 3


@pytest.mark.parametrize("vocab_size", [1, 2, 333, 4097])
def test_one_answer_log_probs_do_not_depend_on_the_batch(vocab_size):
    logits, token_ids = 4 * torch.randn(17, vocab_size), torch.randint(0, vocab_size, (17,))
    sample_tests.assert_batch_invariant(lambda rows: log_probs(logits[rows], token_ids[rows], 5), 17)

"""The plain-PyTorch sampler against published vectors, formulas and transformers."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_fast.errors import KernelArgumentError
from llama_fast.ops import reference_sample
from llama_fast.ops.reference_sample import (
    SamplingBatch,
    filter_row,
    finite_rows,
    gumbel_noise,
    log_probs,
    philox,
    process_logits,
    sample,
)

FULL = 0xFFFFFFFF
WORDS = st.lists(st.integers(0, FULL), min_size=6, max_size=6)


def batch_of(num_rows: int, **changes: object) -> SamplingBatch:
    """Neutral parameters at temperature 1, one seed for all rows; a change is a scalar or one value a row."""
    values = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seeds": 1234,
        "sample_index": 0,
        "position": 7,
    }
    dtypes = {"top_k": torch.int32, "seeds": torch.int64, "sample_index": torch.int32, "position": torch.int64}
    for name in values:
        value = torch.as_tensor(changes.pop(name, values[name]), dtype=dtypes.get(name, torch.float32))
        values[name] = value.expand(num_rows).clone()
    return SamplingBatch(**values, **changes)


def rows_of(batch: SamplingBatch, rows: list[int]) -> SamplingBatch:
    return SamplingBatch(**{name: None if t is None else t[rows] for name, t in vars(batch).items()})


def mixed_batch(num_rows: int, vocab_size: int) -> tuple[torch.Tensor, SamplingBatch]:
    """Random logits; greedy and sampled rows with different filters, penalties and bias."""
    generator = torch.Generator().manual_seed(num_rows * vocab_size)
    logits = 4 * torch.randn(num_rows, vocab_size, generator=generator)
    pick = random.Random(vocab_size)
    batch = batch_of(
        num_rows,
        temperature=[pick.choice([0.0, 0.7, 1.0, 1.3]) for _ in range(num_rows)],
        top_k=[pick.choice([0, 0, 5, 40]) for _ in range(num_rows)],
        top_p=[pick.choice([1.0, 1.0, 0.9, 0.5]) for _ in range(num_rows)],
        min_p=[pick.choice([0.0, 0.0, 0.02]) for _ in range(num_rows)],
        repetition_penalty=[pick.choice([1.0, 1.3]) for _ in range(num_rows)],
        frequency_penalty=[pick.choice([0.0, 0.3]) for _ in range(num_rows)],
        presence_penalty=[pick.choice([0.0, -0.4]) for _ in range(num_rows)],
        seeds=[pick.randrange(-(2**63), 2**63) for _ in range(num_rows)],
        sample_index=[pick.randrange(4) for _ in range(num_rows)],
        position=[pick.randrange(2**34) for _ in range(num_rows)],
        prompt_mask=torch.rand(num_rows, vocab_size, generator=generator) < 0.1,
        output_counts=torch.randint(-3, 3, (num_rows, vocab_size), generator=generator, dtype=torch.int32).clamp(min=0),
        bias=torch.randn(num_rows, vocab_size, generator=generator).round(),
    )
    return logits, batch


def survivors(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[int]:
    scalars = (torch.tensor(value, dtype=torch.float32) for value in (temperature, top_p, min_p))
    temperature, top_p, min_p = scalars
    return filter_row(logits, temperature, top_k, top_p, min_p)[0].tolist()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123 1.14, tests/kat_vectors, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    counter, key, expected = ([int(w, 16) for w in text.split()] for text in (counter, key, expected))
    assert philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])[:, 0].tolist() == expected


def philox_in_python(c: list[int], k: list[int]) -> list[int]:
    """The paper's round function on Python's integers, which do not wrap."""
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & FULL, (p0 >> 32) ^ c[3] ^ k[1], p0 & FULL]
        k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
    return c


@settings(max_examples=50, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5))
def test_philox_any_words(columns):
    words = torch.tensor(columns).T
    assert philox(words[:4], words[4:]).T.tolist() == [philox_in_python(c[:4], c[4:]) for c in columns]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 + 9, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 3, 2**32 + 3])
def test_noise_follows_the_documented_layout(seed, position):
    token_ids, sample_index = torch.tensor([0, 1, 31999, 128255]), 2
    signed = seed - 2**64 if seed >= 2**63 else seed
    noise = gumbel_noise(token_ids, torch.tensor(signed), torch.tensor(sample_index), torch.tensor(position))
    for token_id, actual in zip(token_ids.tolist(), noise.tolist(), strict=True):
        counter = [sample_index, position & FULL, position >> 32, token_id]
        word = philox_in_python(counter, [seed & FULL, seed >> 32])[0]
        u = min(max((word >> 1) * 2.0**-31, 2.0**-31), 1 - 2.0**-24)
        u = torch.tensor(u, dtype=torch.float32).item()
        exact = -math.log(-math.log1p(-u))
        # One unit in the last place from each logarithm.
        assert abs(actual - exact) <= 2.0**-22 * (1 + abs(exact))


def test_noise_at_the_ends_of_u(monkeypatch):
    for word, u in [(0, 2.0**-31), (1, 2.0**-31), (2, 2.0**-31), (FULL, 1 - 2.0**-24)]:
        monkeypatch.setattr(reference_sample, "philox", lambda counter, key, word=word: torch.full_like(counter, word))
        noise = gumbel_noise(torch.tensor([5]), torch.tensor(1), torch.tensor(0), torch.tensor(0)).item()
        assert noise == pytest.approx(-math.log(-math.log1p(-u)), rel=2.0**-22)


def test_noise_is_standard_gumbel():
    num_tokens = 100_000
    noise = gumbel_noise(torch.arange(num_tokens), torch.tensor(99), torch.tensor(0), torch.tensor(5)).double()
    cdf = (-(-noise.sort().values).exp()).exp()
    steps = torch.arange(num_tokens + 1, dtype=torch.float64) / num_tokens
    distance = max((cdf - steps[:-1]).abs().max().item(), (cdf - steps[1:]).abs().max().item())
    # Dvoretzky-Kiefer-Wolfowitz: exceeded with probability 2 exp(-2 n d^2) = 1e-9.
    assert distance < math.sqrt(math.log(2e9) / (2 * num_tokens))


def test_noise_of_a_token_does_not_depend_on_the_other_survivors():
    arguments = torch.tensor(5), torch.tensor(1), torch.tensor(9)
    everything = gumbel_noise(torch.arange(70_001), *arguments)
    for token_ids in (torch.tensor([70_000]), torch.arange(0, 70_001, 3), torch.arange(33_000, 70_001)):
        assert torch.equal(gumbel_noise(token_ids, *arguments), everything[token_ids])


@pytest.mark.parametrize("vary", ["seeds", "sample_index", "position"])
def test_frequencies_match_the_softmax(vary):
    num_draws = 1500
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, -torch.inf, 1.5])
    batch = batch_of(num_draws, temperature=1.5, **{vary: range(num_draws)})
    counts = torch.bincount(sample(logits.repeat(num_draws, 1), batch), minlength=8).double()
    expected = num_draws * torch.softmax(logits.double() / 1.5, -1)
    assert counts[6] == 0
    assert_chi_square(counts[expected > 0], expected[expected > 0])


def test_frequencies_match_the_filtered_softmax():
    num_draws = 1500
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.2, 1.5])
    batch = batch_of(num_draws, top_k=6, top_p=0.95, min_p=0.25, seeds=range(num_draws))
    kept = survivors(logits, top_k=6, top_p=0.95, min_p=0.25)
    assert kept == [1, 3, 6, 7]  # exp(0.5 - 2) < 0.25
    counts = torch.bincount(sample(logits.repeat(num_draws, 1), batch), minlength=8).double()
    assert counts[kept].sum() == num_draws
    assert_chi_square(counts[kept], num_draws * torch.softmax(logits[kept].double(), -1))


def assert_chi_square(counts: torch.Tensor, expected: torch.Tensor) -> None:
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    # Laurent and Massart 2000, lemma 1: chi-square exceeds this with probability at most exp(-t).
    t = math.log(1e9)
    assert statistic < degrees + 2 * math.sqrt(degrees * t) + 2 * t
    # The bound must be able to fail: the uniform distribution is far outside.
    uniform = counts.sum() / len(counts)
    assert ((counts - uniform) ** 2 / uniform).sum().item() > 2 * (degrees + 2 * math.sqrt(degrees * t) + 2 * t)


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 1000, 32000, 128256])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 1, 1.0, 0.0),
        (0.7, 40, 1.0, 0.0),
        (1.3, 0, 0.9, 0.0),
        (1.0, 0, 0.001, 0.0),
        (0.6, 50, 0.9, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.9, 50, 0.95, 0.02),
        (1.0, 200_000, 0.99, 1.0),
    ],
)
def test_G10_G11_survivors_are_those_of_transformers(vocab_size, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size + top_k))
    scalars = [torch.tensor(value, dtype=torch.float32) for value in (temperature, top_p, min_p)]
    token_ids, scores = filter_row(logits, scalars[0], top_k, *scalars[1:])

    # In fp64, so that their rounding decides nothing; the same fp32 parameters.
    temperature, top_p, min_p = (scalar.item() for scalar in scalars)
    theirs = TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p:
        theirs = MinPLogitsWarper(min_p)(None, theirs)
    assert token_ids.tolist() == (theirs[0] > -torch.inf).nonzero()[:, 0].tolist()
    expected = theirs[0, token_ids] - theirs.max()
    # A subtraction and a division, each rounded once.
    assert ((scores - expected).abs() <= 2.0**-23 * expected.abs()).all()


def test_G11_ties_are_kept_together():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    assert survivors(logits, top_k=2) == [1, 2, 3, 5]
    assert survivors(logits, top_p=0.5) == [1, 2, 3, 5]  # p(1) = 0.44; one of the ties would be enough
    assert survivors(logits, top_k=3, top_p=0.4) == [1]
    assert survivors(logits, min_p=math.exp(-1)) == [1, 2, 3, 5]
    assert survivors(torch.zeros(4), top_k=1, top_p=0.1, min_p=1.0) == [0, 1, 2, 3]


def test_G11_top_p_works_on_what_top_k_left():
    logits = torch.tensor([4.0, 3.0, 3.5, 2.0]).log()  # p = 0.32, 0.24, 0.28, 0.16; of the first three 0.38, 0.29, 0.33
    assert survivors(logits, top_p=0.7) == [0, 1, 2]
    assert survivors(logits, top_k=3, top_p=0.7) == [0, 2]


@pytest.mark.parametrize("top_p", [1e-6, 1e-50])  # the second is 0 in fp32
def test_G11_at_least_one_token_survives(top_p):
    assert survivors(torch.tensor([0.0, 2.0, 1.0]), top_p=top_p) == [1]


def test_top_k_above_the_number_of_finite_logits():
    assert survivors(torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0]), top_k=3) == [1, 3]


@pytest.mark.parametrize("penalty", [0.5, 0.8, 1.0, 1.3])
def test_G10_repetition_penalty_is_bitwise_that_of_transformers(penalty):
    num_rows, vocab_size = 3, 1001
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(num_rows, vocab_size, generator=generator)
    input_ids = torch.randint(0, vocab_size, (num_rows, 200), generator=generator)  # ids that repeat count once
    prompt_mask = torch.zeros(num_rows, vocab_size, dtype=torch.bool).scatter_(1, input_ids[:, :120], True)
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32)
    counts.scatter_add_(1, input_ids[:, 120:], torch.ones(num_rows, 80, dtype=torch.int32))
    penalty = torch.tensor(penalty).item()  # as fp32
    batch = batch_of(num_rows, repetition_penalty=penalty, prompt_mask=prompt_mask, output_counts=counts)
    assert torch.equal(process_logits(logits, batch), RepetitionPenaltyLogitsProcessor(penalty)(input_ids, logits))
    without_output = dataclasses.replace(batch, output_counts=None)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(input_ids[:, :120], logits)
    assert torch.equal(process_logits(logits, without_output), expected)


def test_penalties_then_bias():
    # Powers of two: every intermediate is exact.
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 0.0, 8.0]])
    batch = batch_of(
        1,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        prompt_mask=torch.tensor([[True, True, False, False, False, False]]),
        output_counts=torch.tensor([[0, 1, 2, 0, 1, 0]], dtype=torch.int32),
        bias=torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, -torch.inf]]),
    )
    expected = [4 / 2, -4 * 2 - 0.5 - 0.25 + 1, 4 / 2 - 1 - 0.25, -4 + 1, 0 - 0.5 - 0.25, -math.inf]
    assert process_logits(logits, batch)[0].tolist() == expected
    assert sample(logits, dataclasses.replace(batch, temperature=torch.zeros(1))).tolist() == [0]


def test_neutral_values_change_no_bit():
    logits, mixed = mixed_batch(5, 333)
    neutral = batch_of(5, prompt_mask=mixed.prompt_mask, output_counts=mixed.output_counts, bias=torch.zeros(5, 333))
    assert torch.equal(process_logits(logits, neutral), logits)
    assert process_logits(logits, batch_of(5)) is logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_process_logits_gives_fp32(dtype):
    assert process_logits(torch.ones(1, 4, dtype=dtype), batch_of(1)).dtype == torch.float32


@pytest.mark.parametrize("vocab_size", [2, 33, 32000, 128256])
def test_G9_greedy_ties_go_to_the_lowest_id(vocab_size):
    logits = torch.zeros(3, vocab_size)
    logits[1, [vocab_size // 2, vocab_size - 1]] = 1.0
    logits[2, vocab_size - 1] = 1.0
    batch = batch_of(3, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)  # filters do nothing to greedy
    assert sample(logits, batch).tolist() == [0, vocab_size // 2, vocab_size - 1]


def assert_batch_invariant(function, num_rows: int) -> None:
    """`function(rows)` gives for every row what it gives alone: batches of 1 to num_rows in random order."""
    shuffle = random.Random(0)
    alone = [function([row]) for row in range(num_rows)]
    for size in range(1, num_rows + 1):
        rows = shuffle.sample(range(num_rows), size)
        for results, *singles in zip(function(rows), *(alone[row] for row in rows), strict=True):
            assert torch.equal(results, torch.cat(singles)), rows


@pytest.mark.parametrize("vocab_size", [1, 2, 4097, 33_001])
def test_one_answer_sample_does_not_depend_on_the_batch(vocab_size):
    logits, batch = mixed_batch(17, vocab_size)

    def run(rows):
        return sample(logits[rows], rows_of(batch, rows)), process_logits(logits[rows], rows_of(batch, rows))

    assert_batch_invariant(run, 17)


def test_one_answer_negative_control_noise_by_batch_row():
    """Keying the noise by batch row, as some engines do, must fail the test above."""
    logits, batch = mixed_batch(17, 4097)

    def run(rows):
        by_row = dataclasses.replace(rows_of(batch, rows), sample_index=torch.arange(len(rows), dtype=torch.int32))
        return (sample(logits[rows], by_row),)

    with pytest.raises(AssertionError):
        assert_batch_invariant(run, 17)


@pytest.mark.parametrize("vocab_size", [1, 2, 4097, 33_001])
def test_one_answer_log_probs_do_not_depend_on_the_batch(vocab_size):
    logits, _ = mixed_batch(17, vocab_size)
    token_ids = torch.randint(0, vocab_size, (17,), generator=torch.Generator().manual_seed(1))
    assert_batch_invariant(lambda rows: log_probs(logits[rows], token_ids[rows], 5), 17)


def test_one_answer_negative_control_sum_over_the_flat_batch():
    """A prefix sum over the packed batch in place of one sum a row must fail the test above."""
    logits, _ = mixed_batch(17, 4097)

    def run(rows):
        ends = logits[rows].exp().flatten().cumsum(0)[4096::4097]
        return (torch.diff(ends, prepend=torch.zeros(1)).log(),)

    with pytest.raises(AssertionError):
        assert_batch_invariant(run, 17)


def test_one_answer_any_number_of_threads():
    logits, batch = mixed_batch(3, 128_256)
    token_ids = torch.tensor([0, 5, 128_255])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((sample(logits, batch), process_logits(logits, batch), *log_probs(logits, token_ids, 9)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_G07_same_seed_twice_in_a_batch():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0)).repeat(40, 1)
    tokens = sample(logits, batch_of(40, seeds=[7, 8] * 20, sample_index=[i // 2 % 10 for i in range(40)]))
    assert torch.equal(tokens[:20], tokens[20:])
    assert len(set(tokens.tolist())) > 5  # sample index and seed both change the draw


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 32_000, 128_256])
def test_any_vocabulary(vocab_size):
    logits, batch = mixed_batch(4, vocab_size)
    tokens = sample(logits, batch)
    assert tokens.dtype == torch.int64
    assert ((tokens >= 0) & (tokens < vocab_size)).all()


def test_no_rows():
    empty = sample(torch.empty(0, 33), batch_of(0))
    assert (empty.shape, empty.dtype) == ((0,), torch.int64)
    assert [tuple(t.shape) for t in log_probs(torch.empty(0, 33), empty, 5)] == [(0,), (0,), (0, 5), (0, 5)]


def test_G06_every_combination_of_features():
    switches = {
        "temperature": (0.0, 0.7),
        "top_k": (0, 3),
        "top_p": (1.0, 0.5),
        "min_p": (0.0, 0.2),
        "repetition_penalty": (1.0, 100.0),
        "frequency_penalty": (0.0, 2.0),
        "presence_penalty": (0.0, -2.0),
    }
    combinations = list(itertools.product(*switches.values()))
    logits, extra = mixed_batch(len(combinations), 33)
    batch = batch_of(
        len(combinations),
        **dict(zip(switches, zip(*combinations, strict=True), strict=True)),
        prompt_mask=extra.prompt_mask,
        output_counts=extra.output_counts,
        bias=extra.bias.masked_fill(extra.bias > 1, -torch.inf),
    )
    tokens = sample(logits, batch)
    assert (tokens >= 0).all()
    assert (batch.bias.gather(1, tokens[:, None]) > -torch.inf).all()
    assert [int(sample(logits[[r]], rows_of(batch, [r]))) for r in range(len(tokens))] == tokens.tolist()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_low_temperature_is_greedy_and_splits_ties(scale):
    logits = scale * torch.tensor([[0.5, 1.0, -1.0, 1.0]]).repeat(50, 1)
    tokens = sample(logits, batch_of(50, temperature=1e-4, seeds=range(50))).tolist()
    assert set(tokens) == {1, 3}


def test_high_temperature_is_uniform():
    logits = torch.tensor([[1.0, -1.0, 0.0, 3.0]]).repeat(800, 1)
    counts = torch.bincount(sample(logits, batch_of(800, temperature=1e4, seeds=range(800))), minlength=4)
    # Hoeffding: off by more than this with probability 2 exp(-2 d^2 / n) = 1e-9.
    assert (counts - 200).abs().max() < math.sqrt(800 * math.log(2e9) / 2)


def test_huge_logits():
    logits = torch.tensor([[1e4, -1e4, -torch.inf], [-1e4, -1e4, -torch.inf], [3e38, -3e38, 0.0]])
    batch = batch_of(3, top_p=0.99, min_p=0.01)
    assert sample(logits, batch)[[0, 2]].tolist() == [0, 0]
    assert sample(logits, batch)[1] in (0, 1)


def test_rows_without_a_finite_maximum_stop_no_other():
    logits, batch = mixed_batch(8, 333)
    good = sample(logits, batch)
    broken = logits.clone()
    broken[1, 50] = torch.nan
    broken[3, 7] = torch.inf
    broken[6] = -torch.inf
    assert finite_rows(broken).tolist() == [True, False, True, False, True, True, False, True]
    for temperature in (batch.temperature, torch.zeros(8), torch.ones(8)):
        tokens = sample(broken, dataclasses.replace(batch, temperature=temperature))
        assert (tokens == -1).tolist() == [False, True, False, True, False, False, True, False]
    assert torch.equal(sample(broken, batch)[[0, 2, 4, 5, 7]], good[[0, 2, 4, 5, 7]])
    assert log_probs(broken, good, 4)[0].isnan().tolist() == (~finite_rows(broken)).tolist()
    chosen, ranks, top_values, top_ids = (t[1] for t in log_probs(broken, good, 4))
    assert (ranks.item(), top_ids.tolist()) == (0, [-1] * 4)
    assert chosen.isnan()
    assert top_values.isnan().all()


def test_bias_that_forbids_everything_samples_nothing():
    forbidden = torch.tensor([[-torch.inf] * 3, [-torch.inf, 0.0, -torch.inf]])
    assert sample(torch.zeros(2, 3), batch_of(2, bias=forbidden)).tolist() == [-1, 1]


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 32_000, 128_256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_log_probs_against_fp64(vocab_size, scale):
    logits = scale * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    token_ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0])
    chosen, ranks, top_values, top_ids = log_probs(logits, token_ids, 20)
    exact = logits.double().log_softmax(-1)
    # Subtracting the maximum, exp (2 units), the sum and the result: each within a unit in the last place.
    bound = 2.0**-21 * (1 + exact.abs())
    picked = exact.gather(1, token_ids[:, None])[:, 0]
    assert ((chosen - picked).abs() <= bound.gather(1, token_ids[:, None])[:, 0]).all()
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_ids, order[:, :20])
    assert ((top_values - exact.gather(1, top_ids)).abs() <= bound.gather(1, top_ids)).all()
    assert ranks.tolist() == [1 + order[row].tolist().index(token_ids[row]) for row in range(4)]


def test_log_probs_rank_equal_logits_by_id():
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]).repeat(5, 1)
    _, ranks, _, top_ids = log_probs(logits, torch.arange(5), 4)
    assert ranks.tolist() == [3, 1, 4, 2, 5]
    assert top_ids[0].tolist() == [1, 3, 0, 2]


def test_log_probs_of_forbidden_and_of_no_top_tokens():
    chosen, ranks, top_values, _ = log_probs(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), 0)
    assert (chosen.item(), ranks.item(), top_values.shape) == (-math.inf, 2, (1, 0))


def test_mass_of_the_largest_vocabulary_does_not_overflow():
    logits = torch.zeros(1, reference_sample.MAX_VOCAB_SIZE)
    chosen, *_ = log_probs(logits, torch.tensor([3]), 1)
    assert chosen.item() == torch.tensor(-20 * math.log(2)).item()
    assert len(survivors(logits[0], top_p=0.5)) == reference_sample.MAX_VOCAB_SIZE  # all tie


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(5), torch.zeros(2, 3, 4), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)],
)
def test_logits_of_a_wrong_kind(logits):
    with pytest.raises(KernelArgumentError, match="logits must be floating point"):
        sample(logits, batch_of(2))
    with pytest.raises(KernelArgumentError, match="logits must be floating point"):
        log_probs(logits, torch.zeros(2, dtype=torch.int64), 1)


def test_vocabulary_above_the_limit():
    too_wide = torch.zeros(1, 1).expand(1, reference_sample.MAX_VOCAB_SIZE + 1)
    with pytest.raises(KernelArgumentError, match="1 to 1048576 tokens"):
        sample(too_wide, batch_of(1))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("temperature", torch.ones(3)), ("seeds", torch.ones(1, dtype=torch.int64)), ("bias", torch.zeros(2, 4))],
)
def test_batch_that_does_not_fit_the_logits(name, tensor):
    with pytest.raises(KernelArgumentError, match=f"{name} must have shape"):
        sample(torch.zeros(2, 5), dataclasses.replace(batch_of(2), **{name: tensor}))

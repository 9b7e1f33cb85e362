"""The sample kernels against their plain-PyTorch twin: tokens, thresholds, noise, bits, layouts, refusals."""

import dataclasses
import math
import random

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.errors import KernelArgumentError
from llama_fast.kernels import probability
from llama_fast.kernels import sample as module
from llama_fast.kernels import thresholds as threshold_module
from llama_fast.kernels.sample import sample
from llama_fast.ops import reference_sample
from llama_fast.ops.reference_sample import SamplingBatch, filter_row, gumbel_noise, process_logits
from tests.kernels.accuracy import DTYPES, same_bits, ulp
from tests.kernels.conftest import INTERPRETED
from tests.ops.test_reference_sample import assert_chi_square, batch_of, mixed_batch, philox_in_python, rows_of

if INTERPRETED:
    from tests.kernels.nested_calls import patch_nested_calls

    patch_nested_calls()

CHUNK = probability.CHUNK
KERNELS = [  # in the order of their launches
    (module, "_scores_kernel"),
    (threshold_module, "_levels_kernel"),
    (threshold_module, "_list_kernel"),
    (threshold_module, "_threshold_kernel"),
    (module, "_draw_kernel"),
    (module, "_token_kernel"),
]
VOCABS = [1, 2, 3, 31, 33, 111, 127, 128, 509, 1021, CHUNK - 1, CHUNK, CHUNK + 1, 4099]
MODEL_VOCABS = [8191, 32_000]
FEATURES = {
    "greedy": {"temperature": [0.0]},
    "temperature": {"temperature": [0.6, 1.0, 1.7]},
    "tiny temperature": {"temperature": [1e-4, 1e-38, 1e-45]},
    "top-k": {"top_k": [1, 2, 5, 40, 1000]},
    "all of top-k": {"top_k": [5000, 2**31 - 1, -1]},
    "top-p": {"top_p": [0.3, 0.9, 0.999]},
    "tiny top-p": {"top_p": [0.0, 1e-6, 1e-50]},
    "min-p": {"min_p": [0.02, 0.3]},
    "whole min-p": {"min_p": [1.0]},
    "top-k, top-p": {"top_k": [3, 50, 400], "top_p": [0.5, 0.95]},
    "repetition": {"repetition_penalty": [0.7, 1.3]},
    "frequency": {"frequency_penalty": [0.4, -0.4]},
    "presence": {"presence_penalty": [1.1, -1.1]},
    "bias": {"bias": [True]},
    "everything": {
        "temperature": [0.5, 1.2],
        "top_k": [7, 100],
        "top_p": [0.6, 0.97],
        "min_p": [0.01],
        "repetition_penalty": [1.2],
        "frequency_penalty": [0.3],
        "presence_penalty": [-0.2],
        "bias": [True],
    },
}
VALUES = ["random", "flat", "peaked", "ties", "equal", "forbidden", "shifted"]


def cases(count):
    """`count` different (rows, vocab_size, dtype, feature, values), the same in every run."""
    choose, chosen = random.Random(0), {}
    # Every feature in every dtype first, every vocabulary and kind of values among them.
    for index, name in enumerate([*FEATURES] * len(DTYPES)):
        dtype, values = DTYPES[index // len(FEATURES)], VALUES[index % len(VALUES)]
        chosen[(1 + index % 3, VOCABS[index % len(VOCABS)], dtype, name, values)] = None
    for vocab_size in MODEL_VOCABS:
        chosen[(1, vocab_size, torch.float32, "everything", "random")] = None
        chosen[(1, vocab_size, torch.bfloat16, "top-k, top-p", "random")] = None
    while len(chosen) < count:
        vocab_size = choose.choice(VOCABS) if choose.random() < 0.6 else choose.randint(1, 3000)
        rows = choose.choice((1, 1, 2))
        chosen[(rows, vocab_size, choose.choice(DTYPES), choose.choice([*FEATURES]), choose.choice(VALUES))] = None
    return list(chosen)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        count = 1500 if metafunc.config.getoption("--full", default=False) else 150
        found = cases(count)
        assert len(found) == count == len(set(found))
        metafunc.parametrize("case", found, ids=str)


def draw(rows, vocab_size, dtype, values):
    scale = {"flat": 0.3, "peaked": 12.0, "equal": 0.0}.get(values, 3.0)
    logits = scale * torch.randn(rows, vocab_size)
    if values == "ties":
        logits = logits.round()
    elif values == "forbidden":
        hidden = torch.rand(rows, vocab_size) < 0.5
        hidden[:, vocab_size // 2] = False
        logits = logits.masked_fill(hidden, -torch.inf)
    elif values == "shifted":
        # Far from zero, so that the difference to the maximum is exact and few values are different.
        logits = logits + 300
    return logits.to(dtype)


def featured(rows, vocab_size, name, choose):
    """A batch whose even rows have the feature, with the tables it needs; the others are neutral."""
    feature, tables, values = dict(FEATURES[name]), {}, {}
    if feature.pop("bias", None):
        bias = torch.randn(rows, vocab_size)
        bias[torch.rand(rows, vocab_size) < 0.1] = -torch.inf
        bias[:, -1] = 1.0
        bias[1::2] = 0.0
        tables["bias"] = bias
    neutral = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    for field, options in feature.items():
        values[field] = [neutral.get(field, 0) if row % 2 else choose.choice(options) for row in range(rows)]
    if any(field.endswith("_penalty") for field in feature):
        tables["prompt_mask"] = torch.rand(rows, vocab_size) < 0.3
        tables["output_counts"] = torch.randint(-3, 4, (rows, vocab_size), dtype=torch.int32).clamp(min=0)
    for field, below in (("seeds", 2**63), ("position", 2**40), ("sample_index", 2**16)):
        values[field] = [choose.randrange(-below if field == "seeds" else 0, below) for _ in range(rows)]
    return batch_of(rows, **values, **tables)


def on(batch, device):
    return SamplingBatch(**{name: None if t is None else t.to(device) for name, t in vars(batch).items()})


def run(logits, batch, device):
    tokens = sample(logits.to(device), on(batch, device))
    assert tokens.dtype == torch.int64 and tokens.device.type == device.type
    return tokens.cpu()


def excused(logits, batch, row, token):
    """Whether the twin's two best noisy scores are nearer than the errors of logarithms allow."""
    parameters = (batch.temperature[row], int(batch.top_k[row]), batch.top_p[row], batch.min_p[row])
    token_ids, x = filter_row(process_logits(logits, batch)[row], *parameters)
    noise = gumbel_noise(token_ids, batch.seeds[row], batch.sample_index[row], batch.position[row])
    place = (token_ids == token).nonzero()
    assert len(place), f"token {token} does not survive the filters"
    noisy = x.double() + noise.double()
    best = noisy.argmax()
    # Each side's noise is within 2^-22 (1 + |g|) (test_noise), and its sum is rounded once.
    bound = sum(2 * 2.0**-22 * (1 + noise[i].abs()) + 2 * 2.0**-24 * noisy[i].abs() for i in (best, place[0, 0]))
    return bool(noisy[best] - noisy[place[0, 0]] <= bound)


@pytest.fixture(scope="module")
def near_ties():
    """Rows whose token differed from the twin's and was excused; hardly any may."""
    rows = []
    yield rows
    # Two noisy scores are within 1e-5 in one of 100,000 draws; a few thousand rows are drawn here.
    assert len(rows) <= 2, rows


def assert_as_twin(tokens, logits, batch, near_ties):
    expected = reference_sample.sample(logits, batch)
    for row in (tokens != expected).nonzero()[:, 0].tolist():
        assert batch.temperature[row] > 0 and tokens[row] >= 0 and expected[row] >= 0, (row, tokens, expected)
        assert excused(logits, batch, row, int(tokens[row])), (row, tokens, expected)
        near_ties.append((row, logits.shape))


def test_tokens_are_those_of_the_twin(device, near_ties, case):
    rows, vocab_size, dtype, name, values = case
    logits = draw(rows, vocab_size, dtype, values)
    batch = featured(rows, vocab_size, name, random.Random(str(case)))
    assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_different_rows_in_one_batch(device, near_ties, dtype):
    logits, batch = mixed_batch(8 if INTERPRETED else 200, 333)
    logits = logits.to(dtype)
    assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


@pytest.mark.parametrize(("vocab_size", "name"), [(128_256, "everything"), (262_144, "top-k, top-p")])
def test_model_vocabularies(device, near_ties, vocab_size, name):
    logits = draw(1, vocab_size, torch.float32, "random")
    batch = featured(1, vocab_size, name, random.Random(0))
    assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


def test_the_largest_vocabulary(device, near_ties, request):
    if INTERPRETED and not request.config.getoption("--full", default=False):
        pytest.skip("half a minute when interpreted: --full")
    logits = torch.zeros(1, reference_sample.MAX_VOCAB_SIZE)
    for batch in (batch_of(1), batch_of(1, top_p=0.5), batch_of(1, top_k=9), batch_of(1, temperature=0.0)):
        assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


@pytest.fixture
def thresholds(monkeypatch):
    """List that gets the thresholds of every call."""
    kernel, seen = module._draw_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                seen.append(args[2].cpu().clone())
                kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(module, "_draw_kernel", Watched())
    return seen


def assert_survivors(logits, batch, threshold):
    """The tokens at least as near as the threshold are those of the twin.

    Around top-p's edge one with a cumulative mass that rounding of exp cannot tell from the target may differ.
    """
    scores = process_logits(logits, batch)
    for row in range(len(logits)):
        temperature, top_k, top_p = batch.temperature[row], int(batch.top_k[row]), batch.top_p[row]
        expected, _ = filter_row(scores[row], temperature, top_k, top_p, torch.zeros(()))
        x = (scores[row] - scores[row].max()) / temperature
        got = (-x).view(torch.int32).bitwise_and(0x7FFFFFFF) <= threshold[row]
        wrong = got.clone()
        wrong[expected] ^= True
        if not wrong.any():
            continue
        assert top_p < 1, (row, top_k)
        weight = x.double().exp()
        if 0 < top_k < len(x):
            weight[x < x.topk(top_k).values[-1]] = 0
        for token in wrong.nonzero()[:, 0]:
            before = weight[x > x[token]].sum()
            # Both exps are within an ulp, 2^-23; truncation loses 2^-42 a token at most.
            slack = 2 * 2.0**-23 * weight.sum() + 2 * len(x) * 2.0**-42
            assert (before - top_p.double() * weight.sum()).abs() <= slack, (row, token)


EDGES = [  # (top_k, top_p)
    (1, 1.0),
    (2, 1.0),
    (50, 1.0),
    (2047, 1.0),
    (3000, 1.0),
    (0, 0.0),
    (0, 0.01),
    (0, 0.5),
    (0, 0.9),
    (0, 0.9999),
    (0, 1 - 2.0**-24),
    (1, 0.5),
    (40, 0.9),
    (40, 0.01),
    (2500, 0.99),
    (10**6, 0.7),
]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("temperature", [0.7, 30.0])
@pytest.mark.parametrize("vocab_size", [33, 4099])
def test_survivors_are_exactly_those_of_the_twin(device, thresholds, values, temperature, vocab_size):
    # Interpreted, a row takes 50 ms: every kind of values has its share of the edges.
    edges = EDGES[VALUES.index(values) % 4 :: 4] if INTERPRETED else EDGES
    logits = draw(1, vocab_size, torch.float32, values).expand(len(edges), -1)
    batch = batch_of(len(edges), temperature=temperature, top_k=[k for k, _ in edges], top_p=[p for _, p in edges])
    run(logits, batch, device)
    assert_survivors(logits, batch, thresholds[0])


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 5), (4, 5), (5, 5), (6, 6), (7, 7)])
def test_ties_are_kept_together(device, thresholds, top_k, kept):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 2.0, -torch.inf]])
    batch = batch_of(1, top_k=top_k)
    run(logits, batch, device)
    assert_survivors(logits, batch, thresholds[0])
    distance = (3 - logits[0]).view(torch.int32)
    assert (distance <= thresholds[0]).sum() == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 2), (0.5000001, 3), (0.25, 1), (0.2500001, 2), (0.75, 3)])
def test_top_p_at_an_exact_mass(device, thresholds, top_p, kept):
    # All equal but one ulp apart: each has a quarter of the mass to within far less than these steps of top_p.
    logits = torch.tensor([[4.0, 4.0 - 2.0**-22, 4.0 - 2.0**-21, 4.0 - 2.0**-20]])
    run(logits, batch_of(1, top_p=top_p), device)
    distance = (4 - logits[0]).view(torch.int32)
    assert (distance <= thresholds[0]).sum() >= kept - 1
    run(logits.round(), batch_of(1, top_p=top_p), device)
    assert thresholds[1] == 0


def test_nothing_is_cut_where_no_filter_asks(device, thresholds):
    run(torch.randn(3, 50), batch_of(3, top_k=[0, 50, 1], top_p=1.0, temperature=[1.0, 1.0, 0.0]), device)
    assert thresholds[0].tolist() == [0x7F7FFFFF] * 3


@pytest.mark.parametrize("vocab_size", [2, 33, CHUNK, CHUNK + 1, 32_000])
def test_G9_greedy_ties_go_to_the_lowest_id(device, vocab_size):
    logits = torch.zeros(4, vocab_size)
    logits[0, ::2] = -0.0  # equal to 0.0
    logits[1, [vocab_size // 2, vocab_size - 1]] = 1.0
    logits[2, vocab_size - 1] = 1.0
    logits[3] = -7.0
    batch = batch_of(4, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)  # filters do nothing to greedy
    assert run(logits, batch, device).tolist() == [0, vocab_size // 2, vocab_size - 1, 0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_low_temperature_is_greedy_and_splits_ties(device, scale):
    logits = scale * torch.tensor([[0.5, 1.0, -1.0, 1.0]]).repeat(30, 1)
    tokens = run(logits, batch_of(30, temperature=1e-4, seeds=range(30)), device).tolist()
    assert set(tokens) == {1, 3}


def test_huge_logits(device, near_ties):
    logits = torch.tensor([[1e4, -1e4, -torch.inf], [-1e4, -1e4, -torch.inf], [3e38, -3e38, 0.0]])
    batch = batch_of(3, top_p=0.99, min_p=0.01)
    assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


@pytest.mark.parametrize(("dtype", "vocab_size"), [*((dtype, 333) for dtype in DTYPES), (torch.float32, CHUNK + 5)])
def test_rows_without_a_finite_maximum_stop_no_other(device, dtype, vocab_size):
    logits, batch = mixed_batch(8, vocab_size)
    batch = dataclasses.replace(batch, prompt_mask=None, output_counts=None, bias=None)
    logits = logits.to(dtype)
    good = run(logits, batch, device)
    broken = logits.clone()
    broken[1, 50] = torch.nan
    broken[3, 7] = torch.inf
    broken[4, -1] = -torch.nan
    broken[6] = -torch.inf
    healthy, broken_rows = [0, 2, 5, 7], [1, 3, 4, 6]
    tokens = run(broken, batch, device)
    assert torch.equal(tokens[healthy], good[healthy])
    assert (tokens == -1).nonzero()[:, 0].tolist() == broken_rows
    for temperature in (0.0, 1.0):
        forced = dataclasses.replace(batch, temperature=torch.full((8,), temperature))
        assert run(broken[broken_rows], rows_of(forced, broken_rows), device).tolist() == [-1] * 4


def test_bias_that_forbids_everything_samples_nothing(device):
    forbidden = torch.tensor([[-torch.inf] * 3, [-torch.inf, 0.0, -torch.inf], [torch.inf, -torch.inf, 0.0]])
    logits = torch.tensor([[0.0] * 3, [0.0] * 3, [-torch.inf, 0.0, 0.0]])  # -inf + inf is NaN
    assert run(logits, batch_of(3, bias=forbidden), device).tolist() == [-1, 1, -1]


@pytest.mark.parametrize("fields", [("prompt_mask",), ("output_counts",), ("bias",), ("prompt_mask", "bias")])
def test_some_tables_are_missing(device, near_ties, fields):
    logits, batch = mixed_batch(6, 333)
    missing = {name: None for name in ("prompt_mask", "output_counts", "bias") if name not in fields}
    batch = dataclasses.replace(batch, **missing)
    assert_as_twin(run(logits, batch, device), logits, batch, near_ties)


def test_scores_are_bitwise_those_of_the_twin(device, monkeypatch):
    logits, batch = mixed_batch(6, CHUNK + 9)
    seen, kernel = [], threshold_module._levels_kernel

    class Watched:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda scores, *args, **kwargs: (seen.append(scores.cpu()), kernel[grid](scores, *args, **kwargs))

    monkeypatch.setattr(threshold_module, "_levels_kernel", Watched())
    run(logits, batch, device)
    assert same_bits(seen[1], process_logits(logits, batch))


def test_G06_neutral_values_beside_active_rows_change_nothing(device):
    logits, mixed = mixed_batch(6, 333)
    neutral = batch_of(6, seeds=mixed.seeds, position=mixed.position, sample_index=mixed.sample_index)
    alone = run(logits, neutral, device)
    tables = {"prompt_mask": mixed.prompt_mask, "output_counts": mixed.output_counts, "bias": torch.zeros(6, 333)}
    beside = dataclasses.replace(mixed, **tables)
    for name, tensor in vars(neutral).items():
        if tensor is not None:
            getattr(beside, name)[::2] = tensor[::2]
    assert torch.equal(run(logits, beside, device)[::2], alone[::2])
    assert torch.equal(run(logits, dataclasses.replace(neutral, **tables), device), alone)


@triton.jit
def _noise_kernel(noise_ptr, words_ptr, seed_ptr, sample_index_ptr, position_ptr, first_id, BLOCK: tl.constexpr):
    ids = first_id + tl.arange(0, BLOCK)
    seed, sample_index, position = tl.load(seed_ptr), tl.load(sample_index_ptr), tl.load(position_ptr)
    tl.store(noise_ptr + tl.arange(0, BLOCK), probability.gumbel(seed, sample_index, position, ids))
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, sample_index, low, high, ids)
    tl.store(words_ptr + tl.arange(0, BLOCK), word.to(tl.int64))


@triton.jit
def _gumbel_of_words_kernel(words_ptr, noise_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    word = tl.load(words_ptr + places).to(tl.uint32)
    tl.store(noise_ptr + places, probability.gumbel_of_word(word))


@triton.jit
def _exp_kernel(x_ptr, exp_ptr, mass_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(exp_ptr + places, probability.exp(x))
    tl.store(mass_ptr + places, probability.mass(x))


def words_and_noise(device, seed, sample_index, position, first_id=0, count=64):
    noise, words = torch.empty(count, device=device), torch.empty(count, dtype=torch.int64, device=device)
    scalars = [
        torch.tensor([value], dtype=dtype, device=device)
        for value, dtype in ((seed, torch.int64), (sample_index, torch.int32), (position, torch.int64))
    ]
    _noise_kernel[(1,)](noise, words, *scalars, first_id, count, **probability.OPTIONS)
    return words.cpu(), noise.cpu()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123 1.14, tests/kat_vectors, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09"),
    ],
)
def test_philox_known_answers(device, counter, key, expected):
    c, k = ([int(word, 16) for word in text.split()] for text in (counter, key))

    def signed(value, bits):
        return value - (1 << bits) if value >> (bits - 1) else value

    position = signed(c[1] | c[2] << 32, 64)
    words, _ = words_and_noise(device, signed(k[0] | k[1] << 32, 64), signed(c[0], 32), position, signed(c[3], 32), 1)
    assert words.tolist() == [int(expected, 16)]


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 + 9, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 3, 2**32 + 3, 2**40 + 7])
@pytest.mark.parametrize("sample_index", [0, 2])
def test_philox_words_and_noise_are_those_of_the_twin(device, seed, position, sample_index):
    signed = seed - 2**64 if seed >= 2**63 else seed
    for first_id in (0, 128_000):
        words, noise = words_and_noise(device, signed, sample_index, position, first_id)
        for offset in (0, 1, 63):
            counter = [sample_index, position & 0xFFFFFFFF, position >> 32, first_id + offset]
            assert words[offset] == philox_in_python(counter, [seed & 0xFFFFFFFF, seed >> 32])[0]
        token_ids = first_id + torch.arange(64)
        twin = gumbel_noise(token_ids, torch.tensor(signed), torch.tensor(sample_index), torch.tensor(position))
        assert ((noise - twin).abs() <= 2 * 2.0**-22 * (1 + twin.abs())).all()


def uniform(words):
    """The twin's u of a word."""
    return ((words >> 1).float() * 2.0**-31).clamp(2.0**-31, 1 - 2.0**-24)


def test_noise(device):
    """Both logarithms within the bound that `excused` and the twin's own test use, at every scale of u."""
    count = 2**15
    ends = torch.tensor([0, 1, 2, 3, 4, 2**32 - 1, 2**32 - 2, 2**31, 2**31 - 1, 2**31 + 1])
    scales = torch.randint(0, 2**32, (count - len(ends),)) >> torch.arange(count - len(ends)) % 32
    words = torch.cat((ends, scales))
    noise = torch.empty(count, device=device)
    _gumbel_of_words_kernel[(1,)](words.to(device), noise, count, **probability.OPTIONS)
    exact = -(-torch.log1p(-uniform(words).double())).log()
    assert ((noise.cpu() - exact).abs() <= 2.0**-22 * (1 + exact.abs())).all()


def test_exp(device):
    count = 2**15
    x = torch.cat((torch.zeros(1), -(torch.rand(count // 2 - 1) * 40), -(2.0 ** (-30 * torch.rand(count // 2)))))
    got, mass = torch.empty(count, device=device), torch.empty(count, dtype=torch.int64, device=device)
    _exp_kernel[(1,)](x.to(device), got, mass, count, **probability.OPTIONS)
    got, mass = got.cpu(), mass.cpu()
    exact = x.double().exp()
    assert got[0] == 1.0
    assert ((got - exact).abs() <= ulp(exact, torch.float32)).all()
    assert torch.equal(mass, (got.double() * 2.0**42).long())


def test_exp_far_below(device):
    x = torch.tensor([-39.9, -40.0, -41.0, -87.0, -104.0, -1e30, -torch.inf, -0.0])
    got, mass = torch.empty(8, device=device), torch.empty(8, dtype=torch.int64, device=device)
    _exp_kernel[(1,)](x.to(device), got, mass, 8, **probability.OPTIONS)
    assert (got[:7] < 1e-17).all() and mass.tolist() == [0] * 7 + [2**42]


def test_frequencies_match_the_softmax(device):
    num_draws = 200 if INTERPRETED else 20_000
    logits = torch.tensor([3.0, 1.5, 0.5, -torch.inf, 0.0, -0.5])
    batch = batch_of(num_draws, temperature=1.25, seeds=range(num_draws))
    counts = torch.bincount(run(logits.repeat(num_draws, 1), batch, device), minlength=6).double()
    expected = num_draws * torch.softmax(logits.double() / 1.25, -1)
    assert counts[3] == 0
    assert_chi_square(counts[expected > 0], expected[expected > 0])


def assert_batch_invariant(function, num_rows):
    """`function(rows)` gives for every row what it gives alone: batches of 1 to num_rows in random order."""
    shuffle = random.Random(0)
    alone = [function([row]) for row in range(num_rows)]
    for size in range(1, num_rows + 1):
        rows = shuffle.sample(range(num_rows), size)
        for results, *singles in zip(function(rows), *(alone[row] for row in rows), strict=True):
            assert same_bits(results, torch.cat(singles)), rows


@pytest.mark.parametrize("vocab_size", [1, 2, 333, 4097])
def test_one_answer_sample_does_not_depend_on_the_batch(device, vocab_size):
    num_rows = 5 if INTERPRETED else 17
    logits, batch = mixed_batch(num_rows, vocab_size)
    assert_batch_invariant(lambda rows: (run(logits[rows], rows_of(batch, rows), device),), num_rows)


def test_one_answer_negative_control_noise_by_batch_row(device):
    """Keying the noise by batch row, as some engines do, must fail the test above."""
    logits, batch = mixed_batch(5, 333)
    batch = dataclasses.replace(batch, temperature=torch.full((5,), 2.0))

    def by_row(rows):
        keyed = dataclasses.replace(rows_of(batch, rows), sample_index=torch.arange(len(rows), dtype=torch.int32))
        return (run(logits[rows], keyed, device),)

    with pytest.raises(AssertionError):
        assert_batch_invariant(by_row, 5)


def test_one_answer_twice_and_in_any_order_of_chunks(device, only_programs):
    logits, batch = mixed_batch(1, 3 * CHUNK)
    batch = dataclasses.replace(batch, temperature=torch.ones(1), top_k=torch.tensor([60], dtype=torch.int32))
    batch = dataclasses.replace(batch, top_p=torch.tensor([0.97]))
    tokens = [run(logits, batch, device) for _ in range(2)]
    if INTERPRETED:
        only_programs([0, 2, 1])
        tokens.append(run(logits, batch, device))
    assert all(torch.equal(tokens[0], other) for other in tokens)


def test_G07_same_seed_twice_in_a_batch(device):
    logits = torch.randn(200).repeat(16, 1)
    tokens = run(logits, batch_of(16, seeds=[7, 8] * 8, sample_index=[i // 2 % 4 for i in range(16)]), device)
    assert torch.equal(tokens[:8], tokens[8:])
    assert len(set(tokens.tolist())) > 4  # sample index and seed both change the draw


@pytest.mark.parametrize(("dtype", "vocab_size"), [*((dtype, 33) for dtype in DTYPES), (torch.bfloat16, CHUNK + 1)])
def test_F04_F05_strides_and_addresses_change_no_bit(device, dtype, vocab_size):
    logits, batch = mixed_batch(2, vocab_size)
    logits, batch = logits.to(dtype).to(device), on(batch, device)
    expected = sample(logits, batch)
    padded = torch.cat((logits, torch.full_like(logits[:, :3], torch.nan)), dim=1)[:, :vocab_size]
    offset = torch.cat((logits.new_full((1,), torch.nan), logits.flatten()))[1:].view(2, vocab_size)
    for same in (padded, offset, logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(sample(same, batch), expected)
    assert torch.equal(sample(logits[:1].expand(2, -1), batch)[:1], expected[:1])

    def spread(tensor):
        return None if tensor is None else torch.stack((tensor, tensor), dim=-1)[..., 0]

    spread_out = SamplingBatch(**{name: spread(tensor) for name, tensor in vars(batch).items()})
    assert torch.equal(sample(logits, spread_out), expected)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("vocab_size", [1, 33, CHUNK, CHUNK + 1])
def test_F13_every_output_is_written_and_nothing_beside(device, guarded, rows, vocab_size):
    logits, batch = mixed_batch(rows, vocab_size)
    logits, batch = logits.to(device), on(batch, device)
    expected = sample(logits, batch)
    with guarded():
        tokens = sample(logits, batch)
    assert torch.equal(tokens, expected)
    assert ((tokens >= 0) & (tokens < vocab_size)).all()


def test_F08_rows_beyond_2_31_elements(device, huge):
    vocab_size, stride = 33, 2**30 + 8
    logits, batch = mixed_batch(3, vocab_size)
    batch = on(dataclasses.replace(batch, prompt_mask=None, output_counts=None, bias=None), device)
    far = huge(2 * stride + vocab_size, torch.float32).as_strided((3, vocab_size), (stride, 1))
    far.copy_(logits)
    assert torch.equal(sample(far, batch), sample(logits.to(device), batch))


def test_F06_nothing_to_do_launches_nothing(device, launches):
    grids = [launches(*kernel) for kernel in KERNELS]
    tokens = sample(torch.empty(0, 33, device=device), on(batch_of(0), device))
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)
    assert grids == [[]] * 6


@pytest.mark.parametrize(("rows", "vocab_size", "programs"), [(1, 1, 1), (3, CHUNK, 3), (3, CHUNK + 1, 6)])
def test_six_launches(device, launches, rows, vocab_size, programs):
    grids = [launches(*kernel) for kernel in KERNELS]
    run(torch.zeros(rows, vocab_size), batch_of(rows), device)
    wide, tall = [(programs,)], [(rows,)]
    assert grids == [wide, wide, wide, tall, wide, tall]


def test_F09_more_than_65535_rows(device, launches):
    rows = 70_000
    grids = [launches(*kernel, run=not INTERPRETED) for kernel in KERNELS]
    logits = torch.randn(rows, 4, device=device)
    tokens = sample(logits, on(batch_of(rows, temperature=0.0), device))
    assert grids == [[(rows,)]] * 6
    if not INTERPRETED:
        assert torch.equal(tokens, logits.argmax(-1))


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        for word in ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "sort", "topk", "equal"):
            assert word not in name, f"{name} reads on the host, or sorts"
        return func(*args, **(kwargs or {}))


def test_C8_nothing_is_read_on_the_host(device):
    logits, batch = mixed_batch(3, 333)
    logits, batch = logits.to(device), on(batch, device)
    expected = sample(logits, batch)
    with NoHostReads():
        tokens = sample(logits, batch)
    assert torch.equal(tokens, expected)
    with pytest.raises(AssertionError, match="reads on the host"), NoHostReads():
        reference_sample.sample(logits, batch)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_C8_in_a_cuda_graph(device):
    logits, batch = mixed_batch(6, 128_256)
    logits, batch = logits.to(device), on(batch, device)
    expected = sample(logits, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, batch)
    for _ in range(3):
        tokens.fill_(-7)
        graph.replay()
        assert torch.equal(tokens, expected)


def test_constants_are_those_of_the_twin():
    assert probability.MAX_VOCAB_SIZE == reference_sample.MAX_VOCAB_SIZE
    assert probability.MASS_ONE.value == reference_sample._MASS_ONE
    names = {field.name for field in dataclasses.fields(SamplingBatch)}
    assert {*module._DTYPES, *module._TABLES} <= names
    # The largest noise, and the least: no token this far below the most probable one can beat it.
    u = torch.tensor([2.0**-31, 1 - 2.0**-24], dtype=torch.float64)
    most, least = -(-torch.log1p(-u)).log()
    assert most - least + 2.0**-16 < module._HOPELESS.value


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_F01_dtypes(device, dtype):
    with pytest.raises(KernelArgumentError, match=f"sample: logits must be float16.*; got {dtype} \\(2, 3\\)"):
        sample(torch.zeros(2, 3, dtype=dtype, device=device), on(batch_of(2), device))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (2, 0), (1, 2**20 + 1)])
def test_F02_shapes(device, shape):
    logits = torch.zeros((1,) * len(shape), device=device).expand(shape)
    with pytest.raises(KernelArgumentError, match=r"\[rows, vocab_size\] with 1 to 1048576 tokens"):
        sample(logits, on(batch_of(2), device))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("temperature", torch.ones(3)), ("seeds", torch.ones(1, dtype=torch.int64)), ("bias", torch.zeros(2, 4))],
)
def test_F02_batch_that_does_not_fit_the_logits(device, name, tensor):
    batch = on(dataclasses.replace(batch_of(2), **{name: tensor}), device)
    with pytest.raises(KernelArgumentError, match=f"sample: {name} must have shape .*; got"):
        sample(torch.zeros(2, 5, device=device), batch)


FIELDS = [field.name for field in dataclasses.fields(SamplingBatch)]


@pytest.mark.parametrize("name", FIELDS)
def test_F01_dtypes_of_the_batch(device, name):
    shape = (2, 5) if name in module._TABLES else (2,)
    batch = on(dataclasses.replace(batch_of(2), **{name: torch.ones(shape, dtype=torch.float64)}), device)
    right = module._DTYPES.get(name, torch.float32)
    with pytest.raises(KernelArgumentError, match=f"sample: {name} is torch.float64; use {right}"):
        sample(torch.zeros(2, 5, device=device), batch)


@pytest.mark.parametrize("name", FIELDS)
def test_F03_devices(device, name):
    logits = torch.zeros(2, 5, device=device)
    tables = {
        "prompt_mask": torch.zeros(2, 5, dtype=torch.bool),
        "output_counts": torch.zeros(2, 5, dtype=torch.int32),
        "bias": torch.zeros(2, 5),
    }
    batch = on(dataclasses.replace(batch_of(2), **tables), device)
    elsewhere = dataclasses.replace(batch, **{name: getattr(batch, name).to("meta")})
    with pytest.raises(KernelArgumentError, match=f"sample: {name} is on meta and logits on"):
        sample(logits, elsewhere)


def test_F03_logits_elsewhere():
    with pytest.raises(KernelArgumentError, match="logits is on meta; the kernel takes .*backend='reference'"):
        sample(torch.zeros(2, 5, device="meta"), batch_of(2))


def test_F03_gradients(device):
    logits, batch = torch.zeros(2, 5, device=device, requires_grad=True), on(batch_of(2), device)
    with pytest.raises(KernelArgumentError, match="logits requires grad and kernels have no backward"):
        sample(logits, batch)
    with torch.no_grad():
        assert sample(logits, batch).shape == (2,)


def test_chi_square_can_tell_a_wrong_temperature():
    """Negative control: counts of another temperature must fail the distribution test."""
    probabilities = torch.softmax(torch.tensor([3.0, 1.5, 0.5, 0.0, -0.5], dtype=torch.float64), -1)
    wrong = torch.softmax(3 * torch.tensor([3.0, 1.5, 0.5, 0.0, -0.5], dtype=torch.float64), -1)
    with pytest.raises(AssertionError):
        assert_chi_square(200 * wrong, 200 * probabilities)
    assert math.isclose(float(wrong.sum()), 1)

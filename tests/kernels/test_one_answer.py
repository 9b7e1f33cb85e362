"""One answer from the engine on the kernels: bits alone, in a batch, in chunks, and as prompt or generated tokens."""

import random

import pytest
import torch

from llama_fast.kernels import configs
from llama_fast.ops import cuda_extension, gpu, reference
from tests.tiny import RecordingEngine, make_model, make_request

SIZES = {"page_size": 16, "split_size": 32, "max_seq_len": 128}
MAX_TOKENS = 3
# Prompts below, on and beyond the borders of pages and splits; greedy and sampled.
SPECS = [
    (3, {"temperature": 0.0}),
    (33, {"temperature": 1.2, "seed": 5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2}),
    (47, {"temperature": 0.0}),
    (70, {"temperature": 1.0, "seed": 9}),
]


@pytest.fixture(scope="module")
def model(device, exact_dots):
    return make_model(torch.bfloat16).to(device)


def _run(model, order, **sizes):
    engine = RecordingEngine(model, backend="gpu", **{"max_batch": 8, **SIZES, **sizes})
    assert engine.ops is gpu
    prompts = {index: [random.Random(index).randrange(97) for _ in range(SPECS[index][0])] for index in order}
    requests = [
        make_request(model, prompts[index], index, max_tokens=MAX_TOKENS, max_seq_len=128, **SPECS[index][1])
        for index in order
    ]
    return engine.generate(requests)


def _assert_same(results, expected):
    for key, (tokens, logits) in results.items():
        assert tokens == expected[key][0], key
        assert torch.equal(logits, expected[key][1]), key


@pytest.fixture(scope="module")
def alone(model):
    return {key: value for index in range(len(SPECS)) for key, value in _run(model, [index]).items()}


def test_a_batch_in_another_order_equals_alone(model, alone):
    _assert_same(_run(model, [2, 0, 3, 1]), alone)


@pytest.mark.parametrize("prefill_chunk", [13, 40])
def test_chunks_and_a_full_queue_equal_alone(model, alone, prefill_chunk):
    _assert_same(_run(model, [3, 1, 0], prefill_chunk=prefill_chunk, max_batch=2), alone)


def test_control_a_linear_that_follows_the_number_of_rows_is_noticed(model, alone, monkeypatch):
    plain = gpu.linear_kernel.linear

    def by_rows(x, weight, bias=None, **options):
        if len(x) > 1 and not options:
            half = x.shape[1] // 2
            halves = slice(half), slice(half, None)
            first, second = (plain(x[:, s], weight[:, s].contiguous()) for s in halves)
            return first + second
        return plain(x, weight, bias, **options)

    monkeypatch.setattr(gpu.linear_kernel, "linear", by_rows)
    with pytest.raises(AssertionError):
        _assert_same(_run(model, [2, 0, 3, 1]), alone)


def test_a_generated_token_has_the_logits_that_it_has_as_a_prompt_token(model, alone, device):
    if configs.table_of(device) not in configs.PREFILL_EQUALS_DECODE:
        pytest.skip("not shown on this architecture")
    if cuda_extension.in_use(device):
        pytest.skip("generated rows take the CUDA extension's order of summation")
    tokens, logits = alone[2, 0]
    prompt = [random.Random(2).randrange(97) for _ in range(SPECS[2][0])]
    engine = RecordingEngine(model, backend="gpu", max_batch=8, **SIZES)
    longer = make_request(model, prompt + tokens[:-1], max_tokens=1, max_seq_len=128, temperature=0.0)
    again = engine.generate([longer])[0, 0][1]
    assert torch.equal(again[0], logits[-1])


def test_control_the_reference_gives_other_bits(model, alone):
    engine = RecordingEngine(model, backend="reference", max_batch=8, **SIZES)
    assert engine.ops is reference
    prompt = [random.Random(2).randrange(97) for _ in range(SPECS[2][0])]
    result = engine.generate([make_request(model, prompt, 2, max_tokens=1, max_seq_len=128, temperature=0.0)])
    assert not torch.equal(result[2, 0][1][0], alone[2, 0][1][0])

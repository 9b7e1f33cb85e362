"""One answer of the reference backend: a request has the same bits alone, in any batch, order, slot and chunking."""

import random

import pytest
import torch
import torch.nn.functional as F

from llama_fast.ops import reference
from tests.tiny import RecordingEngine, make_model, make_request

PAGE, SPLIT = 8, 32  # small, so that short prompts cross pages and splits
MAX_TOKENS = 5


def _specs():
    """17 requests: prompts of 1 to 97 tokens, greedy and sampled, with and without penalties and filters."""
    draw = random.Random(0)
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 64, 65, 70, 97, 3]
    specs = []
    for index, length in enumerate(lengths):
        prompt = [draw.randrange(97) for _ in range(length)]
        params = {"max_tokens": MAX_TOKENS}
        if index % 2:
            params |= {"temperature": 1.3, "seed": index, "n": 1 + index // 2 % 2}
        if index % 4 == 3:
            params |= {"top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
        specs.append((prompt, params))
    return specs


SPECS = _specs()


def _run(model, order, *, max_batch=64, prefill_chunk=512, max_seq_len=256):
    engine = RecordingEngine(
        model,
        backend="reference",  # the CPU's kernels: tests/ops/test_cpu_one_answer.py
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        page_size=PAGE,
        split_size=SPLIT,
        max_seq_len=max_seq_len,
    )
    requests = [make_request(model, SPECS[index][0], index, **SPECS[index][1]) for index in order]
    results = engine.generate(requests)
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return results


def _assert_same(results, expected):
    for key, (tokens, logits) in results.items():
        assert tokens == expected[key][0], key
        assert torch.equal(logits, expected[key][1]), key


@pytest.fixture(scope="module")
def alone(model):
    return {key: value for index in range(len(SPECS)) for key, value in _run(model, [index]).items()}


@pytest.mark.parametrize("size", range(1, 18))
def test_any_batch_in_any_order_equals_alone(model, alone, size):
    order = random.Random(size).sample(range(len(SPECS)), size)
    _assert_same(_run(model, order), alone)


@pytest.mark.parametrize("prefill_chunk", [1, 3, 8, 13, 32, 40, 100])
def test_any_prefill_chunking_equals_whole_prompts(model, alone, prefill_chunk):
    order = random.Random(prefill_chunk).sample(range(len(SPECS)), 6)
    _assert_same(_run(model, order, prefill_chunk=prefill_chunk), alone)


@pytest.mark.parametrize("max_batch", [3, 5])
def test_a_full_queue_and_reused_pages_equal_alone(model, alone, max_batch):
    order = list(range(len(SPECS)))
    random.Random(max_batch).shuffle(order)
    _assert_same(_run(model, order, max_batch=max_batch, prefill_chunk=50), alone)


def test_twice_the_same(model, alone):
    _assert_same(_run(model, [15, 3, 11]), _run(model, [15, 3, 11]))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_any_thread_count_keeps_batch_and_solo_equal(model, num_threads):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        expected = {key: value for index in (2, 9, 14) for key, value in _run(model, [index]).items()}
        _assert_same(_run(model, [14, 2, 9], prefill_chunk=21), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_control_plain_linear_breaks_it(monkeypatch, dtype):
    """The same comparison with F.linear on whatever rows there are must fail, or it proves nothing."""
    # Heights 1 and 17 take different kernels in fp32 at ordinary widths.
    model = make_model(dtype, hidden_size=64, intermediate_size=128)
    monkeypatch.setattr(reference, "_matmul", lambda x, weight, bias: F.linear(x, weight, bias))
    expected = {key: value for index in (2, 9, 14) for key, value in _run(model, [index]).items()}
    with pytest.raises(AssertionError):
        _assert_same(_run(model, [14, 2, 9]), expected)


def test_negative_control_noise_by_batch_row_breaks_it(monkeypatch):
    model = make_model()
    expected = {key: value for index in (1, 3) for key, value in _run(model, [index]).items()}
    draw = reference.sample

    def by_row(logits, batch):
        return draw(logits, batch.__class__(**{**vars(batch), "seeds": torch.arange(logits.shape[0])}))

    monkeypatch.setattr(reference, "sample", by_row)
    with pytest.raises(AssertionError):
        _assert_same(_run(model, [3, 1]), expected)


def test_samples_of_one_request_equal_their_own_requests(model):
    """Sample k forks off a shared prompt; alone it would have started from a prompt of its own."""
    prompt = SPECS[13][0]
    params = {"max_tokens": MAX_TOKENS, "temperature": 1.0, "seed": 5}
    engine = RecordingEngine(model, backend="reference", max_batch=8, page_size=PAGE, split_size=SPLIT)
    four = engine.generate([make_request(model, prompt, n=4, **params)])
    two = engine.generate([make_request(model, prompt, n=2, **params)])
    _assert_same(two, four)
    assert len({tuple(tokens) for tokens, _ in four.values()}) == 4

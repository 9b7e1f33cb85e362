"""One answer of int4 models, on every backend that runs here: alone, in any batch, order and prefill chunking."""

import random

import pytest
import torch

from llama_fast.ops.native import native
from tests.engine.test_one_answer import MAX_TOKENS, SPECS
from tests.tiny import RecordingEngine, make_model, make_request, to_int4

BACKENDS = ["reference", "cpu"] if native()[0] is not None else ["reference"]
LAYOUTS = [
    {"dtype": torch.bfloat16, "group_size": 32, "symmetric": True},
    {"dtype": torch.bfloat16, "group_size": 64, "symmetric": False, "head": True},
    {"dtype": torch.float16, "group_size": 128, "symmetric": True},
    {"dtype": torch.float32, "group_size": 32, "symmetric": False},
]


def make(dtype, **layout):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    wide = {"hidden_size": 128, "intermediate_size": 256, **heads}
    return to_int4(make_model(dtype, **wide), **layout)


def run(model, backend, order, **settings):
    engine = RecordingEngine(model, backend=backend, page_size=8, split_size=32, max_seq_len=256, **settings)
    return engine.generate([make_request(model, SPECS[index][0], index, **SPECS[index][1]) for index in order])


def assert_same(results, expected):
    for key, (tokens, logits) in results.items():
        assert tokens == expected[key][0] and torch.equal(logits, expected[key][1]), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_batch_order_and_chunking_equals_alone(backend, layout):
    model = make(**layout)
    order = [0, 1, 5, 9, 13, 14, 15]
    alone = {key: value for index in order for key, value in run(model, backend, [index], max_batch=4).items()}
    for seed, chunk, max_batch in ((1, 512, 16), (2, 7, 16), (3, 33, 3)):
        shuffled = random.Random(seed).sample(order, len(order))
        assert_same(run(model, backend, shuffled, prefill_chunk=chunk, max_batch=max_batch), alone)
    # Negative control: another layout of the same weights has other bits.
    other = run(make(**layout | {"group_size": 32 if layout["group_size"] != 32 else 128}), backend, [13])
    assert not torch.equal(other[13, 0][1][0], alone[13, 0][1][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generated_token_has_the_logits_that_it_has_as_a_prompt_token(backend):
    model = make(**LAYOUTS[0])
    prompt = SPECS[14][0]
    tokens, logits = run(model, backend, [14])[14, 0]
    for count in range(1, MAX_TOKENS):
        engine = RecordingEngine(model, backend=backend, page_size=8, split_size=32, max_seq_len=256)
        longer = make_request(model, prompt + tokens[:count], max_tokens=1, temperature=0.0)
        ((_, again),) = engine.generate([longer]).values()
        assert torch.equal(again[0], logits[count])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_backends_agree(layout):
    """Other orders of the same sums: as near as two roundings of one model."""
    if len(BACKENDS) < 2:
        pytest.skip("the native kernels are not here")
    model = make(**layout)
    got, expected = (run(model, backend, [13])[13, 0][1][0].double() for backend in BACKENDS)
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[layout["dtype"]]
    assert 0 < (got - expected).norm() / expected.norm() < bound

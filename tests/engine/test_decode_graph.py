"""A decoding step could be captured: no look at a value, no memory kept, the same operations on the same memory."""

import pytest
import torch

from llama_fast.engine.engine import Engine
from llama_fast.ops import reference, shared
from tests.engine.step_watch import NotCapturable, assert_capturable, watched
from tests.tiny import OPS, make_model, make_request

PROMPT = [5, 6, 7, 5, 6, 7, 8]
PARAMS = {"max_tokens": 30, "temperature": 0.9, "seed": 3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}


@pytest.fixture
def engine():
    """Three sequences in the middle of decoding."""
    model = make_model()
    engine = Engine(model, max_batch=4, page_size=8, split_size=32, max_seq_len=96)
    stream = engine.run([make_request(model, PROMPT, index, **PARAMS) for index in range(3)])
    for _ in range(4):
        next(stream)
    yield engine
    stream.close()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_step_could_be_captured(engine, rows, full):
    names = [name for name, _ in assert_capturable(lambda: engine.decoder.graph.run(rows, full))]
    assert "aten.embedding" in names


def _reads_an_item(engine, monkeypatch):
    advance = OPS.advance
    monkeypatch.setattr(OPS, "advance", lambda tokens, *rest: advance(tokens + 0 * tokens[0].item(), *rest))


def _reads_a_list(engine, monkeypatch):
    sample = OPS.sample
    monkeypatch.setattr(OPS, "sample", lambda logits, batch: (batch.seeds.tolist(), sample(logits, batch))[1])


def _copies_from_the_host(engine, monkeypatch):
    sample = OPS.sample
    monkeypatch.setattr(OPS, "sample", lambda logits, batch: sample(logits, batch) + torch.tensor([0]))


def _takes_what_is_not_zero(engine, monkeypatch):
    advance = OPS.advance
    monkeypatch.setattr(OPS, "advance", lambda tokens, *rest: (tokens.nonzero(), advance(tokens, *rest))[1])


def _selects_by_a_mask(engine, monkeypatch):
    advance = OPS.advance
    monkeypatch.setattr(OPS, "advance", lambda tokens, *rest: (tokens[tokens > 3], advance(tokens, *rest))[1])


def _keeps_memory(engine, monkeypatch):
    sample, kept = OPS.sample, []
    monkeypatch.setattr(OPS, "sample", lambda logits, batch: (kept.append(logits + 0), sample(logits, batch))[1])


def _does_something_else_each_time(engine, monkeypatch):
    sample, calls = OPS.sample, []

    def changing(logits, batch):
        calls.append(1)
        return sample(logits if len(calls) % 2 else logits + 0, batch)

    monkeypatch.setattr(OPS, "sample", changing)


def _reads_another_buffer_each_time(engine, monkeypatch):
    sample = OPS.sample
    kept = [torch.zeros(1) for _ in range(8)]
    monkeypatch.setattr(OPS, "sample", lambda logits, batch: sample(logits + kept.pop(), batch))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_reads_an_item, "the host reads a value"),
        (_reads_a_list, "Tensor.tolist: the host reads values"),
        (_copies_from_the_host, "a copy from the host"),
        (_takes_what_is_not_zero, "a size follows from values"),
        (_selects_by_a_mask, "a size follows from values"),
        (_keeps_memory, "tensors of the step outlive it: aten.add"),
        (_does_something_else_each_time, "aten.add"),
        (_reads_another_buffer_each_time, "aten.add"),
    ],
)
def test_control_what_is_planted_is_found(engine, monkeypatch, plant, message):
    plant(engine, monkeypatch)
    with pytest.raises(AssertionError, match=message) as raised:
        assert_capturable(lambda: engine.decoder.graph.run(3, full=True))
    assert isinstance(raised.value, NotCapturable) or message == "aten.add"


def test_control_the_reference_backend_looks_at_values():
    model = make_model()
    engine = Engine(model, backend="reference", max_batch=2, page_size=8, split_size=32, max_seq_len=96)
    assert not reference.CAPTURABLE
    engine.make_ready()
    with pytest.raises(NotCapturable):
        watched(lambda: engine.decoder.graph.run(2, full=False))


def test_advance_in_pytorch_could_be_captured(engine):
    """The twin of the kernel: the same promise."""
    rows = engine.decoder.graph.rows
    tokens = torch.tensor([3, 4, 5])
    for counted in (False, True):
        assert_capturable(lambda counted=counted: shared.advance(tokens, None, rows, counted))

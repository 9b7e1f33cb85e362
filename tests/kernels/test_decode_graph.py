"""The decoding step on the kernels: capturable, and one answer through buckets and steps ahead."""

import contextlib

import pytest
import torch
from triton.runtime import interpreter

from llama_fast.engine.engine import Engine
from llama_fast.kernels import batch_checks
from llama_fast.ops import gpu
from tests.engine.graph_double import capturing
from tests.engine.step_watch import NotCapturable, assert_capturable, outside
from tests.kernels.conftest import INTERPRETED
from tests.tiny import RecordingEngine, make_model, make_request

SIZES = {"page_size": 16, "split_size": 32, "max_seq_len": 96, "backend": "gpu"}
PROMPT = [5, 6, 7, 5, 6, 7, 8]
PARAMS = {"temperature": 0.9, "seed": 3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}

interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="on a GPU steps are captured: bench/gpu_report.py compares them"
)


@pytest.fixture(scope="module")
def model(device, exact_dots):
    return make_model(torch.bfloat16).to(device)


@contextlib.contextmanager
def _launches(watch):
    """Kernels in the list of operations, by name and by the memory they are given."""
    run = interpreter.GridExecutor.__call__

    def watched(self, *args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        watch.called(self.fn.__name__, tensors)
        with outside(watch), pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "numpy", "__array__"):
                patch.setattr(torch.Tensor, name, PLAIN[name])
            return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", watched)
        yield


PLAIN = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "__array__")}


@interpreted
@pytest.mark.parametrize("full", [False, True])
def test_a_step_could_be_captured(model, full, monkeypatch):
    assert not gpu.CAPTURABLE and batch_checks.ENABLED  # it looks at indices here
    monkeypatch.setattr(batch_checks, "ENABLED", False)
    engine = Engine(model, max_batch=4, **SIZES)
    stream = engine.run([make_request(model, PROMPT, index, max_tokens=30, **PARAMS) for index in range(3)])
    for _ in range(2):
        next(stream)
    names = [name for name, _ in assert_capturable(lambda: engine.decoder.graph.run(3, full), _launches)]
    layers = model.config.num_hidden_layers
    # Five ops a layer, of which three begin with a norm or are a pair of launches.
    assert names.count("_rms_norm_kernel") == 2 * layers + 1
    assert names.count("_linear_kernel") == 4 * layers + 1
    assert names.count("_rope_and_cache_kernel") == names.count("_generated_kernel") == layers
    assert names.count("_advance_kernel") == 1
    stream.close()


@interpreted
def test_control_a_look_at_a_value_is_found(model, monkeypatch):
    advance = gpu.advance
    monkeypatch.setattr(gpu, "advance", lambda tokens, *rest: (tokens[0].item(), advance(tokens, *rest))[1])
    monkeypatch.setattr(batch_checks, "ENABLED", False)
    engine = Engine(model, max_batch=2, **SIZES)
    engine.make_ready()
    with pytest.raises(NotCapturable, match="the host reads a value"):
        assert_capturable(lambda: engine.decoder.graph.run(2, full=False), _launches)


@interpreted
def test_buckets_and_steps_ahead_give_what_one_row_at_a_time_gives(model, monkeypatch):
    """Rows at rest beside the others, several steps unread: the same bits."""
    specs = [(3, {"max_tokens": 5}), (20, {"max_tokens": 3, **PARAMS}), (33, {"max_tokens": 4, "temperature": 0.0})]
    prompts = [[(7 * index + place) % 97 for place in range(length)] for index, (length, _) in enumerate(specs)]

    def requests():
        return [make_request(model, prompts[i], i, max_seq_len=96, **params) for i, (_, params) in enumerate(specs)]

    expected = {}
    for request in requests():
        expected |= RecordingEngine(model, max_batch=1, **SIZES).generate([request])
    capturing(monkeypatch)
    engine = RecordingEngine(model, max_batch=8, steps_ahead=3, **SIZES)
    results = engine.generate(requests())
    assert engine.stats().captured == (1, 2, 4, 8)
    for key, (token_ids, logits) in results.items():
        assert token_ids == expected[key][0] and torch.equal(logits, expected[key][1]), key


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="graphs are captured on a GPU")


def _mixed(model, count):
    """Requests that begin and end at different times, greedy and sampled, with tables and log probabilities or none."""
    requests = []
    for index in range(count):
        params = [{}, PARAMS, {"logprobs": 3}, {**PARAMS, "logprobs": 0, "min_tokens": 2}][index % 4]
        prompt = [(5 * index + place) % 97 for place in range(1 + 11 * index % 60)]
        requests.append(make_request(model, prompt, index, max_seq_len=96, max_tokens=3 + index % 9, **params))
    return requests


def _outcome(requests):
    return [(sample.token_ids, sample.logprobs) for request in requests for sample in request.samples]


def _finish(engine, requests):
    for _ in engine.run(requests):
        pass
    return _outcome(requests)


@on_a_gpu
@pytest.mark.parametrize("steps_ahead", [1, 2, 5])
def test_captured_steps_give_what_launched_ones_give(model, steps_ahead):
    eager = Engine(model, max_batch=6, graphs=False, **SIZES)
    captured = Engine(model, max_batch=6, steps_ahead=steps_ahead, **SIZES)
    expected = _finish(eager, _mixed(model, 20))
    assert _finish(captured, _mixed(model, 20)) == expected
    assert captured.stats().captured == (1, 2, 4, 6) and eager.stats().captured == ()
    alone = [_finish(Engine(model, max_batch=1, **SIZES), [request])[0] for request in _mixed(model, 5)]
    assert alone == expected[:5]


@on_a_gpu
def test_once_ready_nothing_is_allocated_or_compiled(model):
    engine = Engine(model, max_batch=6, prefill_chunk=40, **SIZES)
    engine.make_ready()
    for _ in range(3):
        _finish(engine, _mixed(model, 20))
    stats = engine.stats()
    assert stats.decode_steps > 20
    assert (stats.allocations, stats.compilations) == (0, 0)


@on_a_gpu
def test_graphs_follow_weights_that_changed(model):
    changed = make_model(torch.bfloat16).to(model.device)
    engine = Engine(changed, max_batch=2, **SIZES)
    before = _finish(engine, _mixed(changed, 2))
    with torch.no_grad():
        changed.lm_head.weight.mul_(-1)
    after = _finish(engine, _mixed(changed, 2))
    assert after != before
    assert after == _finish(Engine(changed, max_batch=2, graphs=False, **SIZES), _mixed(changed, 2))

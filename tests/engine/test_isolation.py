"""One request's failure is its own: the others' tokens, log probabilities and ends are those of each one alone."""

import time

import pytest
import torch

from llama_fast.engine.engine import Engine
from llama_fast.errors import OutOfMemoryError, RequestError, RequestFailedError, RequestTimeoutError
from tests.byte_model import save_byte_model
from tests.tiny import OPS, fail_at, make_model, make_request, op_by_op

PAGE, SPLIT, VOCAB = 8, 32, 97
# Runs whose tokens hold it fail; the others never draw it.
POISON = 13
PROMPTS = [[3], [5, 6, 7, 5, 6, 7, 8], [i * 31 % VOCAB if i * 31 % VOCAB != POISON else 1 for i in range(41)]]
SPECS = [
    (PROMPTS[2], {"max_tokens": 6, "logprobs": 2}),
    (PROMPTS[0], {"max_tokens": 9, "temperature": 1.2, "seed": 4}),
    (PROMPTS[1], {"max_tokens": 7, "temperature": 1.0, "seed": 8, "n": 2}),
    (PROMPTS[2], {"max_tokens": 3, "prompt_logprobs": 1}),
    (PROMPTS[1], {"max_tokens": 20, "temperature": 0.7, "seed": 11, "min_tokens": 5, "stop_token_ids": [4, 8, 15]}),
]
OPS_OF_A_STEP = ["embed", "attention", "norm_lm_head", "sample", "advance", "copy_pages", "log_probs"]


@pytest.fixture(scope="module")
def tiny():
    return make_model()


def _engine(model, **changes):
    return Engine(model, **{"max_batch": 4, "page_size": PAGE, "split_size": SPLIT, "max_seq_len": 96, **changes})


def _requests(model):
    never = {"logit_bias": {POISON: -100.0}}
    return [make_request(model, prompt, index, **never, **params) for index, (prompt, params) in enumerate(SPECS)]


def _run(engine, requests):
    for _ in engine.run(requests):
        pass
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return requests


def _outcome(request):
    """All that a caller sees."""
    samples = [(s.token_ids, s.logprobs, s.finish_reason, s.stop_reason) for s in request.samples]
    return request.prompt_logprobs, samples


@pytest.fixture(scope="module")
def expected(tiny):
    return [_outcome(_run(_engine(tiny), [request])[0]) for request in _requests(tiny)]


@pytest.fixture(params=[True, False], ids=["shared_runs", "two_runs"])
def roles(request, monkeypatch):
    """Prompts and decoding samples in one pass, as on the CPU, or in two."""
    monkeypatch.setattr(OPS, "ROLES_SHARE_RUNS", request.param)


def _poison(monkeypatch, error=ValueError):
    """A run that embeds the token fails, as one request's data might make it."""
    plain = OPS.embed

    def embed(token_ids, embed_tokens):
        if (token_ids == POISON).any():
            raise error("this token cannot be embedded")
        return plain(token_ids, embed_tokens)

    op_by_op(monkeypatch)
    monkeypatch.setattr(OPS, "embed", embed)


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("steps_ahead", [1, 3])
@pytest.mark.parametrize("prefill_chunk", [9, 512])
@pytest.mark.parametrize("params", [{"max_tokens": 5}, {"max_tokens": 8, "temperature": 1.0, "n": 2}])
def test_K07_a_prompt_that_cannot_run_fails_alone(tiny, expected, monkeypatch, steps_ahead, prefill_chunk, params):
    _poison(monkeypatch)
    requests = _requests(tiny)
    bad = make_request(tiny, [*PROMPTS[2][:20], POISON, 4], 9, **params)
    requests.insert(2, bad)
    _run(_engine(tiny, steps_ahead=steps_ahead, prefill_chunk=prefill_chunk), requests)
    assert isinstance(bad.error, RequestFailedError)
    assert str(bad.error) == "prompt 9: ValueError: this token cannot be embedded"
    assert isinstance(bad.error.__cause__, ValueError)
    assert [(s.token_ids, s.finish_reason) for s in bad.samples] == [([], "error")] * len(bad.samples)
    assert [_outcome(request) for request in requests if request is not bad] == expected


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("steps_ahead", [1, 3])
def test_K07_a_token_that_cannot_run_ends_its_request_alone(tiny, expected, monkeypatch, steps_ahead):
    """It is drawn, and fails in the step that decodes it together with the others' tokens."""
    _poison(monkeypatch)
    requests = _requests(tiny)
    bad = make_request(tiny, PROMPTS[1], 9, max_tokens=9, logit_bias={POISON: 100.0})
    requests.insert(1, bad)
    _run(_engine(tiny, steps_ahead=steps_ahead), requests)
    assert isinstance(bad.error, RequestFailedError)
    assert [(s.token_ids, s.finish_reason) for s in bad.samples] == [([POISON], "error")]
    assert [_outcome(request) for request in requests if request is not bad] == expected


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("op", OPS_OF_A_STEP)
@pytest.mark.parametrize("call", [1, 2, 4, 9])
def test_L02_memory_that_is_short_once_ends_no_more_than_who_wanted_it(tiny, expected, monkeypatch, op, call):
    """At every place that takes memory: who ends says so, the others go on, and memory comes back."""
    engine = _engine(tiny, prefill_chunk=42)
    requests = _requests(tiny)
    with monkeypatch.context() as patch:
        fail_at(patch, op, call, torch.OutOfMemoryError)
        _run(engine, requests)
    ended = [request for request in requests if request.error is not None]
    for request, whole in zip(requests, expected, strict=True):
        if request.error is None:
            assert _outcome(request) == whole
        else:
            assert isinstance(request.error, OutOfMemoryError)
            assert "lower prefill_chunk, cache_bytes or max_batch" in str(request.error)
            assert all(sample.finish_reason in ("error", "stop", "length") for sample in request.samples)
            for sample, (token_ids, *_) in zip(request.samples, whole[1], strict=True):
                assert sample.token_ids == token_ids[: len(sample.token_ids)]
    assert len(ended) < len(requests)
    assert [_outcome(request) for request in _run(engine, _requests(tiny))] == expected


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("op", OPS_OF_A_STEP)
@pytest.mark.parametrize("call", [1, 4, 9])
def test_K07_an_op_that_fails_once_costs_no_token(tiny, expected, monkeypatch, op, call):
    """Whether by one request's fault or nobody's: what survives has its tokens."""
    engine = _engine(tiny, prefill_chunk=42)
    requests = _requests(tiny)
    with monkeypatch.context() as patch:
        fail_at(patch, op, call, RuntimeError)
        _run(engine, requests)
    for request, whole in zip(requests, expected, strict=True):
        assert request.error is not None or _outcome(request) == whole
    assert sum(request.error is not None for request in requests) <= 2
    assert [_outcome(request) for request in _run(engine, _requests(tiny))] == expected


@pytest.mark.usefixtures("roles")
def test_K07_a_step_that_always_fails_ends_the_run_and_leaves_the_engine_usable(tiny, expected, monkeypatch):
    engine = _engine(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(OPS, "advance", lambda *_: 1 / 0)
        requests = _requests(tiny)
        for _ in engine.run(requests):
            pass
        assert all(isinstance(request.error, RequestFailedError) for request in requests)
        graph_run = engine.decoder.graph.run
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder.graph, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _run(engine, _requests(tiny))
    assert engine.decoder.graph.run == graph_run
    assert [_outcome(request) for request in _run(engine, _requests(tiny))] == expected


# --- callbacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("error", [KeyError("x"), RequestTimeoutError("mine"), StopIteration()])
def test_K08_a_callback_that_raises_ends_its_request_alone(tiny, expected, after, error):
    requests = _requests(tiny)
    calls = []

    def on_token(sample):
        calls.append(sample.token_ids[-1])
        if len(calls) == after:
            raise error

    requests[1].on_token = on_token
    _run(_engine(tiny), requests)
    assert len(calls) == after
    assert requests[1].samples[0].token_ids == expected[1][1][0][0][:after]
    assert requests[1].samples[0].finish_reason == "error"
    assert requests[1].error is error or requests[1].error.__cause__ is error
    for index in (0, 2, 3, 4):
        assert _outcome(requests[index]) == expected[index]


def test_K08_a_callback_sees_every_token_once_and_in_order(tiny, expected):
    requests = _requests(tiny)
    seen = {}
    for request in requests:
        request.on_token = lambda s: seen.setdefault((s.request.index, s.index), []).append(s.token_ids[-1])
    _run(_engine(tiny), requests)
    for request, (_, samples) in zip(requests, expected, strict=True):
        assert [seen.get((request.index, sample.index)) for sample in request.samples] == [one[0] for one in samples]


def test_K04_Ctrl_C_in_a_callback_interrupts_the_run(tiny, expected):
    engine, requests = _engine(tiny), _requests(tiny)

    def on_token(sample):
        raise KeyboardInterrupt

    requests[1].on_token = on_token
    with pytest.raises(KeyboardInterrupt):
        _run(engine, requests)
    assert [_outcome(request) for request in _run(engine, _requests(tiny))] == expected


def test_K08_a_text_that_cannot_be_decoded_ends_its_request_alone(tmp_path, monkeypatch):
    from llama_fast import LLM, SamplingParams
    from llama_fast.engine.request import StoppableText

    save_byte_model(tmp_path)
    llm = LLM(tmp_path, device="cpu", max_batch=4, max_seq_len=64)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in ("abc", "xyz")]
    plain, bad = StoppableText.push, []

    def push(self, token_id, may_stop):
        # The first text that gets so far; all that follows in it fails too.
        if len(self.text) >= 4 and not bad:
            bad.append(self)
        if self in bad:
            raise UnicodeError("no text")
        return plain(self, token_id, may_stop)

    monkeypatch.setattr(StoppableText, "push", push)
    monkeypatch.setattr(StoppableText, "finish", lambda self, may_stop: 1 / 0)
    outputs = llm.generate(["abc", "xyz"], params)
    failed = [output for output in outputs if isinstance(output.error, RequestFailedError)]
    assert failed
    assert all(output.outputs[0].finish_reason == "error" for output in failed)
    monkeypatch.undo()
    again = llm.generate(["abc", "xyz"], params)
    assert [output.outputs[0] for output in again] == alone


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.0, 1e-9])
def test_K09_a_deadline_that_is_over_ends_a_request_at_once(tiny, expected, timeout):
    requests = _requests(tiny)
    late = make_request(tiny, PROMPTS[1], 9, max_tokens=50)
    late.timeout = timeout
    requests.insert(0, late)
    _run(_engine(tiny), requests)
    assert isinstance(late.error, RequestTimeoutError)
    assert f"not done within timeout={timeout:g} seconds" in str(late.error)
    assert (late.samples[0].token_ids, late.samples[0].finish_reason) == ([], "error")
    assert [_outcome(request) for request in requests[1:]] == expected


def test_K09_a_deadline_keeps_the_tokens_before_it(tiny, monkeypatch):
    engine = _engine(tiny)
    (whole,) = _run(engine, [make_request(tiny, PROMPTS[1], 0, max_tokens=50)])
    now = time.monotonic()
    clock = iter(range(10**6))
    # A second a look, whatever the wall clock does.
    monkeypatch.setattr(time, "monotonic", lambda: now + next(clock))
    late = make_request(tiny, PROMPTS[1], 0, max_tokens=50)
    late.timeout = 30.0
    _run(engine, [late])
    assert isinstance(late.error, RequestTimeoutError)
    count = len(late.samples[0].token_ids)
    assert 0 < count < 50
    assert late.samples[0].token_ids == whole.samples[0].token_ids[:count]


# --- aborts -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("steps_ahead", [1, 3])
@pytest.mark.parametrize("after", range(0, 12, 2))
def test_K01_an_aborted_request_leaves_no_trace(tiny, expected, steps_ahead, after):
    """In every state: queued, at each chunk of its prompt, decoding, ended; twice; by another thread's way too."""
    for index in range(len(SPECS)):
        engine = _engine(tiny, steps_ahead=steps_ahead, prefill_chunk=9, max_batch=3)
        requests = _requests(tiny)
        steps = engine.run(requests)
        for _ in range(after):
            next(steps, None)
        (engine.abort if after % 4 else engine.abort_soon)(requests[index])
        engine.abort(requests[index])
        before = [list(sample.token_ids) for sample in requests[index].samples]
        for _ in steps:
            pass
        assert [list(sample.token_ids) for sample in requests[index].samples] == before
        assert engine.scheduler.allocator.num_free == engine.cache.num_pages
        for other, (request, whole) in enumerate(zip(requests, expected, strict=True)):
            if other != index:
                assert _outcome(request) == whole
            else:
                for sample, (token_ids, *_) in zip(request.samples, whole[1], strict=True):
                    assert sample.token_ids == token_ids[: len(sample.token_ids)]


# --- faults in between ------------------------------------------------------------------------------------------------


def _once(monkeypatch, owner, name, error, call=1):
    """The `call`-th use of `owner.name` raises."""
    plain, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise error("once")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("op", ["log_probs", "advance", "sample"])
@pytest.mark.parametrize("call", range(1, 8))
def test_K07_a_draw_that_fails_beside_a_half_run_prompt_loses_no_token(tiny, monkeypatch, op, call):
    """No prompt ends in that step, so nobody is at fault: rows that had gone on already draw again."""

    def requests():
        decoding = make_request(tiny, [3], 0, max_tokens=12, logprobs=1, temperature=1.0, seed=3)
        return [decoding, make_request(tiny, [i % 90 for i in range(60)], 1, max_tokens=4)]

    alone = [_outcome(_run(_engine(tiny), [request])[0]) for request in requests()]
    with monkeypatch.context() as patch:
        _once(patch, OPS, op, RuntimeError, call)
        together = _run(_engine(tiny, prefill_chunk=9), requests())
    for request, whole in zip(together, alone, strict=True):
        assert request.error is not None or _outcome(request) == whole


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("owner", ["copy_pages", "join", "allow_stops", "add_pages", "go_on", "grow", "rest"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_L02_memory_for_rows_and_pages_that_is_short_once(tiny, expected, monkeypatch, owner, call):
    from llama_fast.engine.decode_rows import DecodeRows
    from llama_fast.engine.decoder import Decoder

    where = {"copy_pages": OPS, "grow": Decoder}.get(owner, DecodeRows)
    requests = _requests(tiny)
    guessing = make_request(tiny, [4, 5, 6] * 4, 9, max_tokens=30, prompt_lookup_num_tokens=4)
    requests.insert(1, guessing)
    with monkeypatch.context() as patch:
        _once(patch, where, owner, MemoryError, call)
        _run(_engine(tiny), requests)
    failed = [request for request in requests if request.error is not None]
    assert len(failed) <= 1
    for request in requests:
        if request is not guessing and request.error is None:
            assert _outcome(request) == expected[request.index]


def test_L02_a_fork_without_memory_ends_its_request_alone(tiny, monkeypatch):
    requests = [make_request(tiny, [3], 0, max_tokens=4), make_request(tiny, [4, 5], 1, max_tokens=4, n=2, top_k=5)]
    with monkeypatch.context() as patch:
        _once(patch, OPS, "copy_pages", MemoryError)
        _run(_engine(tiny), requests)
    assert [type(request.error) for request in requests] == [type(None), OutOfMemoryError]


def test_L02_a_sample_that_fails_as_it_ends_gives_its_pages_back(tiny, monkeypatch):
    from llama_fast.engine import running

    requests = [make_request(tiny, [3], 0, max_tokens=4, logprobs=1), make_request(tiny, [4], 1, max_tokens=4)]
    with monkeypatch.context() as patch:
        _once(patch, running, "position_logprobs", MemoryError, 4)
        _run(_engine(tiny), requests)
    assert [type(request.error) for request in requests] == [OutOfMemoryError, type(None)]


def test_a_request_runs_once(tiny):
    engine = _engine(tiny)
    request = make_request(tiny, [3], 0, max_tokens=4)
    with pytest.raises(RequestError, match="has run already"):
        _run(engine, [request, request])
    with pytest.raises(RequestError, match="has run already"):
        _run(engine, [request])
    _run(engine, [make_request(tiny, [3], 0, max_tokens=4)])


def test_K04_an_abort_in_a_callback_and_then_Ctrl_C(tiny, monkeypatch):
    """The abort ends in order, the step around it does not."""
    engine = _engine(tiny)
    requests = [make_request(tiny, [3 + index], index, max_tokens=(30, 2, 30)[index]) for index in range(3)]
    requests[0].on_token = lambda sample: engine.abort(requests[2])
    finish = engine.scheduler.finish

    def interrupted(sequence):
        if sequence is requests[1].samples[0].sequence:
            raise KeyboardInterrupt
        finish(sequence)

    monkeypatch.setattr(engine.scheduler, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(engine, requests)
    _run(engine, [make_request(tiny, [3], 0, max_tokens=3)])


def test_K04_an_interrupt_while_a_session_is_cleaned_up(tiny, monkeypatch):
    engine = _engine(tiny)
    steps = engine.run([make_request(tiny, [3], 0, max_tokens=30)])
    next(steps)
    with monkeypatch.context() as patch:
        _once(patch, engine.decoder, "forget", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            steps.close()
    _run(engine, [make_request(tiny, [3], 0, max_tokens=3)])


def test_K04_an_interrupt_while_guesses_take_rows(tiny, expected, monkeypatch):
    """What a row's stop mask was made of is not known then."""
    from llama_fast.engine import decode_rows

    engine = _engine(tiny)

    class Interrupting(torch.Tensor):
        """A mask that is written, and then Ctrl-C."""

        def __setitem__(self, index, value):
            super().__setitem__(index, value)
            raise KeyboardInterrupt

    def interrupted(self, *args):
        masks, self.stop_mask = self.stop_mask, self.stop_mask.as_subclass(Interrupting)
        try:
            plain(self, *args)
        finally:
            self.stop_mask = masks

    plain = decode_rows.DecodeRows.guess

    stops = {"stop_token_ids": list(range(0, 97, 2)), "min_tokens": 3}
    _run(engine, [make_request(tiny, [3 + index], index, max_tokens=3, **stops) for index in range(4)])
    with monkeypatch.context() as patch:
        patch.setattr(decode_rows.DecodeRows, "guess", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(engine, [make_request(tiny, [5, 6, 7, 8] * 3, 0, max_tokens=30, prompt_lookup_num_tokens=3)])
    rows = engine.decoder.graph.rows
    for row, known in enumerate(rows._stops):
        assert known is None or sorted(known) == rows.stop_mask[row].nonzero()[:, 0].tolist()
    assert [_outcome(request) for request in _run(engine, _requests(tiny))] == expected

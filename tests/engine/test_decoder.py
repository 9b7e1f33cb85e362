"""Decoding ahead of the host: rows, buckets, pages and ends, with steps enqueued and not yet read, captured or not."""

import contextlib
import gc
import itertools
import weakref

import pytest
import torch

from llama_fast import LLM, SamplingParams
from llama_fast.engine import decode_rows
from llama_fast.engine.decode_graph import bucket_sizes
from llama_fast.engine.engine import Engine
from llama_fast.errors import BackendError, EngineDeadError, OutOfMemoryError, RequestError
from llama_fast.ops import replay, transfers
from tests.byte_model import save_byte_model
from tests.engine.graph_double import CapturingSteps, capturing
from tests.engine.step_watch import StepWatch
from tests.tiny import OPS, RecordingEngine, fail_at, make_model, make_request

PAGE, SPLIT = 8, 32
VOCAB = 97
PROMPTS = [[3], [5, 6, 7, 5, 6, 7, 8], [index * 31 % VOCAB for index in range(41)]]
# Every way to end and everything that a full step is for, with rows that need nothing beside them.
SPECS = [
    (PROMPTS[2], {"max_tokens": 6}),
    (PROMPTS[0], {"max_tokens": 9, "temperature": 1.2, "seed": 4}),
    (PROMPTS[1], {"max_tokens": 7, "temperature": 1.0, "seed": 8, "n": 2, "repetition_penalty": 1.3}),
    (PROMPTS[1], {"max_tokens": 12, "temperature": 1.5, "seed": 2, "stop_token_ids": list(range(0, VOCAB, 3))}),
    (PROMPTS[0], {"max_tokens": 12, "temperature": 1.5, "seed": 3, "stop_token_ids": list(range(40)), "min_tokens": 5}),
    (PROMPTS[2], {"max_tokens": 5, "logit_bias": {11: 4.0, 3: -100.0}, "logprobs": 3}),
    (PROMPTS[1], {"max_tokens": 1, "logprobs": 0}),
    (PROMPTS[2], {"max_tokens": 0, "prompt_logprobs": 1}),
    (PROMPTS[0], {"max_tokens": 10, "frequency_penalty": 0.5, "presence_penalty": 0.25}),
    (PROMPTS[1], {"max_tokens": 40, "temperature": 0.7, "seed": 11, "top_k": 9, "top_p": 0.9, "min_p": 0.01}),
]


@pytest.fixture(scope="module")
def tiny():
    return make_model()


def _engine(model, kind=RecordingEngine, **changes):
    return kind(model, **{"max_batch": 4, "page_size": PAGE, "split_size": SPLIT, "max_seq_len": 96, **changes})


def _requests(model):
    return [make_request(model, prompt, index, **params) for index, (prompt, params) in enumerate(SPECS)]


def _run(engine, requests):
    for _ in engine.run(requests):
        pass
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return requests


def _outcome(requests):
    """All that a caller sees."""
    return [
        (request.prompt_logprobs, [(s.token_ids, s.logprobs, s.finish_reason, s.stop_reason) for s in request.samples])
        for request in requests
    ]


@pytest.fixture(scope="module")
def expected(tiny):
    """One request at a time, one step at a time."""
    logits, outcomes = {}, []
    for request in _requests(tiny):
        engine = _engine(tiny, steps_ahead=1)
        logits |= engine.generate([request])
        outcomes += _outcome([request])
    reasons = [sample[2] for _, samples in outcomes for sample in samples]
    assert {"stop", "length"} <= set(reasons)
    return outcomes, logits


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("ahead", [1, 2, 3, 7])
def test_steps_ahead_and_buckets_change_nothing(tiny, expected, monkeypatch, ahead, captured):
    """Ten requests through four rows: they join, end on the device or the host, and give rows and pages to the next."""
    if captured:
        capturing(monkeypatch)
    # Pages are short, so that each is taken again as soon as it is free.
    engine = _engine(tiny, steps_ahead=ahead, cache_bytes=22 * 2 * 2 * 2 * PAGE * 16 * 4)
    requests = _requests(tiny)
    logits = engine.generate(requests)
    assert _outcome(requests) == expected[0]
    for key, (token_ids, rows) in logits.items():
        assert token_ids == expected[1][key][0] and torch.equal(rows, expected[1][key][1]), key


@pytest.mark.parametrize("ahead", [1, 4])
def test_plain_and_full_steps_give_the_same(tiny, expected, ahead):
    """Without a watcher of logits steps are plain where no row needs more."""
    engine, requests = _engine(tiny, Engine, steps_ahead=ahead), _requests(tiny)
    kinds = []
    run = engine.decoder.graph.run
    engine.decoder.graph.run = lambda size, full: (kinds.append(full), run(size, full))
    assert _outcome(_run(engine, requests)) == expected[0]
    assert set(kinds) == {False, True}


def test_control_a_row_that_is_not_told_of_its_token_shows(tiny, expected, monkeypatch):
    advance = OPS.advance

    def late(tokens, indices, rows, counted):
        before = rows.token_ids.clone()
        out = advance(tokens, indices, rows, counted)
        if indices is None and len(tokens) > 1:
            rows.token_ids[1] = before[1]
        return out

    monkeypatch.setattr(OPS, "advance", late)
    assert _outcome(_run(_engine(tiny, steps_ahead=3), _requests(tiny))) != expected[0]


def _watch_pages(engine):
    """Before a step is enqueued the page of each slot it will write is the sample's own, and no other sample's; rows
    without a sample are at rest. Returns the steps' sizes."""
    decoder, rows, run, steps = engine.decoder, engine.decoder.graph.rows, engine.decoder.graph.run, []
    page_size = engine.cache.page_size

    def watched(size, full):
        # A captured step runs rows behind the last sample's, too.
        for index, row in itertools.zip_longest(range(size), decoder._rows):
            slot = int(rows.slots[index])
            page = int(rows.page_table[index, slot // page_size])
            if row is None or rows.done[index]:
                assert (slot, page) == (0, engine.cache.spare_page)
            else:
                assert page == row.sample.sequence.pages[slot // page_size]
                assert engine.scheduler.allocator.holders(page) == 1
        steps.append(size)
        run(size, full)

    decoder.graph.run = watched
    return steps


# --- texts: what the device does not know -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.mark.parametrize("captured", [False, True])
def test_a_stop_string_in_the_middle_of_an_enqueued_run(byte_folder, monkeypatch, captured):
    """The host ends the sample late; what was enqueued behind is nobody's, and the next request gets its pages."""
    if captured:
        capturing(monkeypatch)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, logprobs=2)
    llm = LLM(byte_folder, max_batch=4, max_seq_len=128)
    whole = llm.generate("ab", params)[0].outputs[0]
    piece = next(text for text in (whole.text[k : k + 2] for k in range(8, 30)) if text.isprintable())
    prompts = ["cd", "e", "f", "ab", "ab", "cd"]
    stop = SamplingParams(max_tokens=30, temperature=1.0, seed=1, logprobs=2, stop=piece)
    every = [params, params, params, stop, stop, params]
    expected = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, every, strict=True)]
    assert expected[3].outputs[0].stop_reason == piece
    page_bytes = llm.engine.cache.page_bytes(llm.model.config, 64, torch.float32)
    for ahead in (1, 2, 5):
        small = LLM(byte_folder, steps_ahead=ahead, max_batch=4, max_seq_len=128, cache_bytes=8 * page_bytes)
        _watch_pages(small.engine)
        for one, other in zip(small.generate(prompts, every), expected, strict=True):
            assert one.outputs == other.outputs


# --- rows and steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (33, [1, 2, 4, 8, 16, 24, 32, 33]),
        (144, [1, 2, 4, *range(8, 129, 8), 144]),
        (320, [1, 2, 4, *range(8, 129, 8), *range(144, 257, 16), 288, 320]),
    ],
)
def test_bucket_sizes(max_batch, sizes):
    assert bucket_sizes(max_batch) == sizes


def test_the_smallest_bucket_that_holds_the_running_samples_is_replayed(tiny, monkeypatch):
    capturing(monkeypatch)
    engine = _engine(tiny, Engine, max_batch=9)
    assert engine.stats().captured == (1, 2, 4, 8, 9)
    sizes, live = [], []
    run = engine.decoder.graph.run

    def watched(size, full):
        live.append(len(engine.decoder.samples))
        sizes.append(size)
        # Behind the rows of this step nothing runs.
        assert not (engine.decoder.graph.rows.done[size:] == 0).any()
        run(size, full)

    engine.decoder.graph.run = watched
    budgets = [3, 9, 2, 5, 12, 2, 7, 4, 3]
    _run(engine, [make_request(tiny, PROMPTS[1], index, max_tokens=n) for index, n in enumerate(budgets)])
    # Tokens beyond the first are drawn by steps; nobody draws more than its own.
    assert live == [sum(budget > step for budget in budgets) for step in range(1, max(budgets))]
    assert sizes == [next(size for size in (1, 2, 4, 8, 9) if size >= count) for count in live]


def test_no_step_is_enqueued_behind_the_last_token(tiny):
    engine = _engine(tiny, Engine, steps_ahead=8)
    _run(engine, [make_request(tiny, PROMPTS[1], max_tokens=5)])
    assert engine.stats().decode_steps == 4
    _run(engine, [make_request(tiny, PROMPTS[1], max_tokens=1), make_request(tiny, PROMPTS[0], max_tokens=0)])
    assert engine.stats().decode_steps == 4


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5])
def test_stop_tokens_are_allowed_from_the_right_step_on(tiny, ahead, min_tokens):
    """A stop token that any step would draw comes as soon as it may: behind `min_tokens` others."""
    engine = _engine(tiny, Engine, steps_ahead=ahead)
    params = {"max_tokens": 9, "min_tokens": min_tokens, "stop_token_ids": [7], "logit_bias": {7: 100.0}}
    requests = _run(
        engine, [make_request(tiny, PROMPTS[1], 0, **params), make_request(tiny, PROMPTS[0], 1, max_tokens=20)]
    )
    token_ids = requests[0].samples[0].token_ids
    assert len(token_ids) == min_tokens + 1 and token_ids.index(7) == min_tokens
    assert requests[0].samples[0].finish_reason == "stop"


def test_steps_are_enqueued_before_the_first_is_read(tiny, monkeypatch):
    engine = _engine(tiny, Engine, steps_ahead=3)
    order = []
    for owner, name in ((engine.decoder.graph, "run"), (engine.decoder, "read"), (engine.decoder, "draw")):
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, m=method, n=name: (order.append(n), m(*a))[1])
    _run(engine, [make_request(tiny, PROMPTS[0], max_tokens=6)])
    assert order == ["draw", "run", "run", "read", "run", "read", "run", "read", "run", "read", "read", "read"]


@pytest.mark.parametrize("ahead", [1, 5])
def test_every_enqueued_step_finds_its_pages(tiny, ahead):
    engine = _engine(tiny, Engine, steps_ahead=ahead)
    steps = _watch_pages(engine)
    _run(engine, _requests(tiny))
    assert len(steps) > 20


def test_a_row_that_ended_writes_no_more(tiny, monkeypatch):
    """Its slots keep their bits while the steps that were enqueued behind its last token run."""
    stops = list(range(VOCAB))
    engine = _engine(tiny, Engine, steps_ahead=6)
    ends = make_request(tiny, PROMPTS[2], 0, max_tokens=30, stop_token_ids=stops, min_tokens=0)
    goes_on = make_request(tiny, PROMPTS[1], 1, max_tokens=30)
    states = []
    read = engine.decoder.read

    def reading():
        if not states:
            pages = ends.samples[0].sequence.pages
            states.append((pages, engine.cache.pool[:, :, pages].clone()))
            # Enough steps are on their way for the row to have written, if it did.
            assert engine.decoder.unread == 6
        return read()

    run = engine.decoder.graph.run
    before = []

    def first(size, full):
        if not before:
            before.append(engine.cache.pool[:, :, ends.samples[0].sequence.pages].clone())
        run(size, full)

    monkeypatch.setattr(engine.decoder, "read", reading)
    monkeypatch.setattr(engine.decoder.graph, "run", first)
    _run(engine, [ends, goes_on])
    assert ends.samples[0].token_ids and ends.samples[0].finish_reason == "stop"
    written = [torch.nan_to_num(pool, nan=7.0) for pool in (before[0], states[0][1])]
    assert torch.equal(*written)


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_an_aborted_request_leaves_the_others_as_they_are(tiny, expected, ahead, after):
    """Before it runs, with its prompt half in the cache, with steps enqueued: pages come back, tokens are kept."""
    engine, requests = _engine(tiny, Engine, steps_ahead=ahead, prefill_chunk=20), _requests(tiny)
    aborted = (0, 2, 9)
    for step, _ in enumerate(engine.run(requests)):
        if step == after:
            for index in aborted:
                engine.abort(requests[index])
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    for index, (got, whole) in enumerate(zip(_outcome(requests), expected[0], strict=True)):
        if index not in aborted:
            assert got == whole
            continue
        for (token_ids, _, reason, _), (all_ids, _, end, _) in zip(got[1], whole[1], strict=True):
            assert token_ids == all_ids[: len(token_ids)]
            assert reason == ("abort" if len(token_ids) < len(all_ids) else end)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_closed_stream_drops_what_is_enqueued(tiny, expected, steps):
    engine = _engine(tiny, Engine, steps_ahead=4)
    with contextlib.closing(engine.run(_requests(tiny))) as stream:
        for _ in itertools.islice(stream, steps):
            pass
    requests = _requests(tiny)
    assert _outcome(_run(engine, requests)) == expected[0]


# --- memory and faults ------------------------------------------------------------------------------------------------


def test_out_of_memory_at_capture_leaves_smaller_buckets(tiny, expected, monkeypatch, caplog):
    """The largest bucket's second graph and the next one's first find no memory: one message, fewer rows at once."""
    capturing(monkeypatch, out_of_memory=[2, 3])
    engine = _engine(tiny, Engine, max_batch=16)
    engine.make_ready()
    assert engine.stats().captured == (1, 2, 4) and engine.max_batch == 4
    messages = [record.message for record in caplog.records if "memory is left" in record.message]
    assert messages == ["memory is left to decode 4 sequences at once, not 16; lower cache_bytes for more"]
    assert _outcome(_run(engine, _requests(tiny))) == expected[0]
    with pytest.raises(RequestError, match="n=5 exceeds max_batch=4"):
        engine.check(make_request(tiny, PROMPTS[0], n=5, temperature=1.0))


def test_out_of_memory_at_every_capture_is_an_error(tiny, monkeypatch):
    capturing(monkeypatch, out_of_memory=range(1, 100))
    with pytest.raises(OutOfMemoryError, match="no memory is left to capture a decoding step; lower cache_bytes"):
        _engine(tiny, Engine).make_ready()


def test_another_error_at_capture_says_what_to_do(tiny, monkeypatch):
    capturing(monkeypatch)
    engine = _engine(tiny, Engine)

    def refusing(self, step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CapturingSteps, "make", refusing)
    message = "a decoding step cannot be captured .operation not permitted when .*; use graphs=False"
    with pytest.raises(BackendError, match=message):
        engine.make_ready()


def test_steps_are_captured_again_when_weights_change(monkeypatch):
    made = capturing(monkeypatch)
    model = make_model()
    engine = _engine(model, Engine)
    _run(engine, [make_request(model, PROMPTS[0], max_tokens=3)])
    count = made[0].captured
    _run(engine, [make_request(model, PROMPTS[0], max_tokens=3)])
    assert made[0].captured == count
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    changed = _run(engine, [make_request(model, PROMPTS[0], max_tokens=3)])
    assert made[0].captured == 2 * count
    assert _outcome(changed) == _outcome(_run(_engine(model, Engine), [make_request(model, PROMPTS[0], max_tokens=3)]))


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered", "Triton Error [CUDA]: x"])
def test_L05_after_a_device_error_the_engine_gives_no_token(tiny, monkeypatch, message):
    engine = _engine(tiny, Engine)
    with monkeypatch.context() as patch:
        fail_at(patch, "sample", 3, lambda _: torch.AcceleratorError(message))
        with pytest.raises(EngineDeadError, match="start a new process") as raised:
            _run(engine, [make_request(tiny, PROMPTS[0], max_tokens=9)])
        assert message in str(raised.value)
    # The device works again as far as this test goes; the engine does not try.
    with pytest.raises(EngineDeadError):
        next(engine.run([make_request(tiny, PROMPTS[0], max_tokens=9)]))
    with pytest.raises(EngineDeadError):
        engine.step()
    with pytest.raises(EngineDeadError):
        engine.make_ready()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "memory"),
        (MemoryError(), "memory"),
        (OutOfMemoryError("no pages"), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "fatal"),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), "fatal"),
        (BackendError("linear: CUDA error 700 (cudaErrorIllegalAddress: ...)"), "fatal"),
        (RuntimeError("shapes do not match"), "other"),
        (ValueError("CUDA error"), "other"),
    ],
)
def test_L05_which_errors_end_the_engine(error, kind):
    assert replay.is_out_of_memory(error) == (kind == "memory")
    assert replay.is_fatal(error) == (kind == "fatal")


def test_L04_without_pinned_memory_plain_memory_serves(monkeypatch, caplog):
    """One message, however often; on the device that is here the copy itself is a plain one."""

    def refusing(make):
        def made(*args, pin_memory=False, device=None, **kwargs):
            if pin_memory:
                raise RuntimeError("CUDA error: out of memory")
            return make(*args, **kwargs)

        return made

    monkeypatch.setattr(torch, "empty", refusing(torch.empty))
    monkeypatch.setattr(torch, "tensor", refusing(torch.tensor))
    cuda = torch.device("cuda")
    assert transfers.host_empty((2, 3), torch.int64, cuda).shape == (2, 3)
    assert transfers.to_device([1, 2], torch.int64, cuda).tolist() == [1, 2]
    assert [record.message for record in caplog.records] == [
        "no pinned memory (CUDA error: out of memory): host and device wait for each other"
    ]


# --- what stays, and what does not ------------------------------------------------------------------------------------


def test_an_engine_gives_its_memory_back_at_once(tiny):
    """Without the garbage collector: the next engine's cache may need the room."""
    engine = _engine(tiny, Engine)
    _run(engine, [make_request(tiny, PROMPTS[0], max_tokens=4)])
    alive = [weakref.ref(tensor) for tensor in (engine.cache.pool, engine.decoder.graph.rows.bias)]
    gc.disable()
    try:
        del engine
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_a_size_that_found_no_memory_leaves_none_taken(tiny, monkeypatch):
    """What its step had made would stand in the way of the smaller ones."""
    capturing(monkeypatch, out_of_memory=[1])
    made, sample = [], OPS.sample

    def sampling(logits, batch):
        made.append((len(logits), weakref.ref(logits)))
        if len(made) > 1 and made[-1][0] < 4:
            assert not any(ref() is not None for size, ref in made if size == 4)
        return sample(logits, batch)

    monkeypatch.setattr(OPS, "sample", sampling)
    engine = _engine(tiny, Engine)
    gc.disable()
    try:
        engine.make_ready()
    finally:
        gc.enable()
    assert engine.stats().captured == (1, 2)
    assert all(ref() is None for _, ref in made)


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_a_row_is_filled_leaves_no_stale_table(tiny, expected, monkeypatch, call, after):
    """Before or after any of the tables is written; the next run has other stop tokens, bias and penalties."""
    engine = _engine(tiny, Engine)
    fill, calls = decode_rows._set, []

    def interrupted(row, ids, values):
        calls.append(1)
        if len(calls) == call and not after:
            row.zero_()
            raise KeyboardInterrupt
        fill(row, ids, values)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decode_rows, "_set", interrupted)
        first = [
            {"logit_bias": {11: 50.0}, "stop_token_ids": [1, 2], "repetition_penalty": 1.5},
            {"stop_token_ids": list(range(40)), "min_tokens": 2, "frequency_penalty": 1.0},
        ]
        with pytest.raises(KeyboardInterrupt):
            _run(engine, [make_request(tiny, PROMPTS[1], i, max_tokens=9, **params) for i, params in enumerate(first)])
    assert _outcome(_run(engine, _requests(tiny))) == expected[0]


def test_a_model_that_another_backend_took_over_is_noticed(tiny):
    engine = _engine(tiny, Engine)
    stream = engine.run([make_request(tiny, PROMPTS[0], max_tokens=9)])
    next(stream)
    _run(_engine(tiny, Engine, backend="reference"), [make_request(tiny, PROMPTS[0], max_tokens=2)])
    with pytest.raises(RequestError, match="while this engine was generating; finish or close that stream first"):
        next(stream)
    again = [make_request(tiny, PROMPTS[0], max_tokens=9)]
    assert _run(engine, again)[0].samples[0].finish_reason == "length"


def test_rows_move_and_rest_without_waiting_for_the_device(tiny):
    """A number that is assigned to an element would be copied from the host."""
    rows = _engine(tiny, Engine).decoder.graph.rows
    watch = StepWatch()
    with torch.no_grad(), watch:
        rows.rest(1)
        rows.move(2, 0)
        rows.rest_all()
    assert "aten.fill_" in {name for name, _ in watch.calls}
    assert not any(places and places[0][2] == () for name, places in watch.calls if name == "aten.copy_")

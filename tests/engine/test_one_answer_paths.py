"""One answer, whatever the engine does with a request: preempted, begun from a shared prefix, guessed ahead, aborted
neighbours. Tokens, log probabilities and logits are bitwise those of the request alone in an engine that does none."""

import itertools
import random

import pytest
import torch

from llama_fast.engine.engine import Engine
from llama_fast.model.kv_cache import PagedKVCache
from tests.engine.graph_double import capturing
from tests.tiny import OPS, RecordingEngine, make_model, make_request

PAGE, SPLIT, VOCAB = 8, 32, 97
SYSTEM = [index * 31 % VOCAB for index in range(37)]
LOOP = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
SPECS = [
    ([*SYSTEM, 4, 9], {"max_tokens": 20}),
    ([*SYSTEM, 4], {"max_tokens": 25, "temperature": 1.2, "seed": 4}),
    ([*SYSTEM[:20], 1, 2, 3], {"max_tokens": 17, "temperature": 1.0, "seed": 8, "n": 3, "repetition_penalty": 1.3}),
    (LOOP, {"max_tokens": 30, "logprobs": 2}),
    ([3], {"max_tokens": 40, "temperature": 0.6, "seed": 1, "top_k": 7}),
    ([*SYSTEM, 4, 9], {"max_tokens": 12, "prompt_logprobs": 1}),
    ([*SYSTEM, 7] * 2, {"max_tokens": 6, "frequency_penalty": 0.5, "presence_penalty": 0.25}),
    ([9, 9, 9], {"max_tokens": 30, "temperature": 1.5, "seed": 3, "stop_token_ids": list(range(20)), "min_tokens": 11}),
    (LOOP, {"max_tokens": 24, "logit_bias": {11: 4.0, 3: -100.0}, "temperature": 0.4, "seed": 5}),
    (SYSTEM[:8], {"max_tokens": 3}),
    (SYSTEM[:9], {"max_tokens": 1, "logprobs": 0}),
    (SYSTEM[:16], {"max_tokens": 0, "prompt_logprobs": 0}),
]


@pytest.fixture(scope="module")
def tiny():
    return make_model(torch.bfloat16)


def _engine(model, *, pages=None, kind=RecordingEngine, **changes):
    sizes = {"max_batch": 6, "page_size": PAGE, "split_size": SPLIT, "max_seq_len": 88, **changes}
    if pages is not None:
        sizes["cache_bytes"] = pages * PagedKVCache.page_bytes(model.config, PAGE, model.dtype)
    engine = kind(model, **sizes)
    engine.cache.pool.fill_(torch.nan)
    return engine


def _requests(model, **more):
    return [make_request(model, prompt, index, **{**params, **more}) for index, (prompt, params) in enumerate(SPECS)]


def _outcome(request):
    samples = [(s.token_ids, s.logprobs, s.finish_reason, s.stop_reason) for s in request.samples]
    return request.prompt_logprobs, samples


def _generate(engine, requests):
    """Outcome of each request and, for each sample, the logits it drew from."""
    logits = {key: rows for key, (_, rows) in engine.generate(requests).items()}
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return [_outcome(request) for request in requests], logits


@pytest.fixture(scope="module")
def expected(tiny):
    outcomes, logits = [], {}
    for request in _requests(tiny):
        one, rows = _generate(_engine(tiny, prefix_caching=False, steps_ahead=1), [request])
        outcomes += one
        logits |= rows
    assert {"stop", "length"} <= {sample[2] for _, samples in outcomes for sample in samples}
    return outcomes, logits


def _assert_as_alone(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for key, rows in found[1].items():
        assert torch.equal(rows, expected[1][key]), f"logits of (request, sample) {key}"


@pytest.fixture(params=[True, False], ids=["shared_runs", "two_runs"])
def roles(request, monkeypatch):
    """Prompts and decoding samples in one pass, as on the CPU, or in two."""
    monkeypatch.setattr(OPS, "ROLES_SHARE_RUNS", request.param)


# --- preemption -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize(("steps_ahead", "prefix_caching"), [(1, True), (2, False), (5, True)])
@pytest.mark.parametrize("pages", [11, 13, 16])
def test_H02_a_preempted_request_goes_on_where_it_was(tiny, expected, pages, steps_ahead, prefix_caching):
    """The pool holds a few of the requests: others wait in the host's memory."""
    engine = _engine(tiny, pages=pages, steps_ahead=steps_ahead, prefix_caching=prefix_caching, prefill_chunk=23)
    requests = _requests(tiny)
    found = _generate(engine, requests)
    assert engine.stats().preempted or pages == 16 or steps_ahead == 5
    assert sum(request.metrics.preempted for request in requests) == engine.stats().preempted
    _assert_as_alone(found, expected)
    assert not engine._running._on_host


def test_H02_ten_times_more_than_the_pool_holds(tiny):
    prompts = [[index, *SYSTEM[: index % 19]] for index in range(60)]
    params = {"max_tokens": 20, "temperature": 1.0, "seed": 3}
    needed = sum(-(-(len(prompt) + 19) // PAGE) for prompt in prompts)
    engine = _engine(tiny, pages=needed // 10, max_batch=16, kind=Engine, max_seq_len=64)
    assert needed >= 10 * engine.cache.num_pages
    requests = [make_request(tiny, prompt, index, **params) for index, prompt in enumerate(prompts)]
    for _ in engine.run(requests):
        pass
    assert engine.stats().preempted
    for index in range(0, 60, 7):
        alone = make_request(tiny, prompts[index], index, **params)
        for _ in _engine(tiny, kind=Engine).run([alone]):
            pass
        assert _outcome(alone) == _outcome(requests[index])


@pytest.mark.parametrize("copy", ["copy_out", "copy_in"])
def test_H02_a_copy_that_is_not_the_pages_shows(tiny, expected, monkeypatch, copy):
    """The negative control: one number of one page is another after the way to the host and back."""
    plain = getattr(PagedKVCache, copy)

    def wrong(self, *args):
        kept = plain(self, *args)
        (kept if copy == "copy_out" else self.pool[:, :, args[1]])[..., 0].mul_(2)
        if copy == "copy_in" and args[1]:
            self.pool[:, :, args[1][0], 0, 0, 0] *= 2
        return kept

    monkeypatch.setattr(PagedKVCache, copy, wrong)
    engine = _engine(tiny, pages=12)
    found = _generate(engine, _requests(tiny))
    assert engine.stats().preempted
    with pytest.raises(AssertionError):
        _assert_as_alone(found, expected)


@pytest.mark.parametrize("copy", ["copy_out", "copy_in"])
def test_L02_a_preempted_request_without_memory_on_the_host_ends_alone(tiny, expected, monkeypatch, copy):
    plain, calls = getattr(PagedKVCache, copy), []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return plain(self, *args)

    monkeypatch.setattr(PagedKVCache, copy, failing)
    requests = _requests(tiny)
    found = _generate(_engine(tiny, pages=12, prefix_caching=False), requests)
    failed = [request.index for request in requests if request.error is not None]
    assert len(failed) == 1
    for index, (got, whole) in enumerate(zip(found[0], expected[0], strict=True)):
        assert (got == whole) == (index not in failed)


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("steps_ahead", [1, 2, 3])
def test_prompts_that_end_in_every_step_do_not_keep_others_from_decoding(tiny, steps_ahead):
    """A prompt's first draw takes no turn of those that decode: at most every other step reads only."""
    engine = _engine(tiny, steps_ahead=steps_ahead, kind=Engine, prefill_chunk=5, max_batch=3)
    long = make_request(tiny, [3], 0, max_tokens=80)
    with engine.session():
        engine.make_ready()
        engine.add(long)
        engine.step()
        before = len(long.samples[0].token_ids)
        for index in range(1, 41):
            engine.add(make_request(tiny, [index], index, max_tokens=1))
        for _ in range(40):
            engine.step()
        assert len(long.samples[0].token_ids) - before >= 19


# --- shared prefixes --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("steps_ahead", [1, 3])
@pytest.mark.parametrize("prefill_chunk", [11, 512])
def test_H06_a_prompt_that_begins_like_earlier_ones_gives_the_same_bits(tiny, expected, steps_ahead, prefill_chunk):
    engine = _engine(tiny, steps_ahead=steps_ahead, prefill_chunk=prefill_chunk)
    for again in range(2):
        requests = _requests(tiny)
        _assert_as_alone(_generate(engine, requests), expected)
        shared = sum(request.metrics.shared_tokens for request in requests)
        # 4 full pages for the second request on, also within the first run; all prompts of the second but two scored.
        assert shared >= (8 * PAGE if not again else 20 * PAGE)
    assert engine.stats().shared_tokens > 20 * PAGE


def test_H06_pages_that_were_overwritten_are_run_again(tiny, expected):
    engine = _engine(tiny, pages=12)
    for _ in range(2):
        _assert_as_alone(_generate(engine, _requests(tiny)), expected)


def test_H06_a_page_of_another_content_shows(tiny, expected):
    """The negative control: what a known page holds is changed behind the engine's back."""
    engine = _engine(tiny)
    _generate(engine, _requests(tiny))
    engine.cache.pool.mul_(1.5)
    with pytest.raises(AssertionError):
        _assert_as_alone(_generate(engine, _requests(tiny)), expected)


def test_new_weights_use_no_page_of_the_old_ones(tiny, expected):
    model = make_model(tiny.dtype, seed=3)
    engine = _engine(model)
    _generate(engine, _requests(model))
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), tiny.parameters(), strict=True):
            parameter.copy_(other)
    _assert_as_alone(_generate(engine, _requests(model)), expected)


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_H05_a_prefix_that_is_rotated_otherwise_is_another(rope):
    """dynamic and longrope rotate a prompt by its length: long prompts share nothing with short ones."""
    rope = {"rope_theta": 1e4, **rope}
    if rope["rope_type"] == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + index for index in range(8)]}
        rope |= {**factors, "original_max_position_embeddings": 40, "factor": 4.0}
    model = make_model(max_position_embeddings=40, rope_parameters=rope)
    prompts = [SYSTEM[:30], [*SYSTEM, 1, 2, 3, 4, 5, 6], [*SYSTEM[:30], 5], [*SYSTEM, 1, 2, 3, 4, 5, 6, 7]]
    engine = _engine(model, max_seq_len=80)
    requests = [make_request(model, prompt, index, max_tokens=9) for index, prompt in enumerate(prompts)]
    together = {}
    for request in requests:
        together |= engine.generate([request])
        alone = _engine(model, max_seq_len=80, prefix_caching=False)
        again = make_request(model, prompts[request.index], request.index, max_tokens=9)
        for key, (tokens, logits) in alone.generate([again]).items():
            assert together[key][0] == tokens
            assert torch.equal(together[key][1], logits)
    shared = [request.metrics.shared_tokens for request in requests]
    assert shared[:2] == [0, 0]
    assert shared[2] == 24


def test_H05_salts_keep_requests_apart(tiny):
    engine = _engine(tiny, kind=Engine)
    shared = []
    for salt in ("", "a", "b", "a", ""):
        request = make_request(tiny, SYSTEM, max_tokens=2)
        request.cache_salt = salt
        for _ in engine.run([request]):
            pass
        shared.append(request.metrics.shared_tokens)
    assert shared == [0, 0, 0, 32, 32]


def test_H07_a_page_that_is_free_is_read_by_nobody(tiny, expected):
    """Free pages are poisoned before every step; those that are known may be read again, so they are left out."""
    engine = _engine(tiny, pages=24)
    plain = engine._running.scheduler.plan

    def planning():
        plan = plain()
        allocator = engine.scheduler.allocator
        free = [page for page in range(engine.cache.num_pages) if not allocator.holders(page)]
        preempted = {page for _, pages in plan.preempted for page in pages}
        engine.cache.pool[:, :, [p for p in free if p not in allocator._idle and p not in preempted]] = torch.nan
        return plan

    engine._running.scheduler.plan = planning
    _assert_as_alone(_generate(engine, _requests(tiny)), expected)


# --- guesses ----------------------------------------------------------------------------------------------------------

GUESSING = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("steps_ahead", "max_batch"), [(1, 6), (2, 12), (4, 5)])
def test_guesses_change_no_bit(tiny, expected, monkeypatch, steps_ahead, max_batch, captured):
    if captured:
        capturing(monkeypatch)
    requests = _requests(tiny, **GUESSING)
    engine = _engine(tiny, steps_ahead=steps_ahead, max_batch=max_batch, kind=Engine)
    for _ in engine.run(requests):
        pass
    assert [_outcome(request) for request in requests] == expected[0]
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    guessed = sum(request.metrics.guessed for request in requests)
    right = sum(request.metrics.guessed_right for request in requests)
    assert 0 < right <= guessed


def test_guesses_are_right_where_text_repeats_itself(tiny):
    """A model that always says the same: nearly every step gives more than one token."""
    model = make_model(tiny.dtype)
    model.lm_head.weight.zero_()  # all logits are 0, and of equal ones the lowest id is taken
    engine = _engine(model, max_batch=16, kind=Engine)
    request = make_request(model, LOOP, max_tokens=60, prompt_lookup_num_tokens=8)
    for _ in engine.run([request]):
        pass
    assert request.samples[0].token_ids == [0] * 60
    # The first few tokens stood nowhere before; then 5, and 9 at once.
    assert engine.stats().decode_steps <= 14
    assert request.metrics.guessed_right >= 45


def test_a_guess_that_is_taken_unseen_shows(tiny, expected, monkeypatch):
    """The negative control: guesses count whatever was drawn."""
    from llama_fast.engine.decoder import Decoder

    plain = Decoder._read_guesses

    def trusting(self, draw, token_ids, scores):
        for place, guess in draw.guesses.items():
            for one, token_id in zip([place, *guess.places], guess.token_ids, strict=False):
                token_ids[one] = token_id
        return plain(self, draw, token_ids, scores)

    monkeypatch.setattr(Decoder, "_read_guesses", trusting)
    requests = _requests(tiny, **GUESSING)
    for _ in _engine(tiny, kind=Engine).run(requests):
        pass
    assert [_outcome(request) for request in requests] != expected[0]


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("roles")
@pytest.mark.parametrize("seed", range(6))
def test_K11_everything_at_once(tiny, expected, seed):
    """A short pool, guesses, shared prefixes, priorities, and neighbours that are aborted at any time."""
    draw = random.Random(seed)
    engine = _engine(
        tiny,
        pages=draw.choice([11, 14, 40]),
        steps_ahead=draw.choice([1, 2, 3]),
        prefill_chunk=draw.choice([5, 17, 64]),
        max_batch=draw.choice([3, 4, 8]),
        kind=Engine,
    )
    for _ in range(2):
        guessing = GUESSING if draw.random() < 0.7 else {}
        requests = _requests(tiny, **guessing)
        doomed = [make_request(tiny, draw.choice(SPECS[:5])[0], 100 + i, max_tokens=25, **guessing) for i in range(6)]
        for request in requests:
            request.priority = draw.choice([0, 0, 1])
        queue = [*requests, *doomed]
        draw.shuffle(queue)
        aborted = set()
        with engine.session():
            engine.make_ready()
            for step in itertools.count():
                while queue and draw.random() < 0.5:
                    engine.add(queue.pop())
                victim = draw.choice(doomed)
                if draw.random() < 0.1 and victim not in queue:
                    aborted.add(victim.index)
                    engine.abort(victim)
                if not queue and not engine.has_work:
                    break
                engine.step()
                assert step < 5000
        assert engine.scheduler.allocator.num_free == engine.cache.num_pages
        assert [_outcome(request) for request in requests] == expected[0]
        assert aborted

"""The engine against naive loops: transformers' full forward over the whole sequence for every token, rules by hand."""

import collections
import copy
import math

import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_fast.engine import memory
from llama_fast.engine.engine import Engine
from llama_fast.engine.sampling import GenerationDefaults
from llama_fast.errors import (
    BackendError,
    ContextLengthError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    RequestError,
)
from tests.tiny import OPS, RecordingEngine, fail_at, make_model, make_request, op_by_op

PAGE, SPLIT = 8, 32  # small, so that short prompts cross pages and splits
VOCAB = 97
PROMPTS = [[3], [5, 6, 7, 5, 6, 7, 8], [index * 31 % VOCAB for index in range(41)]]
# Logits of the two implementations differ by less than 1e-5 here: a choice this clear must be the same.
CLEAR = 1e-4
_MASK = 0xFFFFFFFF


@pytest.fixture(scope="module")
def tiny():
    return make_model()


def _transformers_logits(model):
    """transformers on the same weights: token ids -> raw logits at every position, fp32 [len(ids), vocab_size]."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(model.config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict())

    @torch.no_grad()
    def logits(ids):
        return theirs(torch.tensor([ids])).logits[0].float()

    return logits


@pytest.fixture(scope="module")
def oracle(tiny):
    return _transformers_logits(tiny)


def _engine(model, **changes):
    engine = RecordingEngine(model, **{"max_batch": 8, "page_size": PAGE, "split_size": SPLIT, **changes})
    engine.recorded = {}
    return engine


def _finish(engine, requests):
    for _ in engine.run(requests):
        pass
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    return requests


def _tokens(model, prompts, engine=None, **params):
    """Token ids of each prompt's first sample, generated together."""
    requests = [make_request(model, prompt, index, **params) for index, prompt in enumerate(prompts)]
    return [request.samples[0].token_ids for request in _finish(engine or _engine(model), requests)]


def _naive(oracle, prompt, max_tokens, scores):
    """A token at a time: `scores(logits, ids, generated)` of the whole sequence's last position, then argmax."""
    ids = list(prompt)
    for _ in range(max_tokens):
        row = scores(oracle(ids)[-1], ids, ids[len(prompt) :])
        best, second = row.topk(2).values.tolist()
        assert best - second > CLEAR, "too close to call: change the prompt or seed"
        ids.append(int(row.argmax()))
    return ids[len(prompt) :]


def _raw(logits, ids, generated):
    return logits


def test_G9_greedy_is_the_argmax_of_transformers(tiny, oracle):
    assert _tokens(tiny, PROMPTS, max_tokens=12) == [_naive(oracle, prompt, 12, _raw) for prompt in PROMPTS]


# --- sampling ---------------------------------------------------------------------------------------------------------


def _gumbel(seed, sample_index, position, token_id):
    """The documented noise in Python's integers and doubles: Philox 4x32-10, first word, -log(-log1p(-u))."""
    a, b, c, d = sample_index, position & _MASK, position >> 32, token_id
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k0, right & _MASK, (left >> 32) ^ d ^ k1, left & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    u = min(max((a >> 1) * 2.0**-31, 2.0**-31), 1 - 2.0**-24)
    return -math.log(-math.log1p(-u))


def _drawn(seed, warpers, sample_index=0):
    """Scores whose argmax is the documented draw: transformers' filters, then Gumbel noise."""

    def scores(logits, ids, generated):
        kept = LogitsProcessorList(warpers)(torch.tensor([ids]), logits[None])[0].double()
        noise = [_gumbel(seed, sample_index, len(ids), token_id) for token_id in range(VOCAB)]
        return kept + torch.tensor(noise, dtype=torch.float64)

    return scores


SAMPLED = {
    "temperature": ({"temperature": 1.3}, [TemperatureLogitsWarper(1.3)]),
    "top_k": ({"temperature": 1.0, "top_k": 5}, [TopKLogitsWarper(5)]),
    "top_p": ({"temperature": 1.5, "top_p": 0.6}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.6)]),
    "min_p": ({"temperature": 0.8, "min_p": 0.2}, [TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.2)]),
    "all": (
        {"temperature": 2.0, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
        [TemperatureLogitsWarper(2.0), TopKLogitsWarper(30), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)],
    ),
}


@pytest.mark.parametrize("seed", [7, 2**64 - 1])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_tokens_are_the_documented_draw(tiny, oracle, name, seed):
    params, warpers = SAMPLED[name]
    expected = [_naive(oracle, prompt, 5, _drawn(seed, warpers)) for prompt in PROMPTS[:2]]
    assert _tokens(tiny, PROMPTS[:2], max_tokens=5, seed=seed, **params) == expected


@pytest.mark.parametrize("name", SAMPLED)
def test_G07_a_seed_repeats_and_another_differs(tiny, name):
    params = {**SAMPLED[name][0], "max_tokens": 16}
    first, second = (_tokens(tiny, [PROMPTS[1]] * 3, seed=5, **params) for _ in range(2))
    assert first == second
    assert first[0] == first[1] == first[2]  # the same seed thrice in a batch
    assert _tokens(tiny, [PROMPTS[1]], seed=6, **params) != first[:1]


def test_unseeded_requests_draw_from_torchs_generator(tiny):
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(_tokens(tiny, [PROMPTS[1]] * 2, max_tokens=16, temperature=1.0))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]  # each request has a seed of its own


def test_G21_samples_of_a_request_are_the_documented_draws(tiny, oracle):
    (request,) = _finish(_engine(tiny), [make_request(tiny, PROMPTS[1], n=3, max_tokens=4, temperature=1.0, seed=9)])
    assert [sample.token_ids for sample in request.samples] == [
        _naive(oracle, PROMPTS[1], 4, _drawn(9, [], sample_index)) for sample_index in range(3)
    ]


# --- penalties, bias, budgets -----------------------------------------------------------------------------------------


def _penalised(repetition=1.0, frequency=0.0, presence=0.0, bias=()):
    def scores(logits, ids, generated):
        row = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([ids]), logits[None].clone())[0]
        for token_id in set(generated):
            row[token_id] -= frequency * generated.count(token_id) + presence
        for token_id, value in dict(bias).items():
            row[token_id] += value
        return row

    return scores


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.6},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"presence_penalty": 1.5},
        {"logit_bias": {4: 3.0, 96: 2.5, 0: -100.0}},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.4, "logit_bias": {7: 1.5}},
    ],
    ids=lambda params: "-".join(params),
)
def test_G10_penalties_and_bias_against_naive_ones(tiny, oracle, params):
    """Repetition counts prompt and output, frequency and presence the output alone."""
    rule = _penalised(
        *(
            params.get(f"{name}_penalty", 1.0 if name == "repetition" else 0.0)
            for name in ("repetition", "frequency", "presence")
        ),
        params.get("logit_bias", {}),
    )
    expected = [_naive(oracle, prompt, 10, rule) for prompt in PROMPTS]
    assert _tokens(tiny, PROMPTS, max_tokens=10, **params) == expected
    assert expected != _tokens(tiny, PROMPTS, max_tokens=10)  # they change something


def test_rows_with_and_without_penalties_share_a_batch(tiny, oracle):
    """A neutral row beside a penalised and a biased one is plain greedy."""
    changes = [{}, {"repetition_penalty": 1.4}, {"logit_bias": {4: 50.0}}]
    requests = [make_request(tiny, PROMPTS[1], index, max_tokens=6, **change) for index, change in enumerate(changes)]
    tokens = [request.samples[0].token_ids for request in _finish(_engine(tiny), requests)]
    rules = [_raw, _penalised(1.4), _penalised(bias={4: 50.0})]
    assert tokens == [_naive(oracle, PROMPTS[1], 6, rule) for rule in rules]


def test_G05_bias_forces_and_forbids(tiny):
    (plain,) = _tokens(tiny, PROMPTS[:1], max_tokens=6)
    assert _tokens(tiny, PROMPTS[:1], max_tokens=6, logit_bias={11: 100.0}) == [[11] * 6]
    (without,) = _tokens(tiny, PROMPTS[:1], max_tokens=6, logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(plain) & set(without)


@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_G13_min_tokens_forbids_every_stop_id(tiny, oracle, min_tokens):
    """The ids that greedy would choose end the text; below min_tokens the next best is taken."""
    ends = set(_naive(oracle, PROMPTS[1], 3, _raw))

    def scores(logits, ids, generated):
        return logits.index_fill(0, torch.tensor(sorted(ends)), -math.inf) if len(generated) < min_tokens else logits

    expected = _naive(oracle, PROMPTS[1], 8, scores)
    stop = next((place for place, token_id in enumerate(expected) if token_id in ends), None)
    expected = expected if stop is None else expected[: stop + 1]
    eos, *others = sorted(ends)
    request = make_request(
        tiny,
        PROMPTS[1],
        defaults=GenerationDefaults(eos_token_id=eos),
        stop_token_ids=others,
        max_tokens=8,
        min_tokens=min_tokens,
    )
    sample = _finish(_engine(tiny), [request])[0].samples[0]
    assert sample.token_ids == expected
    assert (sample.finish_reason, sample.stop_reason) == (("length", None) if stop is None else ("stop", expected[-1]))


@pytest.mark.parametrize(
    ("file_eos", "params", "ends_at"),
    [
        (None, {}, None),
        ("third", {}, 3),
        (["second", "third"], {}, 2),
        ("second", {"ignore_eos": True}, None),
        ("second", {"ignore_eos": True, "stop_token_ids": ["third"]}, 3),
        ("third", {"stop_token_ids": ["first"]}, 1),
    ],
)
def test_G13_eos_and_stop_ids(tiny, file_eos, params, ends_at):
    (plain,) = _tokens(tiny, PROMPTS[2:], max_tokens=6)
    assert len(set(plain[:3])) == 3
    by_name = dict(zip(("first", "second", "third"), plain, strict=False))
    eos = [by_name[name] for name in file_eos] if isinstance(file_eos, list) else by_name.get(file_eos)
    params = {**params, "stop_token_ids": [by_name[name] for name in params.get("stop_token_ids", [])]}
    request = make_request(tiny, PROMPTS[2], defaults=GenerationDefaults(eos_token_id=eos), max_tokens=6, **params)
    sample = _finish(_engine(tiny), [request])[0].samples[0]
    assert sample.token_ids == plain[:ends_at]
    assert sample.finish_reason == ("length" if ends_at is None else "stop")


def test_H04_without_max_tokens_the_context_is_filled(tiny):
    engine = _engine(tiny, max_seq_len=20)
    (request,) = _finish(engine, [make_request(tiny, PROMPTS[1], max_seq_len=20)])
    sample = request.samples[0]
    assert (len(request.prompt_token_ids) + len(sample.token_ids), sample.finish_reason) == (20, "length")
    assert sample.token_ids == _tokens(tiny, PROMPTS[1:2], max_tokens=13)[0]


# --- log probabilities ------------------------------------------------------------------------------------------------


def _assert_logprobs(position, row, token_id, num_top):
    """`position` holds the chosen token and the best `num_top` of `row`, raw logits [vocab_size] of transformers."""
    expected = row.double().log_softmax(-1)
    order = expected.argsort(descending=True).tolist()
    assert set(position) == {token_id, *order[:num_top]}
    for other, entry in position.items():
        assert entry.logprob == pytest.approx(expected[other].item(), abs=1e-4)
        assert entry.rank == order.index(other) + 1


@pytest.mark.parametrize("num_top", [0, 1, 5, 128])
def test_logprobs_are_those_of_the_raw_distribution(tiny, oracle, num_top):
    """Also of a token far down that a penalty, a bias and a high temperature brought up; a neighbour wants others."""
    requests = [
        make_request(
            tiny,
            PROMPTS[1],
            0,
            max_tokens=8,
            logprobs=num_top,
            temperature=5.0,
            seed=3,
            repetition_penalty=1.7,
            logit_bias=dict.fromkeys(range(0, VOCAB, 3), -5.0),
        ),
        make_request(tiny, PROMPTS[2], 1, max_tokens=3, logprobs=3),
        make_request(tiny, PROMPTS[0], 2, max_tokens=3),
    ]
    _finish(_engine(tiny), requests)
    for request, wanted in ((requests[0], num_top), (requests[1], 3)):
        sample = request.samples[0]
        rows = oracle(request.prompt_token_ids + sample.token_ids)[len(request.prompt_token_ids) - 1 : -1]
        assert len(sample.logprobs) == len(sample.token_ids)
        for position, row, token_id in zip(sample.logprobs, rows, sample.token_ids, strict=True):
            _assert_logprobs(position, row, token_id, wanted)
    assert (
        max(
            position[token_id].rank
            for position, token_id in zip(
                requests[0].samples[0].logprobs, requests[0].samples[0].token_ids, strict=True
            )
        )
        > 10
    )
    assert requests[2].samples[0].logprobs is None


@pytest.mark.parametrize("prefill_chunk", [9, 512])
def test_prompt_logprobs_with_max_tokens_0(tiny, oracle, prefill_chunk):
    """70 tokens: over the border of what is scored at once."""
    prompt = [index * 13 % VOCAB for index in range(70)]
    requests = [
        make_request(tiny, prompt, 0, max_tokens=0, prompt_logprobs=2),
        make_request(tiny, PROMPTS[1], 1, max_tokens=2, prompt_logprobs=0, temperature=1.0, n=2, seed=1),
        make_request(tiny, [4], 2, max_tokens=0, prompt_logprobs=5),
        make_request(tiny, [4], 3, max_tokens=0),
    ]
    _finish(_engine(tiny, prefill_chunk=prefill_chunk), requests)
    for request in requests[:3]:
        ids, entries = request.prompt_token_ids, request.prompt_logprobs
        assert len(entries) == len(ids)
        assert entries[0] is None
        for entry, row, token_id in zip(entries[1:], oracle(ids)[:-1], ids[1:], strict=True):
            _assert_logprobs(entry, row, token_id, request.sampling.prompt_logprobs)
    for request in (requests[0], requests[2], requests[3]):
        assert (request.samples[0].token_ids, request.samples[0].finish_reason) == ([], "length")
    assert requests[3].prompt_logprobs is None


# --- batching and pages -----------------------------------------------------------------------------------------------


def test_samples_share_the_prompts_pages_and_all_are_freed(tiny):
    """The counts of every page after every step are exactly its holders (H08)."""
    engine = _engine(tiny, max_batch=5)
    request = make_request(tiny, PROMPTS[2], n=4, max_tokens=9, temperature=1.5, seed=2)
    other = make_request(tiny, PROMPTS[1], 1, max_tokens=3)
    shared_at_once = 0
    for _ in engine.run([request, other]):
        running, allocator = engine.scheduler.running, engine.scheduler.allocator
        held = collections.Counter(page for sequence in running for page in sequence.pages)
        assert [allocator.holders(page) for page in range(engine.cache.num_pages)] == [
            held[page] for page in range(engine.cache.num_pages)
        ]
        shared_at_once = max(shared_at_once, sum(count == 4 for count in held.values()))
    assert shared_at_once == len(PROMPTS[2]) // PAGE  # its full pages, by all four
    assert len({tuple(sample.token_ids) for sample in request.samples}) == 4
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages


def test_five_ops_a_layer_and_one_token_a_running_sequence(tiny, monkeypatch):
    """Every call into the backend is counted; a decode step runs one token of each sequence that runs."""
    calls, token_counts = collections.Counter(), []

    def count(name):
        op = getattr(OPS, name)

        def counting(*args, **kwargs):
            calls[name] += 1
            if name == "embed":
                token_counts.append(args[0].numel())
            return op(*args, **kwargs)

        monkeypatch.setattr(OPS, name, counting)

    op_by_op(monkeypatch)
    layer_ops = ("norm_qkv_rope_cache", "attention", "linear_residual", "norm_gate_up_act")
    for name in (*layer_ops, "embed", "norm_lm_head", "sample", "log_probs", "copy_pages", "prepare_linear"):
        count(name)
    layers = tiny.config.num_hidden_layers
    a_step = {
        "embed": 1,
        "norm_qkv_rope_cache": layers,
        "attention": layers,
        "linear_residual": 2 * layers,
        "norm_gate_up_act": layers,
        "norm_lm_head": 1,
        "sample": 1,
    }
    engine = _engine(tiny)
    _finish(engine, [make_request(tiny, [1], max_tokens=1)])  # prepares the weights
    calls.clear()
    token_counts.clear()
    budgets = [2, 4, 7]
    requests = [make_request(tiny, PROMPTS[index], index, max_tokens=budget) for index, budget in enumerate(budgets)]
    requests.append(make_request(tiny, PROMPTS[1], 3, max_tokens=5, n=3, temperature=1.0, seed=1))
    for step, _ in enumerate(engine.run(requests), start=1):
        assert calls == a_step | ({"copy_pages": 1} if step == 1 else {})
        calls.clear()
    budgets += [5, 5, 5]
    # The step that runs the prompts gives the first token of each; step s gives token s.
    assert token_counts == [
        sum(len(request.prompt_token_ids) for request in requests),
        *(sum(budget >= step for budget in budgets) for step in range(2, max(budgets) + 1)),
    ]


def _specs():
    """Requests that share steps: long and short, greedy and sampled, one with several samples."""
    return [
        (PROMPTS[2], {"max_tokens": 6}),
        (PROMPTS[0], {"max_tokens": 9, "temperature": 1.2, "seed": 4}),
        (PROMPTS[1], {"max_tokens": 7, "temperature": 1.0, "seed": 8, "n": 2, "repetition_penalty": 1.3}),
    ]


def _requests(model, **common):
    return [
        make_request(model, prompt, index, **{**params, **common}) for index, (prompt, params) in enumerate(_specs())
    ]


def _assert_same(results, expected):
    assert results.keys() == expected.keys()
    for key, (tokens, logits) in results.items():
        assert tokens == expected[key][0], key
        assert torch.equal(logits, expected[key][1]), key


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_H07_stale_cache_contents_are_never_read(model, poison):
    """The whole pool is poisoned at the start, and after each step every page that is free."""
    expected = _engine(model, prefill_chunk=20).generate(_requests(model))
    engine = _engine(model, prefill_chunk=20)
    engine.cache.pool.fill_(poison)
    requests = _requests(model)
    for _ in engine.run(requests):
        allocator = engine.scheduler.allocator
        free = [page for page in range(engine.cache.num_pages) if not allocator.holders(page)]
        engine.cache.pool[:, :, free] = poison
    results = {
        (request.index, sample.index): (sample.token_ids, torch.stack(engine.recorded[request.index, sample.index]))
        for request in requests
        for sample in request.samples
    }
    _assert_same(results, expected)


def test_H07_negative_control_poison_in_a_used_page_shows(tiny):
    engine = _engine(tiny)
    request = make_request(tiny, PROMPTS[2], max_tokens=4)
    for _ in engine.run([request]):
        engine.cache.pool.fill_(math.nan)
    assert request.samples[0].finish_reason == "error"


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "replaced"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_changed_between_calls_are_used(name, replaced):
    model = make_model()
    engine = _engine(model)
    before = engine.generate(_requests(model))
    old = model.get_parameter(name)
    change = torch.randn(old.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    if replaced:
        model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(old + change, requires_grad=False)
    else:
        old.add_(change)
    fresh = copy.deepcopy(model)
    _assert_same(engine.generate(_requests(model)), _engine(fresh).generate(_requests(fresh)))
    assert not torch.equal(engine.recorded[0, 0][0], before[0, 0][1][0])


@pytest.mark.parametrize(
    "context",
    [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["inference_mode", "enable_grad", "autocast"],
)
def test_the_callers_context_changes_nothing(tiny, context):
    """Neither the results inside it nor those of a call after it; requests in flight may leave it in between."""
    expected = _engine(tiny).generate(_requests(tiny))
    engine = _engine(tiny)
    with context():
        _assert_same(engine.generate(_requests(tiny)), expected)
    _assert_same(engine.generate(_requests(tiny)), expected)
    steps = engine.run(_requests(tiny))
    with context():
        next(steps)
    for _ in steps:
        pass


# --- refusals ---------------------------------------------------------------------------------------------------------


def _assert_refused(engine, requests, error, message, monkeypatch):
    """Nothing ran, no page is taken, and the engine still serves."""
    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(OPS, "embed", lambda *args: ran.append(args))
        with pytest.raises(error, match=message):
            next(engine.run(requests))
    assert not ran
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages
    assert not engine.scheduler.has_work


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1, -1], r"prompt_token_ids\[1\]=-1 .*0 to 96"),
        ([1, 2, 97], r"prompt_token_ids\[2\]=97 .*0 to 96"),
        ([2**40], r"prompt_token_ids\[0\]=1099511627776 "),
        ([1, 2.5], r"prompt_token_ids\[1\]=2\.5"),
        ([1, 2.0], r"prompt_token_ids\[1\]=2\.0"),
        ([1, "2"], r"prompt_token_ids\[1\]="),
        ([[1], 2], r"prompt_token_ids\[0\]="),
        ([1, None], r"prompt_token_ids\[1\]="),
        ([], "the prompt has no tokens"),
    ],
)
def test_G08_prompt_ids(tiny, monkeypatch, prompt, message):
    """The first request is valid and must not run either."""
    requests = [make_request(tiny, [1, 2], 0, max_tokens=2), make_request(tiny, prompt, 1, max_tokens=2)]
    engine = _engine(tiny)
    _assert_refused(engine, requests, RequestError, message, monkeypatch)
    assert [sample.token_ids for sample in requests[0].samples] == [[]]
    _finish(engine, [make_request(tiny, [96, 0], max_tokens=1)])


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
def test_G09_exact_fit_works_and_one_more_is_refused(tiny, monkeypatch, max_tokens):
    engine = _engine(tiny, max_seq_len=20)
    prompt = [1] * (20 - max_tokens)
    (request,) = _finish(engine, [make_request(tiny, prompt, max_tokens=max_tokens)])
    assert len(request.samples[0].token_ids) == max_tokens
    message = f"{len(prompt) + 1} prompt tokens .* max_tokens={max_tokens} exceed max_seq_len=20"
    longer = make_request(tiny, [1, *prompt], max_tokens=max_tokens)
    _assert_refused(engine, [longer], ContextLengthError, message, monkeypatch)


def test_H01_more_samples_than_the_pool_holds(tiny, monkeypatch):
    """20 prompt tokens are 2 full pages to share and a partial one; 36 slots need 5 pages, so 5 + 3 for a second."""
    engine = _engine(tiny, max_seq_len=40, cache_bytes=8 * 2 * 2 * 2 * PAGE * 16 * 4)
    assert engine.cache.num_pages == 8
    params = {"max_tokens": 17, "temperature": 1.0, "seed": 1}
    fits, larger = (make_request(tiny, [1] * 20, n=n, **params) for n in (2, 3))
    _assert_refused(engine, [fits, larger], ContextLengthError, "needs 11 cache pages of 8 tokens.*has 8", monkeypatch)
    (request,) = _finish(engine, [make_request(tiny, [1] * 20, n=2, **params)])
    assert [len(sample.token_ids) for sample in request.samples] == [17, 17]


def test_G04_more_samples_than_the_batch_holds(tiny, monkeypatch):
    engine = _engine(tiny, max_batch=2)
    params = {"max_tokens": 2, "temperature": 1.0, "seed": 1}
    requests = [make_request(tiny, [1], n=3, **params)]
    _assert_refused(engine, requests, RequestError, "n=3 exceeds max_batch=2", monkeypatch)
    _finish(engine, [make_request(tiny, [1], n=2, **params)])


def test_K03_an_engine_that_is_generating_refuses_a_second_call(tiny):
    engine = _engine(tiny)
    request, other = (make_request(tiny, PROMPTS[1], index, max_tokens=5) for index in range(2))
    steps = engine.run([request])
    next(steps)
    with pytest.raises(RequestError, match="generating already; finish or close"):
        next(engine.run([other]))
    for _ in steps:  # the refused call did not disturb the first
        pass
    assert request.samples[0].token_ids == _tokens(tiny, PROMPTS[1:2], engine, max_tokens=5)[0]


def test_model_cast_after_its_engine_was_made():
    model = make_model()
    engine = _engine(model)
    model.to(torch.bfloat16)
    with pytest.raises(RequestError, match="moved or cast after its engine was made"):
        next(engine.run([make_request(model, [1], max_tokens=1)]))
    model.to(torch.float32)
    _finish(engine, [make_request(model, [1], max_tokens=1)])


def test_no_requests_no_steps(tiny):
    assert list(_engine(tiny).run([])) == []


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_name", "call"),
    [("embed", 1), ("norm_qkv_rope_cache", 2), ("copy_pages", 1), ("attention", 7), ("norm_lm_head", 4), ("sample", 5)],
)
def test_K04_an_interrupted_step_leaves_the_engine_as_new(tiny, monkeypatch, op_name, call):
    """In the middle of a step, with the cache half written."""
    engine = _engine(tiny, prefill_chunk=20)
    expected = engine.generate(_requests(tiny))
    requests = _requests(tiny)
    with monkeypatch.context() as patch:
        fail_at(patch, op_name, call, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            _finish(engine, requests)
    for request in requests:
        for sample in request.samples:
            whole = expected[request.index, sample.index][0]
            assert sample.token_ids == whole[: len(sample.token_ids)]
    _assert_same(engine.generate(_requests(tiny)), expected)
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages


@pytest.mark.parametrize("after", [0, 1, 4])
def test_K01_closing_the_steps_early_leaves_the_engine_as_new(tiny, after):
    """Before any step, with prompts half run and requests queued, and while decoding."""
    engine = _engine(tiny, prefill_chunk=20, max_batch=3)
    expected = engine.generate(_requests(tiny))
    steps = engine.run(_requests(tiny))
    for _ in range(after):
        next(steps)
    steps.close()
    steps.close()
    _assert_same(engine.generate(_requests(tiny)), expected)
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages


# --- logits that are no numbers ---------------------------------------------------------------------------------------

_BROKEN = 50
_NEVER_BROKEN = {"logit_bias": {_BROKEN: -100.0}}


@pytest.fixture(scope="module")
def broken():
    """Token 50 alone has NaN in its embedding."""
    model = make_model()
    model.model.embed_tokens.weight[_BROKEN, 3] = math.nan
    return model


@pytest.mark.parametrize("prefill_chunk", [20, 512])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1, "n": 2, "logprobs": 2}])
def test_K07_NaN_in_one_request_ends_that_request_alone(broken, prefill_chunk, params):
    others = [(PROMPTS[2][:11], {"max_tokens": 9}), (PROMPTS[1], {"max_tokens": 7, "temperature": 1.0, "seed": 3})]
    assert not any(_BROKEN in prompt for prompt, _ in others)
    expected = {}
    for index, (prompt, one) in enumerate(others):
        expected |= _engine(broken).generate([make_request(broken, prompt, index, **one, **_NEVER_BROKEN)])
    bad = make_request(broken, [1, _BROKEN, 2, 3, 4], 2, max_tokens=5, **params)
    requests = [
        *(make_request(broken, prompt, index, **one, **_NEVER_BROKEN) for index, (prompt, one) in enumerate(others)),
        bad,
    ]
    engine = _engine(broken, prefill_chunk=prefill_chunk)
    results = engine.generate([requests[0], requests[2], requests[1]])
    _assert_same({key: value for key, value in results.items() if key[0] != 2}, expected)
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert "after token 5 hold NaN" in str(bad.error)
    for sample in bad.samples:
        assert (sample.token_ids, sample.finish_reason) == ([], "error")
        assert not sample.logprobs
    assert bad.metrics.finished is not None
    assert requests[0].error is requests[1].error is None
    assert engine.scheduler.allocator.num_free == engine.cache.num_pages


def test_K07_NaN_while_decoding_keeps_the_tokens_before_it(broken):
    request = make_request(broken, PROMPTS[1], max_tokens=5, logit_bias={_BROKEN: 100.0}, logprobs=0)
    _finish(_engine(broken), [request])
    sample = request.samples[0]
    assert (sample.token_ids, sample.finish_reason) == ([_BROKEN], "error")
    assert len(sample.logprobs) == 1
    assert isinstance(request.error, NonFiniteLogitsError)


def test_K07_scoring_a_prompt_with_NaN_is_an_error_too(broken):
    """max_tokens=0 samples nothing, but log probabilities that are NaN are no scores."""
    request = make_request(broken, [1, _BROKEN, 2], max_tokens=0, prompt_logprobs=1)
    _finish(_engine(broken), [request])
    assert request.samples[0].finish_reason == "error"
    assert isinstance(request.error, NonFiniteLogitsError)


@pytest.mark.parametrize("prefill_chunk", [2, 512])
def test_K07_tokens_before_the_NaN_do_not_see_it(broken, prefill_chunk):
    """Their scores are those of the prompt without it, although they may have run in one block with it."""
    clean = make_request(broken, [1, 2, 3], max_tokens=0, prompt_logprobs=2)
    request = make_request(broken, [1, 2, 3, _BROKEN, 4], max_tokens=0, prompt_logprobs=2)
    _finish(_engine(broken, prefill_chunk=prefill_chunk), [request])
    _finish(_engine(broken), [clean])
    assert request.prompt_logprobs[:3] == clean.prompt_logprobs
    assert math.isfinite(request.prompt_logprobs[3][_BROKEN].logprob)


# --- metrics and sizes ------------------------------------------------------------------------------------------------


def test_metrics_are_filled_and_in_order(tiny):
    """A request that had to wait for another one started after it."""
    requests = [make_request(tiny, prompt, index, max_tokens=3) for index, prompt in enumerate(PROMPTS)]
    _finish(_engine(tiny, max_batch=2, prefill_chunk=20), requests)
    for request in requests:
        metrics = request.metrics
        assert metrics.arrival <= metrics.started < metrics.first_token < metrics.finished
        assert metrics.time_to_first_token == metrics.first_token - metrics.arrival
    assert requests[2].metrics.started >= min(request.metrics.finished for request in requests[:2])


# K and V of 2 layers, 2 heads, 8 slots, 16 dimensions, fp32.
PAGE_BYTES = 2 * 2 * 2 * PAGE * 16 * 4


@pytest.mark.parametrize(
    ("sizes", "free_bytes", "num_pages"),
    [
        ({"max_batch": 3, "max_seq_len": 20}, 10**9, 9),
        ({"max_batch": 3, "max_seq_len": 24}, 10**9, 9),
        ({"max_batch": 3, "max_seq_len": 25}, 10**9, 12),
        ({"max_batch": 2}, 10**9, 64),  # max_position_embeddings=256
        ({"max_batch": 3, "max_seq_len": 20}, 2 * 4 * PAGE_BYTES, 4),  # half of what is free beside the weights
        ({"max_batch": 3, "max_seq_len": 20, "cache_bytes": 11 * PAGE_BYTES - 1}, 0, 10),
        ({"max_batch": 3, "max_seq_len": 20, "cache_bytes": 20 * PAGE_BYTES}, 0, 20),
        ({"max_batch": 3, "max_seq_len": 20, "cache_bytes": 3 * PAGE_BYTES}, 0, 3),
    ],
)
def test_cache_size(tiny, monkeypatch, sizes, free_bytes, num_pages):
    monkeypatch.setattr(memory, "free_bytes", lambda device, weight_bytes: free_bytes)
    engine = Engine(tiny, page_size=PAGE, split_size=SPLIT, **sizes)
    assert engine.cache.num_pages == num_pages
    assert engine.cache.pool.nbytes == (num_pages + 1) * PAGE_BYTES  # and the spare one


def test_cache_that_holds_no_sequence(tiny, monkeypatch):
    """The message says what is needed, what there is, and what would fit."""
    message = f"max_seq_len=20 needs {3 * PAGE_BYTES} bytes.* room for {3 * PAGE_BYTES - 1}: use max_seq_len=16 or less"
    sizes = {"max_seq_len": 20, "page_size": PAGE, "split_size": SPLIT}
    with pytest.raises(OutOfMemoryError, match=message):
        Engine(tiny, cache_bytes=3 * PAGE_BYTES - 1, **sizes)
    monkeypatch.setattr(memory, "free_bytes", lambda device, weight_bytes: 2 * (3 * PAGE_BYTES - 1))
    with pytest.raises(OutOfMemoryError, match=message):
        Engine(tiny, **sizes)
    assert Engine(tiny, cache_bytes=3 * PAGE_BYTES - 1, **{**sizes, "max_seq_len": 16}).cache.num_pages == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_batch", 0),
        ("max_batch", 2.0),
        ("max_seq_len", 0),
        ("max_seq_len", 16.5),
        ("max_seq_len", "16"),
        ("cache_bytes", 1e9),
        ("cache_bytes", -1),
        ("page_size", 0),
        ("split_size", 12),
        ("prefill_chunk", 0),
        ("prefill_chunk", None),
    ],
)
def test_engine_arguments(tiny, argument, value):
    with pytest.raises(RequestError, match=f"{argument}={value!r}"):
        Engine(tiny, **{"page_size": PAGE, "split_size": SPLIT, argument: value})


def test_unknown_backend(tiny):
    with pytest.raises(BackendError, match="backend='cuda' is unknown; use one of auto, reference, cpu, gpu"):
        Engine(tiny, backend="cuda")


def test_max_seq_len_beyond_what_the_model_is_made_for(caplog):
    """Said, not refused: plain RoPE goes on as in transformers."""
    model = make_model(max_position_embeddings=16)
    engine = _engine(model, max_seq_len=30)
    assert "max_seq_len=30 goes beyond the 16 tokens" in caplog.text
    (request,) = _finish(engine, [make_request(model, PROMPTS[1], max_seq_len=30)])
    assert request.samples[0].token_ids == _naive(_transformers_logits(model), PROMPTS[1], 23, _raw)

"""K11: many requests at once on the demo model, some invalid, some cancelled in any state, a pool ten times too small.

200 requests; `pytest --full` runs 2,000.
"""

import gc
import random
from pathlib import Path

import pytest

from llama_fast import LLM, SamplingParams, demo
from llama_fast.engine.llm import chunk_of
from llama_fast.engine.request import Request
from llama_fast.errors import LlamaFastError, RequestError, RequestFailedError, RequestTimeoutError
from llama_fast.model.kv_cache import PagedKVCache

MAX_SEQ_LEN, PAGE, MAX_BATCH = 160, 8, 12
STARTS = [
    "Once upon a time there was a little girl. She",
    "The little dog",
    "Lily went to the park with her mom",
    "One day, a big bear",
    "Tom",
]


def _small(model, num_pages, **changes):
    sizes = {"max_batch": MAX_BATCH, "max_seq_len": MAX_SEQ_LEN, "page_size": PAGE, "split_size": 32, **changes}
    page_bytes = PagedKVCache.page_bytes(model.config, PAGE, model.dtype) if model else 0
    return LLM(demo.PATH, device="cpu", cache_bytes=num_pages * page_bytes if model else None, **sizes)


def _params(draw):
    fields = {
        "max_tokens": draw.choice([0, 1, 12, 40, 90]),
        "seed": draw.randrange(2**32),
        "ignore_eos": draw.random() < 0.7,
    }
    if draw.random() < 0.5:
        fields |= {
            "temperature": draw.choice([0.5, 1.0, 1.5]),
            "top_p": draw.choice([1.0, 0.9]),
            "n": draw.choice([1, 2]),
        }
    if draw.random() < 0.2:
        fields |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    if draw.random() < 0.2:
        fields["stop"] = ["the", "."]
    if draw.random() < 0.2:
        fields["logprobs"] = 2
    if draw.random() < 0.4:
        fields["prompt_lookup_num_tokens"] = 5
    return SamplingParams(**fields)


def _prompt(draw):
    return " ".join([STARTS[0], *(draw.choice(STARTS) for _ in range(draw.choice([0, 1, 1, 3])))])


# Each is refused when it is made, or ends alone when it runs.
def _invalid(llm, draw, index):
    kind = draw.choice(["ids", "long", "params", "empty", "callback", "late"])
    if kind == "ids":
        return llm.request([1, 2, 10**6], SamplingParams(), index)
    if kind == "long":
        return llm.request([1] * MAX_SEQ_LEN, SamplingParams(max_tokens=5), index)
    if kind == "params":
        return llm.request("a", SamplingParams(n=2, temperature=0.0), index)
    if kind == "empty":
        return llm.request([], SamplingParams(), index)
    if kind == "late":
        return llm.request(_prompt(draw), _params(draw), index, timeout=0.0)
    after = draw.randrange(3)

    def on_token(chunk):
        if len(told) == after:
            raise LookupError("a consumer that fails")
        told.append(chunk)

    told = []
    return llm.request(_prompt(draw), SamplingParams(max_tokens=20, ignore_eos=True), index, on_token=on_token)


def _rss():
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def _outcome(request):
    return request.prompt_logprobs, [(s.token_ids, s.logprobs, s.text, s.finish_reason) for s in request.samples]


def _serve(llm, draw, count):
    """`count` requests, a few of them arriving with every step; returns those that were made, and who was cancelled."""
    engine, made, cancelled, refused, chunks = llm.engine, {}, set(), 0, {}
    index = 0
    with engine.session():
        engine.make_ready()
        while index < count or engine.has_work:
            while index < count and draw.random() < 0.6:
                try:
                    if draw.random() < 0.1:
                        request = _invalid(llm, draw, index)
                    else:
                        options = {"priority": draw.choice([0, 0, 0, 1]), "cache_salt": draw.choice(["", "", "other"])}
                        request = llm.request(_prompt(draw), _params(draw), index, **options)
                    engine.add(request)
                    made[index] = request
                except RequestError:
                    refused += 1
                index += 1
            if made and draw.random() < 0.3:
                # One of the latest: queued, in its prompt, decoding, preempted or just ended.
                victim = made[draw.choice(list(made)[-30:])]
                cancelled.add(victim.index)
                (engine.abort if draw.random() < 0.5 else engine.abort_soon)(victim)
            for sample in engine.step():
                text, ids = chunks.get((sample.request.index, sample.index), ("", []))
                chunk = chunk_of(sample)
                chunks[sample.request.index, sample.index] = (text + chunk.text, ids + chunk.token_ids)
    return made, cancelled, refused, chunks


def test_K11_chaos(pytestconfig):
    count = 2000 if pytestconfig.getoption("--full") else 200
    draw = random.Random(11)
    roomy = _small(None, None, prefix_caching=False)
    model = roomy.model
    llm = _small(model, MAX_SEQ_LEN // PAGE + 4)
    _serve(llm, random.Random(1), 30)
    before = _rss()
    made, cancelled, refused, chunks = _serve(llm, draw, count)
    stats = llm.stats()
    assert llm.engine.scheduler.allocator.num_free == llm.engine.cache.num_pages
    assert not llm.engine._running.samples and not llm.engine._running._on_host
    assert all(request.finished for request in made.values())
    assert stats.preempted > count / 50 and stats.shared_tokens > 2 * count
    survivors = [request for request in made.values() if request.index not in cancelled and request.error is None]
    aborted = [made[one] for one in cancelled if any(s.finish_reason == "abort" for s in made[one].samples)]
    failed = [request for request in made.values() if request.error is not None]
    assert len(aborted) > count / 12 and refused + len(failed) > count / 20 and len(survivors) > count / 2
    assert all(isinstance(request.error, RequestFailedError | RequestTimeoutError) for request in failed)
    for request in survivors:
        alone = Request(request.prompt, list(request.prompt_token_ids), request.sampling, roomy.tokenizer)
        for _ in roomy.engine.run([alone]):
            pass
        assert _outcome(request) == _outcome(alone), f"request {request.index}: not as alone"
        for sample in request.samples:
            told = chunks.get((request.index, sample.index), ("", []))
            assert told == (sample.text, sample.token_ids)
    for request in [*aborted, *failed]:
        for sample in request.samples:
            assert sample.finish_reason is not None
    made.clear()
    chunks.clear()
    survivors = aborted = failed = request = sample = alone = None
    grown = _rss() - before
    assert grown < 32 * 2**20, f"{grown:,} bytes more than before"


def test_K11_the_errors_are_ours():
    """What `_invalid` raises is refused before it is queued."""
    llm = _small(None, None)
    kinds = set()
    for seed in range(40):
        try:
            kinds.add(type(_invalid(llm, random.Random(seed), 0)))
        except LlamaFastError as error:
            kinds.add(type(error))
        with pytest.raises(RequestError):
            llm.request([], SamplingParams())
    assert len(kinds) >= 3

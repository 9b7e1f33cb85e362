"""H: the KV cache and its limits."""

import math

from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import ContextLengthError, OutOfMemoryError
from llama_fast.model.kv_cache import PagedKVCache
from tests.bad_inputs.engine_checks import (
    MAX_SEQ_LEN,
    PAGE_SIZE,
    SPARE,
    VOCAB_SIZE,
    Serving,
    after,
    build,
    engine_entry,
    legal,
    tokens,
)
from tests.bad_inputs.harness import check, refused
from tests.tiny import make_request

PAGE_BYTES = PagedKVCache.page_bytes(SPARE.model.config, PAGE_SIZE, SPARE.model.dtype)
# Room for one sequence of the greatest length and no more.
ONE_SEQUENCE = MAX_SEQ_LEN // PAGE_SIZE
SMALL = build(cache_bytes=ONE_SEQUENCE * PAGE_BYTES)


@engine_entry
def H01_larger_than_the_whole_pool(_: Serving) -> None:
    small = Serving(SMALL)
    # 20 prompt tokens, 36 new: 7 pages, of which two full ones are shared; two samples need 2 + 5 + 5.
    for n in (2, 8):
        error = small.refused(
            ContextLengthError, f"the cache has {ONE_SEQUENCE}", prompt=[1] * 20, max_tokens=36, n=n, temperature=1.0
        )
        check(error.http_status == 400, f"{error.http_status}")
    small.refused(ContextLengthError, "exceed", prompt=[1] * 20, max_tokens=MAX_SEQ_LEN)
    (whole,) = legal([1] * 20, SMALL, max_tokens=MAX_SEQ_LEN - 20, ignore_eos=True)
    check(
        whole.token_ids == legal([1] * 20, max_tokens=MAX_SEQ_LEN - 20, ignore_eos=True)[0].token_ids,
        "not as in a large pool",
    )


@engine_entry
def H01_a_pool_that_holds_no_sequence(_: Serving) -> None:
    for cache_bytes in (1, PAGE_BYTES - 1, ONE_SEQUENCE * PAGE_BYTES - 1):
        refused(OutOfMemoryError, lambda size=cache_bytes: build(cache_bytes=size), "cache_bytes")
        refused(
            OutOfMemoryError,
            lambda size=cache_bytes: Engine(
                SPARE.model, cache_bytes=size, page_size=PAGE_SIZE, max_seq_len=MAX_SEQ_LEN
            ),
            f"room for {cache_bytes}",
        )


def _run(requests: list[Request], num_pages: int, page_size: int) -> list[list[int]]:
    model = SPARE.model
    pool = num_pages * PagedKVCache.page_bytes(model.config, page_size, model.dtype)
    longest = max(request.samples[0].sequence.cache_len for request in requests)
    sizes = {"max_seq_len": longest, "page_size": page_size, "split_size": 4 * page_size}
    engine = Engine(model, cache_bytes=pool, max_batch=8, **sizes)
    engine.max_seq_len = longest + 1  # the last token is never in the cache
    check(engine.cache.num_pages == num_pages, f"{engine.cache.num_pages} pages instead of {num_pages}")
    engine.cache.pool.fill_(math.nan)
    for _ in engine.run(requests):
        pass
    check(engine.scheduler.allocator.num_free == num_pages, "pages are not free")
    return [sample.token_ids for request in requests for sample in request.samples]


def _request(page_size: int, pages: int, offset: int, **params: object) -> Request:
    """Needs `offset` slots more than `pages` full pages."""
    prompt_len = page_size + 3
    max_tokens = pages * page_size + offset - prompt_len + 1
    return make_request(SPARE.model, range(prompt_len), max_seq_len=512, max_tokens=max_tokens, **params)


@engine_entry
def H03_exactly_full_at_a_page_border(_: Serving) -> None:
    for page_size in (PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1):
        offsets = (-1, 0, 1)
        roomy = _run([_request(page_size, 3, offset) for offset in offsets], 50, page_size)
        for offset, expected in zip(offsets, roomy, strict=True):
            (tight,) = _run([_request(page_size, 3, offset)], 3 + (offset > 0), page_size)
            check(tight == expected, f"pages of {page_size}, offset {offset}: {tight} instead of {expected}")
            check(len(tight) == 2 * page_size + offset - 2, f"{len(tight)} tokens")


@engine_entry
def H03_several_fill_the_pool_together(_: Serving) -> None:
    """Three requests of two samples share a page and copy one; with a page less than all need, one waits."""

    def requests() -> list[Request]:
        return [_request(PAGE_SIZE, 3, 0, n=2, temperature=1.0, seed=seed, repetition_penalty=1.1) for seed in range(3)]

    roomy = _run(requests(), 100, PAGE_SIZE)
    for num_pages in (15, 14, 5):
        tight = _run(requests(), num_pages, PAGE_SIZE)
        check(tight == roomy, f"{num_pages} pages: {tight} instead of {roomy}")


@engine_entry
def H04_the_greatest_length_is_reached_mid_decode(_: Serving) -> None:
    endless = SamplingParams(ignore_eos=True, temperature=1.0, seed=5)
    short = SamplingParams(max_tokens=6, ignore_eos=True)
    prompts, params = [[1, 2, 3], [4, 5], [6], [7, 8]], [endless, short, endless, short]
    together = SMALL.generate(prompts, params, use_tqdm=False)  # they wait for each other's pages
    after(SMALL)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (sample,) = output.outputs
        check(sample.finish_reason == "length", f"{sample.finish_reason}")
        expected = 6 if one is short else MAX_SEQ_LEN - len(prompt)
        check(len(sample.token_ids) == expected, f"{len(sample.token_ids)} tokens instead of {expected}")
        check(all(0 <= token_id < VOCAB_SIZE for token_id in sample.token_ids), f"{sample.token_ids}")
        check([sample.token_ids] == tokens(SPARE.generate([prompt], one)), "not as alone in a large pool")

"""A running engine for bad requests, and what must hold after each of them.

`@engine_entry` turns `def G01_max_tokens(engine: Serving)` into an entry. While it runs two golden requests are in
flight; the entry only states its bad input. Then those two must end as they do alone, the cache be free, a further
golden request give the golden tokens, and repetitions must not take memory.
"""

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from llama_fast.engine.llm import LLM
from llama_fast.engine.outputs import CompletionOutput, RequestOutput
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import LlamaFastError
from tests.bad_inputs.harness import accepted, check, check_no_path, refused, rss
from tests.byte_model import save_byte_model

CPU_SECONDS = 0.05  # of a refusal; processor time, so that other work on the machine does not count
LEAK = 1 << 20
PAGE_SIZE, MAX_SEQ_LEN, MAX_BATCH = 8, 64, 8
VOCAB_SIZE, BOS, EOS = 258, 256, 257  # of the byte model


def build(save: Callable[[Path], object] = save_byte_model, **sizes: Any) -> LLM:
    """An LLM whose folder is gone: its files stay mapped."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        sizes = {"max_batch": MAX_BATCH, "max_seq_len": MAX_SEQ_LEN, "page_size": PAGE_SIZE, "split_size": 32, **sizes}
        llm = LLM(folder, device="cpu", prefill_chunk=16, **sizes)
    llm.engine.cache.pool.fill_(float("nan"))  # what nobody wrote must not be read
    return llm


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


GOLDEN = {
    "Once upon a time": SamplingParams(max_tokens=12, ignore_eos=True),
    "é 你 🤗": SamplingParams(
        max_tokens=10, ignore_eos=True, temperature=1.2, top_p=0.9, repetition_penalty=1.2, seed=7
    ),
}
ENGINE = build()
SPARE = build()  # for legal requests while the golden ones run
SOLO = [tokens(ENGINE.generate(prompt, params))[0] for prompt, params in GOLDEN.items()]
gc.freeze()  # collections in the forked processes look at their own objects only


class Serving:
    """An LLM whose answers are checked; the one that an entry gets has golden requests in flight."""

    def __init__(self, llm: LLM = ENGINE) -> None:
        self.llm = llm

    def refused(
        self, error_type: type[LlamaFastError], *needles: str, prompt: Any = "abc", **params: Any
    ) -> LlamaFastError:
        """A request with these parameters is refused, as Python arguments and as a JSON object alike."""
        self.refused_json(error_type, params, *needles, prompt=prompt)
        return self.refused_call(error_type, lambda: self.llm.generate(prompt, SamplingParams(**params)), *needles)

    def refused_json(
        self, error_type: type[LlamaFastError], content: Any, *needles: str, prompt: Any = "abc"
    ) -> LlamaFastError:
        """A request with this JSON object as its parameters is refused, by `stream` at once."""
        return self.refused_call(
            error_type, lambda: self.llm.stream(prompt, SamplingParams.from_dict(content)), *needles
        )

    def refused_call(
        self, error_type: type[LlamaFastError], call: Callable[[], object], *needles: str
    ) -> LlamaFastError:
        """`call` is refused in time, before it takes a page or a place in the queue."""
        scheduler = self.llm.engine.scheduler
        before = scheduler.allocator.num_free, len(scheduler.waiting), len(scheduler.running)
        took = 0.0

        def timed() -> object:
            nonlocal took
            start = time.process_time()
            try:
                return call()
            finally:
                took = time.process_time() - start

        error = refused(error_type, timed, *needles)
        check_no_path(error)
        after = scheduler.allocator.num_free, len(scheduler.waiting), len(scheduler.running)
        check(before == after, f"pages free, waiting, running: {before} -> {after}")
        check(took <= CPU_SECONDS, f"took {took:.3f} s of processor time, more than {CPU_SECONDS}")
        return error


def engine_entry(body: Callable[[Serving], None]) -> Callable[[Path], None]:
    """An entry of `body`, which submits bad requests to the engine it is given."""

    @wraps(body)
    def entry(_: Path) -> None:
        _serve(body)  # warm: caches fill, lazy imports are done
        for _attempt in range(5):  # a leak grows every time, an allocator's whim does not
            grown = -_settled_rss()
            _serve(body)
            grown += _settled_rss()
            if grown <= LEAK:
                return
        check(False, f"memory grows by {grown:,} bytes with every repetition")

    return entry


def _serve(body: Callable[[Serving], None]) -> None:
    stream = ENGINE.stream(list(GOLDEN), list(GOLDEN.values()))
    in_flight: list[list[int]] = [[] for _ in GOLDEN]
    for _ in range(5):
        chunk = next(stream)
        in_flight[chunk.request_index] += chunk.token_ids
    body(Serving())
    for chunk in stream:
        in_flight[chunk.request_index] += chunk.token_ids
    check(in_flight == SOLO, f"requests in flight: {in_flight} instead of {SOLO}")
    after(ENGINE)
    for prompt, params, alone in zip(GOLDEN, GOLDEN.values(), SOLO, strict=True):
        check(tokens(ENGINE.generate(prompt, params)) == [alone], f"{prompt!r} afterwards: not its golden tokens")


def legal(prompt: Any = "abc", llm: LLM = SPARE, **params: Any) -> list[CompletionOutput]:
    """The samples of a legal request: each ends for a stated reason, with ids of the vocabulary."""
    (output,) = accepted(lambda: llm.generate(prompt, SamplingParams(**params)))
    after(llm)
    check(output.error is None, f"{params}: {output.error}")
    for sample in output.outputs:
        check(sample.finish_reason in ("stop", "length"), f"{params}: ended with {sample.finish_reason}")
        check(all(0 <= token_id < VOCAB_SIZE for token_id in sample.token_ids), f"{params}: {sample.token_ids}")
    return output.outputs


def after(llm: LLM) -> None:
    """Nothing runs, waits or holds a page."""
    scheduler = llm.engine.scheduler
    check(not scheduler.has_work, "requests are left in the scheduler")
    free = scheduler.allocator.num_free
    check(free == llm.engine.cache.num_pages, f"{free} of {llm.engine.cache.num_pages} pages are free")


def _settled_rss() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc keeps what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return rss()

"""Callers of an AsyncLLM, and an engine whose steps wait for the test."""

import asyncio
import threading
import time

from llama_fast.engine.sampling import SamplingParams

ENGINE = {"max_batch": 4, "max_seq_len": 128, "page_size": 8, "split_size": 32, "prefill_chunk": 16}
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
LONG = SamplingParams(max_tokens=80, ignore_eos=True)
LIMIT_S = 30


def run(main, *args):
    """`main` in a loop of its own; a test that hangs fails."""
    return asyncio.run(asyncio.wait_for(main(*args), LIMIT_S))


def alone(llm, prompt, params):
    """The outputs of a request that runs by itself."""
    return llm.generate(prompt, params)[0].outputs


async def gather_chunks(stream):
    """By sample: text, ids, finish reason, as the chunks join; a chunk behind the last one fails."""
    joined = {}
    async for chunk in stream:
        text, ids, reason = joined.get(chunk.index, ("", [], None))
        assert reason is None, "a chunk after the last one"
        assert chunk.text or chunk.token_ids or chunk.finish_reason
        joined[chunk.index] = (text + chunk.text, ids + chunk.token_ids, chunk.finish_reason)
    return joined


async def append_chunks(stream, chunks):
    """To a list, which holds them if an error follows."""
    async for chunk in stream:
        chunks.append(chunk)


def joined_of(outputs):
    """What `gather_chunks` must give."""
    return {sample.index: (sample.text, sample.token_ids, sample.finish_reason) for sample in outputs}


async def until(condition, limit_s=5.0):
    """Wait for what another thread does."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never became true"
        await asyncio.sleep(0.002)


async def until_idle(async_llm):
    """Until every request has ended; then all pages are free."""
    await until(lambda: not async_llm._thread._room._open)
    stats = async_llm.stats()
    assert (stats.free_pages, stats.waiting, stats.running) == (stats.pages, 0, 0)


class Gate:
    """The engine stands behind each step until the test lets it go on.

    Attributes:
        steps: that were done.
    """

    def __init__(self, monkeypatch, engine, *, closed=True):
        self.steps = 0
        self.seen = []
        self._allowed = threading.Semaphore(0)
        self._closed = closed
        step = engine.step

        def gated():
            samples = step()
            self.seen.append(len(engine.scheduler.running) + len(engine.scheduler.waiting))
            self.steps += 1
            if self._closed:
                assert self._allowed.acquire(timeout=LIMIT_S)
            return samples

        monkeypatch.setattr(engine, "step", gated)

    async def let(self, steps):
        """Let so many further steps be done."""
        target = self.steps + steps
        for _ in range(steps):
            self._allowed.release()
        await until(lambda: self.steps == target)

    def open(self):
        self._closed = False
        self._allowed.release()


def slowed(step, seconds):
    """A step that takes so much longer."""

    def slow():
        time.sleep(seconds)
        return step()

    return slow

"""AsyncLLM: many callers, one engine. Texts are LLM.generate's; who is cancelled, slow or in line harms nobody."""

import asyncio
import contextlib
import itertools
import math
import random
import threading
import time

import pytest
import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import (
    ContextLengthError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
)
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.serving.async_llm import AsyncLLM
from llama_fast.serving.mailbox import Bell, Mailbox
from tests.byte_model import save_byte_model
from tests.serving.async_callers import (
    ENGINE,
    GREEDY,
    LONG,
    Gate,
    alone,
    append_chunks,
    gather_chunks,
    joined_of,
    run,
    slowed,
    until,
    until_idle,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **ENGINE)


@pytest.fixture(autouse=True)
def _nothing_is_left(llm):
    """Threads, pages and the engine's session, after every test."""
    threads = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= threads
    assert llm.engine.scheduler.allocator.num_free == llm.engine.cache.num_pages
    assert not llm.engine.has_work
    with llm.engine.session():
        pass


# --- one answer -------------------------------------------------------------------------------------------------------


def _mixed(llm, rng, count):
    """(prompt, parameters) of every kind."""
    mixed = []
    for index in range(count):
        prompt = "".join(rng.choices("abcdefgh ", k=rng.choice([1, 7, 15, 16, 17, 40])))
        kind = index % 6
        params = {"max_tokens": rng.randint(1, 24), "ignore_eos": True}
        if kind == 1:
            params |= {"temperature": 1.5, "seed": index}
        elif kind == 2:
            params |= {"temperature": 1.2, "seed": index, "n": 2}
        elif kind == 3:
            text = alone(llm, prompt, SamplingParams(max_tokens=24, ignore_eos=True))[0].text
            params |= {"max_tokens": 24, "stop": text[3:5]}
        elif kind == 4:
            params |= {"temperature": 0.9, "seed": index, "logprobs": 2, "repetition_penalty": 1.3}
        elif kind == 5:
            params |= {"max_tokens": 24, "prompt_lookup_num_tokens": 4}
        mixed.append((prompt, SamplingParams(**params)))
    return mixed


def test_K11_mixed_requests_at_random_times_get_their_own_answers(llm):
    rng = random.Random(0)
    mixed = _mixed(llm, rng, 30)
    expected = [alone(llm, *one) for one in mixed]
    assert any(sample.finish_reason == "stop" for outputs in expected for sample in outputs)
    delays = [rng.random() * 0.15 for _ in mixed]

    async def ask(async_llm, index):
        await asyncio.sleep(delays[index])
        if index % 3:
            return await gather_chunks(async_llm.generate(*mixed[index], priority=index % 2))
        return (await async_llm.complete(*mixed[index])).outputs

    async def main():
        async with AsyncLLM(llm) as async_llm:
            return await asyncio.gather(*(ask(async_llm, index) for index in range(len(mixed))))

    for index, (got, outputs) in enumerate(zip(run(main), expected, strict=True)):
        assert got == (joined_of(outputs) if index % 3 else outputs), mixed[index]


def test_prompts_in_every_form_and_what_the_output_holds(llm):
    ids = llm.tokenizer.encode("hello")

    async def main():
        async with AsyncLLM(llm) as async_llm:
            texts = [await async_llm.complete(form, GREEDY) for form in ("hello", ids, torch.tensor(ids))]
            scored = await async_llm.complete(ids, SamplingParams(max_tokens=0, prompt_logprobs=1))
            return texts, scored

    texts, scored = run(main)
    expected = alone(llm, "hello", GREEDY)
    assert [text.outputs for text in texts] == [expected] * 3
    assert [text.prompt for text in texts] == ["hello", None, None]
    assert texts[0].metrics.finished >= texts[0].metrics.first_token > texts[0].metrics.arrival
    assert (
        scored.prompt_logprobs == llm.generate(ids, SamplingParams(max_tokens=0, prompt_logprobs=1))[0].prompt_logprobs
    )


def test_a_folder_is_loaded_and_closed_with_it(folder):
    async def main():
        async with AsyncLLM(folder, max_waiting=3, **ENGINE) as async_llm:
            assert async_llm.stats().pages == async_llm.llm.engine.cache.num_pages
            await async_llm.complete("a", GREEDY)
        assert not hasattr(async_llm.llm, "model")

    run(main)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_G08_G09_the_call_itself_refuses(llm):
    refused = [
        (([1, 258],), RequestError, r"prompt_token_ids\[1\]=258"),
        (([],), RequestError, "the prompt has no tokens"),
        ((["a", "b"],), RequestError, r"prompt_token_ids\[0\]='a'"),
        (([1] * 120, LONG), ContextLengthError, "exceed the context"),
        (("a", {"max_tokens": 3}), RequestError, "sampling_params must be SamplingParams or None; got dict"),
        (("a", SamplingParams(n=9, temperature=1.0)), RequestError, "n=9 exceeds max_batch=4"),
    ]
    options = [
        ({"request_id": 5}, "request_id=5 must be a text"),
        ({"priority": "high"}, "priority="),
        ({"cache_salt": 1}, "cache_salt"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": math.nan}, "timeout=nan"),
    ]

    async def main():
        async with AsyncLLM(llm) as async_llm:
            for args, error, message in refused:
                with pytest.raises(error, match=message):
                    async_llm.generate(*args)
                with pytest.raises(error, match=message):
                    await async_llm.complete(*args)
            for named, message in options:
                with pytest.raises(RequestError, match=message):
                    async_llm.generate("a", **named)
            assert async_llm.stats().prompt_tokens == 0

    llm.engine.scheduler.counts.prompt_tokens = 0
    run(main)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_waiting": 0}, "max_waiting=0"),
        ({"max_waiting": 2.5}, "max_waiting=2.5"),
        ({"stall_timeout": 0}, "stall_timeout=0 must be seconds"),
        ({"stall_timeout": math.nan}, "stall_timeout=nan"),
        ({"stall_timeout": True}, "stall_timeout=True"),
        ({"max_batch": 4}, "max_batch: the LLM is made already"),
    ],
)
def test_arguments_out_of_range(llm, arguments, message):
    with pytest.raises(RequestError, match=message):
        AsyncLLM(llm, **arguments)


def test_K03_the_engine_has_one_user(llm):
    """Idle or not; and an engine that is in use is not taken over."""
    stream = llm.stream("a", GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="generating already"):
        AsyncLLM(llm)
    stream.close()

    async def main():
        async with AsyncLLM(llm) as async_llm:
            with pytest.raises(RequestError, match="generating already"):
                llm.generate("a", GREEDY)
            await async_llm.complete("a", GREEDY)
            await until(lambda: not llm.engine.has_work)
            with pytest.raises(RequestError, match="generating already"):
                llm.generate("a", GREEDY)

    run(main)
    assert alone(llm, "a", GREEDY)


def test_an_id_is_taken_until_its_request_has_ended(llm):
    async def main():
        async with AsyncLLM(llm, max_waiting=1) as async_llm:
            first = async_llm.generate("a", LONG, request_id="x")
            in_line = async_llm.generate("b", GREEDY, request_id="request-0")
            for taken in ("x", "request-0"):
                with pytest.raises(RequestError, match=f"request_id='{taken}' is the id of a request that has not"):
                    async_llm.generate("c", GREEDY, request_id=taken)
            other = async_llm.generate("c", GREEDY)
            assert other.request_id not in ("x", "request-0")
            await first.aclose()
            again = async_llm.generate("a", GREEDY, request_id="x")
            await asyncio.gather(*map(gather_chunks, (in_line, other, again)))
            async_llm.generate("a", GREEDY, request_id="x")

    run(main)


# --- cancel -----------------------------------------------------------------------------------------------------------

VICTIM = ("v" * 40, SamplingParams(max_tokens=5, temperature=1.0, seed=1, n=2, ignore_eos=True))
OTHERS = [("a", SamplingParams(max_tokens=12, ignore_eos=True)), ("b" * 20, SamplingParams(max_tokens=9, seed=4))]


async def _cancel(way, async_llm, stream, task):
    if way == "aclose":
        await stream.aclose()
    elif way == "abort":
        assert await async_llm.abort(stream.request_id)
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("way", ["aclose", "abort", "task.cancel", "break"])
def test_K01_cancelled_at_every_step(llm, monkeypatch, way):
    """Queued, each chunk of its prompt, each decoding step, the last one, ended: no page and no token is left over."""
    whole = joined_of(alone(llm, *VICTIM))
    others = [joined_of(alone(llm, *other)) for other in OTHERS]

    async def main(steps):
        with monkeypatch.context() as patch:
            gate = Gate(patch, llm.engine)
            async with AsyncLLM(llm) as async_llm:
                # The first is under way when the victim comes: at steps=0 it is queued and never seen.
                streams = [async_llm.generate(*OTHERS[0])]
                await until(lambda: gate.steps == 1)
                # Of its own salt: its prompt is run, whatever the tests before have left in the cache.
                victim = async_llm.generate(*VICTIM, cache_salt=f"{way} {steps}")
                request = victim._box.request
                streams.append(async_llm.generate(*OTHERS[1]))
                readers = [asyncio.create_task(gather_chunks(stream)) for stream in streams]
                await gate.let(steps)
                # What the gate holds back has been drawn, but not delivered.
                drawn = [list(sample.token_ids) for sample in request.samples]
                had_ended = request.finished
                if way == "break":
                    victim = None
                    cancelling = None
                else:
                    reader = asyncio.create_task(gather_chunks(victim))
                    await asyncio.sleep(0)
                    cancelling = asyncio.create_task(_cancel(way, async_llm, victim, reader))
                    await asyncio.sleep(0.005)
                gate.open()
                if cancelling is not None:
                    await cancelling
                assert await asyncio.gather(*readers) == others
                await until(lambda: not llm.engine.has_work)
                assert [sample.token_ids for sample in request.samples] == drawn
                assert request.finished
                if not had_ended:
                    assert {sample.finish_reason for sample in request.samples} == {"abort"}
                if way == "abort":
                    kept = await reader
                    assert {index: ids for index, (_, ids, _) in kept.items()} == dict(enumerate(drawn))
                    assert all(
                        whole[index][0].startswith(text) or "\ufffd" in text for index, (text, _, _) in kept.items()
                    )
                await until_idle(async_llm)
                return had_ended

    num_steps = 0
    while not run(main, num_steps):
        num_steps += 1
    assert num_steps >= 3 + 4  # three chunks of the prompt, the last of which gives a token


def test_K01_cancelled_while_preempted(folder, monkeypatch):
    """The cache holds one of them and a half: one waits in the host's memory."""
    page_bytes = PagedKVCache.page_bytes(LLM(folder, **ENGINE).model.config, 8, torch.float32)
    small = LLM(folder, **{**ENGINE, "cache_bytes": 16 * page_bytes})
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    expected = joined_of(alone(small, "aaaa", params))

    async def main():
        gate = Gate(monkeypatch, small.engine)
        async with AsyncLLM(small) as async_llm:
            first, second = (async_llm.generate(prompt, params) for prompt in ("aaaa", "bbbb"))
            await until(lambda: gate.steps == 1)
            while not any(sequence.preempted for sequence in small.engine.scheduler.waiting):
                await gate.let(1)
            request = second._box.request
            assert request.samples[0].sequence.preempted
            drawn = list(request.samples[0].token_ids)
            closing = asyncio.create_task(second.aclose())
            await asyncio.sleep(0.005)
            gate.open()
            await closing
            assert (request.samples[0].finish_reason, request.samples[0].token_ids) == ("abort", drawn)
            assert await gather_chunks(first) == expected
            assert async_llm.stats().preempted == 1
            assert async_llm.stats().free_pages == 16

    run(main)


def test_K02_abort_twice_of_nobody_and_after_the_end(llm, monkeypatch):
    async def main():
        gate = Gate(monkeypatch, llm.engine)
        async with AsyncLLM(llm) as async_llm:
            stream = async_llm.generate("a", LONG, request_id="x")
            await until(lambda: gate.steps == 1)
            first = asyncio.create_task(async_llm.abort("x"))
            await asyncio.sleep(0)
            assert not await async_llm.abort("x")
            assert not await async_llm.abort("y")
            gate.open()
            assert await first
            assert not await async_llm.abort("x")
            assert (await gather_chunks(stream))[0][2] == "abort"
            await stream.aclose()
            await stream.aclose()
            done = async_llm.generate("a", GREEDY, request_id="z")
            await gather_chunks(done)
            assert not await async_llm.abort("z")
        assert not await async_llm.abort("x")

    run(main)


def test_K01_a_stream_that_was_closed_or_cancelled_gives_nothing(llm, monkeypatch):
    async def main():
        monkeypatch.setattr(llm.engine, "step", slowed(llm.engine.step, 0.002))
        async with AsyncLLM(llm) as async_llm:
            stream = async_llm.generate("a", LONG)
            await anext(stream)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(append_chunks(stream, []), 0.01)
            assert [chunk async for chunk in stream] == []
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            await stream.aclose()
            steps = async_llm.stats().decode_steps
            waiting = asyncio.create_task(async_llm.complete("a", LONG, request_id="x"))
            await until(lambda: async_llm.stats().decode_steps > steps)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            # Its id and its pages come back with the next step.
            await until_idle(async_llm)
            assert async_llm.stats().decode_steps < steps + 60
            await async_llm.complete("a", GREEDY, request_id="x")

    run(main)


def test_K11_random_cancels_timeouts_and_refusals(llm):
    """Who is not cancelled gets its own answer; ids are used again at once."""
    rng = random.Random(1)
    kinds = _mixed(llm, rng, 10)
    expected = [alone(llm, *kind) for kind in kinds]
    served = []

    async def caller(async_llm, number):
        for _ in range(25):
            index = rng.randrange(len(kinds))
            name = f"{number}"
            stream = async_llm.generate(*kinds[index], request_id=name, priority=rng.randrange(3))
            fate = rng.randrange(6)
            for _ in range(rng.randrange(4)) if fate < 3 else ():
                await anext(stream, None)
            if fate == 0:
                await stream.aclose()
            elif fate == 1:
                aborted = await async_llm.abort(name)
                assert aborted or (await gather_chunks(stream)).keys() <= {0, 1}
                await stream.aclose()
            elif fate == 2:
                reader = asyncio.create_task(gather_chunks(stream))
                await asyncio.sleep(rng.random() * 0.002)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                await stream.aclose()
            elif fate == 3:
                with contextlib.suppress(RequestTimeoutError):
                    await async_llm.complete(*kinds[index], timeout=rng.random() * 0.01)
                await stream.aclose()
            elif fate == 4:
                with pytest.raises(RequestError):
                    async_llm.generate([999])
                assert await gather_chunks(stream) == joined_of(expected[index])
                served.append(index)
            else:
                assert await gather_chunks(stream) == joined_of(expected[index])
                served.append(index)

    async def main():
        async with AsyncLLM(llm, max_waiting=6) as async_llm:
            await asyncio.gather(*(caller(async_llm, number) for number in range(8)))
            await until_idle(async_llm)

    run(main)
    assert len(served) > 40 and len(set(served)) == len(kinds)


# --- slow consumers ---------------------------------------------------------------------------------------------------


def test_J07_what_nobody_takes_is_merged_and_holds_up_nobody(llm, monkeypatch):
    """One wake for the first chunk, then none: the rest is one chunk a sample."""
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=2, n=2, ignore_eos=True)
    expected = alone(llm, "slow", params)

    async def main():
        loop, wakes = asyncio.get_running_loop(), []
        call_soon = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(args), call_soon(*args))[1])
        gate = Gate(monkeypatch, llm.engine)
        async with AsyncLLM(llm) as async_llm:
            slow = async_llm.generate("slow", params)
            await until(lambda: gate.steps == 1)
            first = asyncio.create_task(anext(slow))
            await asyncio.sleep(0)
            await gate.let(1)
            first = await first
            # This one ends though nobody takes anything of the other one.
            fast = asyncio.create_task(async_llm.complete("fast", LONG))
            await asyncio.sleep(0)
            gate.open()
            await fast
            await until(lambda: slow._box.ended)
            assert len(wakes) == 2
            assert len(slow._box._pending) == 2
            rest = [chunk async for chunk in slow]
            assert len(wakes) == 2
            return first, rest

    first, rest = run(main)
    assert (len(first.token_ids), first.finish_reason, len(rest)) == (1, None, 2)
    for sample in expected:
        mine = [chunk for chunk in (first, *rest) if chunk.index == sample.index]
        assert "".join(chunk.text for chunk in mine) == sample.text
        assert list(itertools.chain(*(chunk.token_ids for chunk in mine))) == sample.token_ids
        assert mine[-1].finish_reason == "length"


def test_no_text_is_lost_where_a_request_ends_in_the_step_of_a_token(llm):
    """A sample's token, then the failure of another sample of its request, which ends both: one step, one update."""
    params = SamplingParams(max_tokens=9, temperature=1.0, n=2, ignore_eos=True)
    request = llm.request("a", params)
    box = Mailbox("x", request, streams=True)
    first, second = request.samples
    first.append(104)
    box.update()
    first.append(105)
    for sample in (first, second):
        sample.finish("error")
    box.update()
    box.update()
    chunk = box.take()
    assert (chunk.index, chunk.text, chunk.token_ids, chunk.finish_reason) == (0, first.output().text, [104, 105], None)
    assert len(chunk.text) == 2
    assert box.take() is None
    box.end()
    first.token_ids.append(1)
    box.update()
    assert box.take() is None


def test_a_bell_that_rings_before_anybody_waits():
    """Between the look and the wait, where another thread may come."""
    bell, looks = Bell(), []

    def ready():
        looks.append(1)
        if len(looks) == 1:
            bell.ring()
        return len(looks) > 1

    async def main():
        await asyncio.wait_for(bell.wait_until(ready), 1)
        waiting = [asyncio.create_task(bell.wait_until(lambda: False)) for _ in range(2)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(main)
    assert not bell._waiting


# --- room -------------------------------------------------------------------------------------------------------------


def test_J08_first_come_first_served_and_no_more_than_max_waiting(llm, monkeypatch):
    prompts = [letter * 3 for letter in "abcdefgh"]
    expected = [alone(llm, prompt, GREEDY) for prompt in prompts]

    async def main():
        gate = Gate(monkeypatch, llm.engine)
        async with AsyncLLM(llm, max_waiting=2) as async_llm:
            streams = [async_llm.generate(prompt, GREEDY) for prompt in prompts]
            requests = [stream._box.request for stream in streams]
            readers = [asyncio.create_task(gather_chunks(stream)) for stream in streams]
            await asyncio.sleep(0)  # the readers begin
            await until(lambda: gate.steps == 1)
            assert async_llm.stats().waiting + async_llm.stats().running == 8
            with pytest.raises(QueueFullError, match="max_waiting=2 requests") as full:
                async_llm.generate("x", GREEDY, wait=False)
            assert full.value.retry_after_s > 0
            # One in the line goes, another one by its id; the others keep their places.
            readers[3].cancel()
            aborting = asyncio.create_task(async_llm.abort(streams[5].request_id))
            with pytest.raises(asyncio.CancelledError):
                await readers[3]
            gate.open()
            assert await aborting
            left = [index for index in range(8) if index not in (3, 5)]
            results = await asyncio.gather(*(readers[index] for index in left))
            assert results == [joined_of(expected[index]) for index in left]
            assert (await readers[5]) == {0: ("", [], "abort")}
            assert requests[3].metrics.started is requests[5].metrics.started is None
            started = [requests[index].metrics.started for index in left]
            assert started == sorted(started)
            assert max(gate.seen) == 2
            # Room again.
            await gather_chunks(async_llm.generate("x", GREEDY, wait=False))

    run(main)


def test_K01_one_in_line_goes_at_once(llm, monkeypatch):
    """Not only when there is room for it."""
    monkeypatch.setattr(llm.engine, "step", slowed(llm.engine.step, 0.002))

    async def main():
        async with AsyncLLM(llm, max_waiting=1) as async_llm:
            first = async_llm.generate("a", LONG)
            in_line = async_llm.generate("b", GREEDY, request_id="b")
            assert await async_llm.abort("b")
            closed = async_llm.generate("c", GREEDY)
            await closed.aclose()
            assert not first._box.ended
            assert await gather_chunks(in_line) == {0: ("", [], "abort")}
            await first.aclose()

    run(main)


def test_K01_one_that_is_let_in_and_dropped_at_the_same_moment(llm, monkeypatch):
    """Between the thread's look for new requests and its look for unwanted ones: never seen, it must not run later."""

    async def main():
        async with AsyncLLM(llm) as async_llm:
            thread, requests = async_llm._thread, []
            take_in = thread._take_in

            def and_another_one_comes_and_goes():
                take_in()
                if len(requests) < 3:
                    requests.append(async_llm.generate("b", GREEDY)._box.request)

            monkeypatch.setattr(thread, "_take_in", and_another_one_comes_and_goes)
            await async_llm.complete("a", GREEDY)
            await until(lambda: len(requests) == 3 and all(request.finished for request in requests))
            assert [request.output().outputs[0].finish_reason for request in requests] == ["abort"] * 3
            assert all(not request.samples[0].token_ids for request in requests)
            await until_idle(async_llm)

    run(main)


def test_K09_time_is_over_in_line_and_at_work(llm, monkeypatch):
    """By the monotonic clock: the other one jumps back all the time."""
    jumps = itertools.count(0, -1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    async def main():
        async with AsyncLLM(llm, max_waiting=1) as async_llm:
            with pytest.raises(RequestTimeoutError, match="timeout=0 seconds"):
                await async_llm.complete("a", LONG, timeout=0)
            monkeypatch.setattr(llm.engine, "step", slowed(llm.engine.step, 0.01))
            first = async_llm.generate("a", LONG, timeout=0.3)
            third = async_llm.generate("c", GREEDY, timeout=20)
            second = asyncio.create_task(async_llm.complete("b", GREEDY, timeout=0.1))
            with pytest.raises(RequestTimeoutError, match="found no room within timeout=0.1 seconds"):
                await second
            chunks = []
            with pytest.raises(RequestTimeoutError, match="not done within timeout=0.3 seconds"):
                await append_chunks(first, chunks)
            assert {chunk.finish_reason for chunk in chunks} == {None}
            ids = list(itertools.chain(*(chunk.token_ids for chunk in chunks)))
            assert 0 < len(ids) < 80
            assert [chunk async for chunk in first] == []
            return ids, await gather_chunks(third)

    ids, third = run(main)
    monkeypatch.undo()
    assert alone(llm, "a", LONG)[0].token_ids[: len(ids)] == ids
    assert third == joined_of(alone(llm, "c", GREEDY))

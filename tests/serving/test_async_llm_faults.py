"""AsyncLLM when something fails: a request, a step, the device, a loop, the process; and how it ends."""

import asyncio
import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import (
    EngineDeadError,
    NonFiniteLogitsError,
    RequestError,
    RequestFailedError,
)
from llama_fast.serving.async_llm import AsyncLLM
from tests.byte_model import save_byte_model
from tests.serving.async_callers import (
    ENGINE,
    GREEDY,
    LIMIT_S,
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
from tests.tiny import fail_at


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


# --- failures ---------------------------------------------------------------------------------------------------------


def test_K07_a_poisoned_request_fails_alone(folder):
    """The first one's own token has NaN in its embedding, the second one's text cannot be made."""
    own = LLM(folder, **ENGINE)
    bad = 250
    own.model.model.embed_tokens.weight.data[bad] = math.nan
    own.model.refresh()
    healthy = SamplingParams(max_tokens=12, ignore_eos=True, logit_bias={bad: -100.0})
    expected = joined_of(alone(own, "hello", healthy))
    poison = SamplingParams(max_tokens=5, ignore_eos=True, logit_bias={bad: 100.0})

    class Broken:
        def stream(self, **_):
            raise ValueError("no such text")

    async def main():
        async with AsyncLLM(own) as async_llm:
            streams = [async_llm.generate("hello", healthy) for _ in range(2)]
            poisoned = async_llm.generate("a", poison)
            untold = async_llm.generate("b", healthy)
            untold._box.request.tokenizer = Broken()
            readers = [asyncio.create_task(gather_chunks(stream)) for stream in streams]
            chunks = []
            with pytest.raises(NonFiniteLogitsError, match="NaN"):
                await append_chunks(poisoned, chunks)
            assert [(chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [([bad], None)]
            with pytest.raises(RequestFailedError, match="no such text"):
                await gather_chunks(untold)
            with pytest.raises(NonFiniteLogitsError):
                await async_llm.complete("a", poison)
            assert await asyncio.gather(*readers) == [expected] * 2
            assert async_llm.stats().free_pages == async_llm.stats().pages

    run(main)


def test_K07_a_step_that_fails_for_nobody_ends_what_runs_and_nothing_else(llm, monkeypatch):
    """Not what stands in line, and not what comes later."""
    expected = joined_of(alone(llm, "c", GREEDY))
    step, failing = llm.engine.step, []

    def fails():
        samples = step()
        if failing:
            raise failing.pop()
        return samples

    async def main():
        monkeypatch.setattr(llm.engine, "step", fails)
        async with AsyncLLM(llm, max_waiting=2) as async_llm:
            for error, kind in (
                (RuntimeError("nobody's"), RequestFailedError),
                (RequestError("changed"), RequestError),
            ):
                running = [async_llm.generate(prompt, LONG) for prompt in "ab"]
                in_line = async_llm.generate("c", GREEDY)
                firsts = [await anext(stream) for stream in running]
                assert all(first.token_ids for first in firsts)
                failing.append(error)
                for stream in running:
                    with pytest.raises(kind, match=str(error)):
                        await gather_chunks(stream)
                assert await gather_chunks(in_line) == expected
                assert await gather_chunks(async_llm.generate("c", GREEDY)) == expected
                await until_idle(async_llm)

    run(main)


def test_weights_that_change_at_work_and_between(folder):
    own = LLM(folder, **ENGINE)
    before = alone(own, "a", GREEDY)

    async def main():
        async with AsyncLLM(own) as async_llm:
            assert (await async_llm.complete("a", GREEDY)).outputs == before
            with torch.no_grad():
                own.model.lm_head.weight.neg_()
            changed = (await async_llm.complete("a", GREEDY)).outputs
            stream = async_llm.generate("a", LONG)
            await anext(stream)
            own.model.refresh()
            with pytest.raises(RequestError, match="weights changed"):
                await gather_chunks(stream)
            assert (await async_llm.complete("a", GREEDY)).outputs == changed
            # Another type: no session can begin any more, and every request is told so.
            own.model.to(torch.bfloat16)
            for _ in range(2):
                with pytest.raises(RequestError, match="moved or cast"):
                    await async_llm.complete("a", GREEDY)
            own.model.to(torch.float32)
            await async_llm.complete("a", GREEDY)
            return changed

    changed = run(main)
    assert changed != before


# --- a dead engine ----------------------------------------------------------------------------------------------------


async def _all_get(error, message, waiters, since, limit_s=2.0):
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert time.monotonic() - since < limit_s
    for result in results:
        assert isinstance(result, error), result
        assert message in str(result)
    assert len({id(result) for result in results}) == len(results)


async def _refused(async_llm, message):
    """Later calls."""
    for call in (lambda: async_llm.generate("a", GREEDY), async_llm.stats):
        with pytest.raises(EngineDeadError, match=message):
            call()
    with pytest.raises(EngineDeadError, match=message):
        await async_llm.complete("a", GREEDY)
    with pytest.raises(EngineDeadError, match=message):
        await async_llm.abort("x")


def _all_kinds(async_llm):
    """Two run, the others stand in line; the last one is a call that waits for a request's end."""
    streams = [async_llm.generate("a", LONG, request_id="x"), *(async_llm.generate("b", LONG) for _ in range(3))]
    return [
        *(asyncio.create_task(gather_chunks(stream)) for stream in streams),
        asyncio.create_task(async_llm.complete("c", LONG)),
    ]


def test_L05_a_device_error_reaches_everybody(folder, monkeypatch):
    own = LLM(folder, **ENGINE)
    message = "CUDA error: an illegal memory access was encountered"

    async def main():
        gate = Gate(monkeypatch, own.engine)
        async with AsyncLLM(own, max_waiting=2) as async_llm:
            waiters = _all_kinds(async_llm)
            await until(lambda: gate.steps == 1)
            await gate.let(3)
            fail_at(monkeypatch, "sample", 1, lambda _: torch.AcceleratorError(message))
            waiters.append(asyncio.create_task(async_llm.abort(await _second_id(async_llm))))
            await asyncio.sleep(0.01)
            since = time.monotonic()
            gate.open()
            await _all_get(EngineDeadError, message, waiters, since)
            await _refused(async_llm, "illegal memory access")
            await async_llm.close()
            await _refused(async_llm, "illegal memory access")

    run(main)
    with pytest.raises(EngineDeadError):
        own.generate("a", GREEDY)


async def _second_id(async_llm):
    """The id of a request that runs besides "x"."""
    return next(name for name in async_llm._thread._room._open if name != "x")


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()], ids=["SystemExit", "GeneratorExit"])
def test_K06_a_thread_that_ends_in_any_way_tells_everybody(folder, monkeypatch, error, caplog):
    own = LLM(folder, **ENGINE)

    async def main():
        step, failing = own.engine.step, []

        def fails():
            if failing:
                raise failing[0]
            return step()

        monkeypatch.setattr(own.engine, "step", fails)
        async with AsyncLLM(own, max_waiting=2) as async_llm:
            waiters = _all_kinds(async_llm)
            await asyncio.sleep(0)
            failing.append(error)
            await _all_get(EngineDeadError, "thread failed", waiters, time.monotonic())
            await _refused(async_llm, "thread failed")

    run(main)
    assert "the engine's thread failed" in caplog.text


def test_K10_a_step_that_hangs(folder, monkeypatch, capfd):
    """Stacks on stderr, EngineDeadError for everybody; close does not wait for it."""
    own = LLM(folder, **ENGINE)
    go_on = threading.Event()

    async def main():
        step, calls = own.engine.step, []

        def hung_in_the_third_step():
            calls.append(time.monotonic())
            if len(calls) == 3:
                go_on.wait(LIMIT_S)
            return step()

        monkeypatch.setattr(own.engine, "step", hung_in_the_third_step)
        async with AsyncLLM(own, max_waiting=2, stall_timeout=0.3) as async_llm:
            waiters = _all_kinds(async_llm)
            await until(lambda: len(calls) == 3)
            waiters.append(asyncio.create_task(async_llm.abort("x")))
            await _all_get(EngineDeadError, "stall_timeout=0.3 seconds", waiters, calls[2], limit_s=2.3)
            assert time.monotonic() - calls[2] >= 0.3
            await _refused(async_llm, "more than stall_timeout")
            since = time.monotonic()
            await async_llm.close()
            assert time.monotonic() - since < 1
        go_on.set()
        assert async_llm._thread._thread.is_alive() or async_llm._thread.join(0)
        async_llm._thread._thread.join(5)
        assert not async_llm._thread._thread.is_alive()

    run(main)
    shown = capfd.readouterr().err
    assert "a step has taken more than 0.3 seconds" in shown
    assert "hung_in_the_third_step" in shown and "Thread" in shown


def test_K10_no_false_alarm(llm, monkeypatch):
    """Idle, and in a run of many steps, each for longer than a step may take."""

    async def main():
        step = llm.engine.step
        monkeypatch.setattr(llm.engine, "step", slowed(step, 0.03))
        async with AsyncLLM(llm, stall_timeout=0.25) as async_llm:
            await asyncio.sleep(0.6)
            since = time.monotonic()
            output = await async_llm.complete("a", SamplingParams(max_tokens=25, ignore_eos=True))
            assert time.monotonic() - since > 0.6
            await asyncio.sleep(0.6)
            async_llm.stats()
            return output.outputs

    outputs = run(main)
    monkeypatch.undo()
    assert outputs == alone(llm, "a", SamplingParams(max_tokens=25, ignore_eos=True))


# --- loops, threads, processes ----------------------------------------------------------------------------------------


def test_K03_loops_in_several_threads(llm):
    prompts = ["a", "bb", "c" * 20, "dddd"]
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, ignore_eos=True)
    expected = [joined_of(alone(llm, prompt, params)) for prompt in prompts]
    results = {}

    async def in_thread(async_llm):
        return await asyncio.gather(*(gather_chunks(async_llm.generate(prompt, params)) for prompt in prompts))

    def thread_main(async_llm, number):
        results[number] = run(in_thread, async_llm)

    async def main():
        async with AsyncLLM(llm, max_waiting=5) as async_llm:
            threads = [threading.Thread(target=thread_main, args=(async_llm, number)) for number in range(3)]
            for thread in threads:
                thread.start()
            results[3] = await in_thread(async_llm)
            await asyncio.to_thread(lambda: [thread.join(LIMIT_S) for thread in threads])

    run(main)
    assert [results[number] for number in range(4)] == [expected] * 4


def test_K03_a_loop_that_is_closed_in_the_middle(llm, monkeypatch):
    """Without cancelling its tasks. The engine goes on for the others, and the lost request ends."""
    expected = joined_of(alone(llm, "b", GREEDY))
    monkeypatch.setattr(llm.engine, "step", slowed(llm.engine.step, 0.005))
    async_llm = AsyncLLM(llm)
    lost = asyncio.new_event_loop()
    lost.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending"
    tasks = [
        lost.create_task(gather_chunks(async_llm.generate("a", LONG))),
        lost.create_task(async_llm.complete("a", SamplingParams(max_tokens=30, ignore_eos=True))),
    ]
    lost.run_until_complete(asyncio.sleep(0.03))
    lost.close()

    async def main():
        for _ in range(5):
            assert await gather_chunks(async_llm.generate("b", GREEDY)) == expected
        await until_idle(async_llm)
        await async_llm.close()

    run(main)
    tasks.clear()
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_K03_in_a_child_process_it_says_so(llm):
    async def main():
        async with AsyncLLM(llm) as async_llm:
            stream = async_llm.generate("a", LONG)
            await anext(stream)
            # Held while the process is copied: who waited for it there would wait for ever.
            with async_llm._thread._room._lock:
                child = os.fork()
            if child == 0:
                signal.alarm(10)
                os._exit(_in_child(async_llm, stream))
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await gather_chunks(stream)

    run(main)


def _in_child(async_llm, stream):
    """0 if all is as it should be; steps coroutines by hand, as the loop is the parent's."""
    for call in (
        lambda: async_llm.generate("a", GREEDY),
        async_llm.stats,
        lambda: async_llm.complete("a", GREEDY).send(None),
        lambda: async_llm.abort("x").send(None),
        lambda: stream.__anext__().send(None),
    ):
        try:
            call()
        except RequestError as error:
            if "another process" not in str(error):
                return 2
        else:
            return 3
    for coroutine in (stream.aclose(), async_llm.close()):
        with contextlib.suppress(StopIteration):
            coroutine.send(None)
            return 4
    return 0


def test_closing_ends_what_runs_and_what_waits(llm, monkeypatch):
    whole_ids = alone(llm, "a", LONG)[0].token_ids

    async def main():
        gate = Gate(monkeypatch, llm.engine)
        async_llm = AsyncLLM(llm, max_waiting=3)
        streams = [async_llm.generate("a", LONG) for _ in range(4)]
        readers = [asyncio.create_task(gather_chunks(stream)) for stream in streams[:3]]
        whole = asyncio.create_task(async_llm.complete("b", LONG, request_id="x"))
        await until(lambda: gate.steps == 1)
        await gate.let(4)
        closing = [asyncio.create_task(async_llm.close()) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="this AsyncLLM is closed"):
            async_llm.generate("a", GREEDY)
        gate.open()
        await asyncio.gather(*closing)
        await async_llm.close()
        *running, in_line = [*await asyncio.gather(*readers), await gather_chunks(streams[3])]
        for one in running:
            assert 4 <= len(one[0][1]) <= 5 and whole_ids[: len(one[0][1])] == one[0][1]
            assert one[0][2] == "abort"
        assert in_line == {0: ("", [], "abort")}
        assert (await whole).outputs[0].finish_reason == "abort"
        for call in (lambda: async_llm.generate("a", GREEDY), async_llm.stats):
            with pytest.raises(RequestError, match="this AsyncLLM is closed; make a new one"):
                call()
        with pytest.raises(RequestError, match="closed"):
            await async_llm.complete("a", GREEDY)

    run(main)
    monkeypatch.undo()
    assert alone(llm, "a", LONG)[0].token_ids == whole_ids


def test_one_that_is_forgotten_ends_its_thread(llm):
    async_llm = AsyncLLM(llm)
    thread = async_llm._thread._thread
    run(gather_chunks, async_llm.generate("a", GREEDY))
    del async_llm
    gc.collect()
    thread.join(2)
    assert not thread.is_alive()


def test_a_loop_that_breaks_off_holds_no_request(llm):
    async def main():
        async with AsyncLLM(llm) as async_llm:
            async for _ in async_llm.generate("a", LONG, request_id="x"):
                break
            async_llm.generate("b", LONG)  # never looked at
            await until_idle(async_llm)
            assert not await async_llm.abort("x")

    run(main)


def test_the_interpreter_ends_in_the_middle_of_a_request(folder):
    program = textwrap.dedent(
        f"""
        import asyncio
        from llama_fast import AsyncLLM, SamplingParams

        llm = AsyncLLM({str(folder)!r}, **{ENGINE!r})
        streams = [llm.generate("a", SamplingParams(max_tokens=120, ignore_eos=True)) for _ in range(50)]

        async def main():
            print(len((await anext(streams[0])).token_ids) > 0)

        asyncio.run(main())
        """
    )
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "True\n", "")

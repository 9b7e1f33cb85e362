"""How long an engine's steps take by what is in them, and how much of a step is scheduling.

device       what computes: runs of the graph, logits, draws, and waiting for the tokens. Each of them counts once, also
             inside of another.
scheduling   the scheduler's methods: what runs next, on which pages, and what has run.
the rest     of a step is bookkeeping too: rows that join and leave, tokens handed to their requests.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
from serving_common import greedy_request
from serving_ideal import Kind

from llama_fast.engine import running
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request
from llama_fast.engine.scheduler import Scheduler

_SCHEDULING = ("plan", "ran", "fork", "finish")
# Decoding steps measured for each number of sequences, each time, and those before that may not be steady; steps with
# each chunk of a prompt.
_STEPS, _WARM_STEPS, _CHUNK_STEPS = 3, 2, 2


class StepClock:
    """Times the parts of an engine's steps, as a context manager around them.

    Attributes:
        step_s, device_s, scheduler_s: seconds of each step; of these, the device's and the scheduler's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._stack = engine, ExitStack()
        self._spent = {"device": 0.0, "scheduler": 0.0}
        self._inside: set[str] = set()
        self.step_s: list[float] = []
        self.device_s: list[float] = []
        self.scheduler_s: list[float] = []

    def __enter__(self) -> Self:
        engine, decoder = self._engine, self._engine.decoder
        for owner, name in (
            (running, "run_works"),
            (engine.model, "logits"),
            (decoder, "draw"),
            (decoder, "read"),
            (decoder.graph, "run"),
        ):
            self._replace(owner, name, self._timed("device", getattr(owner, name)))
        for name in _SCHEDULING:
            self._replace(Scheduler, name, self._timed("scheduler", getattr(Scheduler, name)))
        must_preempt: Any = Scheduler.must_preempt
        self._replace(Scheduler, "must_preempt", property(self._timed("scheduler", must_preempt.fget)))
        self._replace(engine, "step", self._step(engine.step))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, other: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, other))

    def _timed(self, whose: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if whose in self._inside:
                return function(*args, **options)
            self._inside.add(whose)
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self._spent[whose] += time.perf_counter() - start
                self._inside.remove(whose)

        return call

    def _step(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            self._spent = dict.fromkeys(self._spent, 0.0)
            start = time.perf_counter()
            stepped = step()
            self.step_s.append(time.perf_counter() - start)
            self.device_s.append(self._spent["device"])
            self.scheduler_s.append(self._spent["scheduler"])
            return stepped

        return call

    @property
    def scheduler_share(self) -> float:
        """The scheduler's share of all steps."""
        return sum(self.scheduler_s) / sum(self.step_s)

    @property
    def host_share(self) -> float:
        """The share of all that is not the device's; where steps are enqueued ahead the device works on meanwhile."""
        return 1 - sum(self.device_s) / sum(self.step_s)


class StepTimes:
    """Seconds of an engine's steps by sequences that decode and prompt tokens beside them, sampled again and again.

    The sequences decode at one context: only the last token of their prompts is run, what attention reads before it is
    random. The prompt tokens beside them are the last of one prompt, which ends with the step; before them are as many
    as make them attend to `attended` tokens on average, or none.

    Args:
        engine: ready, with nothing running whenever `sample` is called; what is in its cache is lost.
        places: of all engines that the steps are for, of which this one has the most.
        chunks: numbers of prompt tokens.
        context: tokens that a sequence attends to.
    """

    def __init__(
        self, engine: Engine, places: Sequence[int], chunks: Sequence[int], attended: int, context: int, seed: int
    ) -> None:
        self._engine, self._chunks, self._attended, self._context = engine, chunks, attended, context
        # What decodes in a full step, and in smaller ones; and what decodes beside a prompt, which takes a place.
        self._decoding = {size for one in places for size in (1, one // 4, one // 2, one)} - {0}
        self._beside = {one - 1 for one in places}
        if not engine.ops.ROLES_SHARE_RUNS:
            self._beside = {0}  # prompts run apart from what decodes, and cost what they cost alone
        self._generator = torch.Generator().manual_seed(seed)
        self._samples: dict[tuple[int, int], list[float]] = {}

    @staticmethod
    def seq_len(chunks: Sequence[int], attended: int, context: int) -> int:
        """What the engine's max_seq_len has to be, at least."""
        return max(context + _new_tokens(chunks), *(_before(chunk, attended) + chunk + 1 for chunk in chunks))

    def sample(self) -> None:
        """Measure every kind of step once more."""
        self._engine.cache.pool.normal_()
        for size in sorted(self._decoding | self._beside):
            self._sample(size)

    def kinds(self) -> list[Kind]:
        """The median of each."""
        return [Kind(*of, statistics.median(samples)) for of, samples in self._samples.items()]

    def _request(self, length: int, num_tokens: int) -> Request:
        prompt = torch.randint(self._engine.model.config.vocab_size, (length,), generator=self._generator).tolist()
        return greedy_request(self._engine, prompt, num_tokens)

    def _sample(self, size: int) -> None:
        engine, new_tokens = self._engine, _new_tokens(self._chunks)
        decoding = [self._request(self._context, new_tokens) for _ in range(size)]
        with engine.session(), StepClock(engine) as clock:
            for request in decoding:
                request.samples[0].sequence.num_computed = self._context - 1
                engine.add(request)
            if size:
                for _ in range(_WARM_STEPS + _STEPS):
                    engine.step()
                self._record(size, 0, clock, _STEPS)
            for most in [*self._chunks] * _CHUNK_STEPS if size in self._beside else ():
                # With the sequences' own tokens the step is as large as the engine makes one.
                chunk = max(1, min(most, engine.prefill_chunk - size))
                before = _before(chunk, self._attended)
                prompt = self._request(before + chunk, 1)
                prompt.samples[0].sequence.num_computed = before
                engine.add(prompt)
                engine.step()
                if prompt.finished:
                    self._record(size, chunk, clock, 1)
                engine.abort(prompt)  # in a cache that is too small for it
        failed = next((request.error for request in decoding if request.error is not None), None)
        if failed is not None:
            raise failed

    def _record(self, size: int, chunk: int, clock: StepClock, count: int) -> None:
        # Where steps are enqueued ahead the device works while the host does, and a step takes what it takes.
        taken = clock.device_s if self._engine.decoder.steps_ahead == 1 else clock.step_s
        self._samples.setdefault((size, chunk), []).extend(taken[-count:])


def _new_tokens(chunks: Sequence[int]) -> int:
    """What a sequence generates while it is measured, and some more: it must not end before."""
    return _WARM_STEPS + _STEPS + _CHUNK_STEPS * len(chunks) + 2


def _before(chunk: int, attended: int) -> int:
    """Tokens before a chunk of a prompt, half of which its tokens attend to on average too."""
    return max(0, attended - chunk // 2)

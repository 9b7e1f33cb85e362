"""Runs requests for a certificate, and says what each of them gave."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_fast.engine.certify_recording import RecordingEngine
from llama_fast.engine.certify_requests import MOST_SAMPLES, Requests
from llama_fast.engine.certify_watch import Trace, Watch
from llama_fast.engine.outputs import FinishReason, PositionLogprobs
from llama_fast.engine.request import Request
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.tokenizer import LlamaTokenizer


class NotHere(Exception):
    """A device has no such path; the message says why."""


class NotTaken(Exception):
    """What a path is about did not happen; the message says what."""


def check_taken(condition: object, problem: str) -> None:
    """Raise NotTaken if what a path is about did not happen."""
    if not condition:
        raise NotTaken(problem)


@dataclass(frozen=True)
class SampleOutcome:
    """What a sample ended with; `digests` of the logits of each token, None where they were not recorded."""

    token_ids: tuple[int, ...]
    digests: tuple[bytes, ...] | None
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    text: str

    @property
    def draws(self) -> int:
        """Tokens that were drawn; that of a request that takes none counts too."""
        return max(1, len(self.token_ids))


@dataclass(frozen=True)
class Outcome:
    """What a request ended with."""

    samples: tuple[SampleOutcome, ...]
    prompt_logprobs: list[PositionLogprobs | None] | None
    error: str | None


@dataclass(frozen=True)
class Group:
    """Requests that are run together.

    Attributes:
        number: how many groups were made before in this path.
        places: of their specs.
    """

    number: int
    places: tuple[int, ...]
    requests: list[Request]


@dataclass(frozen=True)
class Run:
    """What a group gave; `label` says what is special about this run of a path."""

    group: Group
    outcomes: list[Outcome]
    label: str = ""


# What a path is.
Runs = Generator[Run, None, None]


@dataclass
class Runner:
    """Makes the engines and the requests of one certificate.

    Attributes:
        backend: the name of the one that runs.
        page_size, split_size: of every cache.
        tokenizer: of the texts.
        fault: changes an op, where one was planted.
        expected: what the baseline gave, by place.
        trace: follows one sample of one group; engines then run op by op and capture nothing, if it follows ops.
    """

    model: LlamaLM
    backend: str
    requests: Requests
    page_size: int
    split_size: int
    tokenizer: LlamaTokenizer | None = None
    fault: Watch | None = None
    expected: dict[int, Outcome] = field(default_factory=dict)
    trace: Trace | None = None
    _groups: int = 0

    def begin(self, trace: Trace | None = None) -> None:
        """A path begins."""
        self.trace, self._groups = trace, 0

    def pages(self, places: Sequence[int]) -> int:
        """Pages that hold all of these requests at their ends."""
        specs = [self.requests.specs[place] for place in places]
        return sum(spec.params.n * -(-spec.max_len // self.page_size) for spec in specs)

    def samples(self, places: Sequence[int]) -> int:
        return sum(self.requests.specs[place].params.n for place in places)

    def engine(
        self,
        places: Sequence[int],
        *,
        pages: int | None = None,
        op_by_op: bool = False,
        **options: Any,
    ) -> RecordingEngine:
        """An engine that has room for requests; what is not said is as users run it, without shared prefixes.

        Args:
            pages: of the cache; default what the requests fill together.
            op_by_op: whether the layers' ops are called one by one, as they are where something is watched.
            options: others of `Engine`. By default all samples run together and the longest request of all fits.
        """
        max_seq_len = options.pop("max_seq_len", self.requests.longest)
        pages = max(self.pages(places) if pages is None else pages, -(-max_seq_len // self.page_size))
        traced = self.trace if self.trace is not None and self.trace.ops else None
        watches = [watch for watch in (self.fault, traced) if watch is not None]
        options = {"max_batch": max(MOST_SAMPLES, self.samples(places)), "prefix_caching": False, **options}
        if traced is not None:
            options |= {"graphs": False}
        return RecordingEngine(
            self.model,
            watches if watches or op_by_op else None,
            self.trace,
            backend=self.backend,
            page_size=self.page_size,
            split_size=self.split_size,
            max_seq_len=max_seq_len,
            cache_bytes=pages * PagedKVCache.page_bytes(self.model.config, self.page_size, self.model.dtype),
            **options,
        )

    def group(self, places: Sequence[int], **changes: Any) -> Group:
        """New requests; `changes` of their parameters."""
        made = []
        for index, place in enumerate(places):
            spec = self.requests.specs[place]
            tokenizer = self.tokenizer if spec.text is not None else None
            made.append(Request(spec.text, list(spec.prompt), spec.resolve(self.model, **changes), tokenizer, index))
        if self.trace is not None:
            self.trace.choose(self._groups, made)
        self._groups += 1
        return Group(self._groups - 1, tuple(places), made)

    def run(self, engine: RecordingEngine, places: Sequence[int], label: str = "", **changes: Any) -> Run:
        """Run requests to their ends, all there from the start."""
        group = self.group(places, **changes)
        for _ in engine.run(group.requests):
            pass
        return self.ended(engine, group, label)

    def ended(self, engine: RecordingEngine, group: Group, label: str = "") -> Run:
        """What requests gave that have ended."""
        return Run(group, [_outcome(engine, request) for request in group.requests], label)

    def alone(self, places: Sequence[int]) -> Runs:
        """The baseline: one request after the other, one step at a time, nothing captured, nothing shared."""
        engine = self.engine(places, graphs=False, steps_ahead=1, max_batch=MOST_SAMPLES)
        for place in places:
            engine.cache.pool.fill_(torch.nan)
            yield self.run(engine, [place])


def feed(engine: RecordingEngine, group: Group, doomed: Group | None, draw: random.Random) -> tuple[int, int]:
    """Add requests now and then, abort the doomed ones in the middle, until all have ended.

    Returns:
        How many came while others decoded, and how many were aborted while they decoded.
    """
    victims = [] if doomed is None else list(doomed.requests)
    queue, joined, aborted = [*group.requests], 0, 0
    for victim in victims:
        queue.insert(draw.randrange(len(queue) + 1), victim)
    with engine.session():
        engine.make_ready()
        while queue or engine.has_work:
            if queue and (not engine.has_work or draw.random() < 0.4):
                joined += bool(engine.decoder.samples)
                engine.add(queue.pop())
                continue
            engine.step()
            for victim in victims:
                if not victim.finished and victim.samples[0].token_ids and draw.random() < 0.5:
                    engine.abort(victim)
                    aborted += 1
    return joined, aborted


def _outcome(engine: RecordingEngine, request: Request) -> Outcome:
    samples = []
    for sample in request.samples:
        output = sample.output()
        digests = engine.recorder.digests(sample)
        ended = output.finish_reason, output.stop_reason, output.text
        samples.append(SampleOutcome(tuple(output.token_ids), digests, output.logprobs, *ended))
    return Outcome(tuple(samples), request.prompt_logprobs, None if request.error is None else str(request.error))

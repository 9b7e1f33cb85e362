"""What a request returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llama_fast.errors import LlamaFastError

# stop: a stop token or stop string; length: max_tokens or the context's end; abort: interrupted; error: see `error`.
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """One token's log probability in the model's raw distribution, and its rank in it (1 = most probable)."""

    logprob: float
    rank: int


# The token at a position and the most probable alternatives: token id -> Logprob.
PositionLogprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: sample index, 0 .. n-1.
        text: what the generated tokens add to the decoded prompt, without the stop token or stop string.
        token_ids: all generated ids, the stop token included.
        logprobs: one entry a generated token if `logprobs` was asked for, of the raw distribution (before penalties,
            bias, temperature and filters), else None.
        finish_reason: why it ended; None while it runs.
        stop_reason: the stop string or token id that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


@dataclass
class RequestMetrics:
    """Times of one request in seconds on the monotonic clock.

    Attributes:
        arrival: when it was submitted.
        started: when its prompt was first worked on.
        first_token: when its first token was known.
        last_token: when its last token was known.
        finished: when its last sample ended.
        shared_tokens: prompt tokens that were not run, as the cache held them when the prompt was first worked on.
        preempted: times that a sample of it waited in the host's memory.
        guessed, guessed_right: tokens that prompt lookup guessed, and how many of them rightly.
    """

    arrival: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    shared_tokens: int = 0
    preempted: int = 0
    guessed: int = 0
    guessed_right: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from submission until its prompt was first worked on."""
        return None if self.started is None else self.started - self.arrival

    @property
    def prefill_time(self) -> float | None:
        """Seconds from then to the first token."""
        return None if self.first_token is None or self.started is None else self.first_token - self.started

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the last."""
        return None if self.first_token is None or self.last_token is None else self.last_token - self.first_token

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from submission to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival


@dataclass(frozen=True)
class RequestOutput:
    """All samples of one prompt.

    Attributes:
        prompt: the prompt's text, None if ids were given.
        prompt_token_ids: what the model saw.
        prompt_logprobs: one entry a prompt token (None for the first) if asked for.
        outputs: n samples in order.
        error: what ended the request early, if finish_reason is "error".
    """

    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    error: LlamaFastError | None = None

    @property
    def inter_token_time(self) -> float | None:
        """Mean seconds between two tokens of its longest sample; None below two."""
        steps = max((len(sample.token_ids) for sample in self.outputs), default=0) - 1
        seconds = self.metrics.decode_time
        return None if seconds is None or steps < 1 else seconds / steps


@dataclass(frozen=True)
class TokenChunk:
    """What one step added to one sample while streaming.

    Attributes:
        request_index: which prompt of the call.
        index: which sample of it.
        text: text that is final now; may be empty.
        token_ids: the new ids.
        finish_reason: set on the sample's last chunk.
        error: what ended it, if finish_reason is "error".
    """

    request_index: int
    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: LlamaFastError | None = None


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine.

    Attributes:
        decode_steps: decoding steps that were enqueued.
        captured: numbers of rows that have a captured step; empty where steps are not captured.
        allocations: times that memory was taken from the device since the engine was ready; None where PyTorch does not
            count them, as on the CPU.
        compilations: kernels that the process compiled or loaded since then.
        waiting, running: sequences, preempted ones among the waiting.
        preempted: times that a sequence gave up its pages.
        pages, free_pages: of the cache.
        shared_pages: known pages that a prompt may begin with, in use or free.
        prompt_tokens: of the prompts that began to run.
        shared_tokens: of these, those that were not run, as a page held them.
    """

    decode_steps: int
    captured: tuple[int, ...]
    allocations: int | None
    compilations: int
    waiting: int = 0
    running: int = 0
    preempted: int = 0
    pages: int = 0
    free_pages: int = 0
    shared_pages: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0

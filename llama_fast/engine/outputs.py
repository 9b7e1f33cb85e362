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
        finished: when its last sample ended.
    """

    arrival: float
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None

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
    """

    decode_steps: int
    captured: tuple[int, ...]
    allocations: int | None
    compilations: int

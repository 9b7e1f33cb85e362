"""A request and its samples while they run: tokens, text, stop conditions, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from llama_fast.engine.outputs import CompletionOutput, FinishReason, PositionLogprobs, RequestMetrics, RequestOutput
from llama_fast.engine.prompt_lookup import PromptLookup
from llama_fast.engine.sampling import ResolvedSampling
from llama_fast.engine.scheduler import Sequence
from llama_fast.errors import LlamaFastError
from llama_fast.tokenizer import LlamaTokenizer, TokenStream

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["last", "first", "mean", "all"]


class StoppableText:
    """Text of a growing list of tokens, ended by the first stop string.

    Text that may turn out to be the beginning of a stop string is held back, so what was handed out is never taken
    back. Below `min_tokens` stop strings do not end the text; one must lie wholly behind that point.
    """

    def __init__(self, stream: TokenStream, stop: tuple[str, ...]) -> None:
        self._stream = stream
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int, may_stop: bool) -> str:
        """Add a token; returns the text that is final now and sets `stop_string` if it completed one."""
        return self._settle(self._stream.push(token_id), may_stop, last=False)

    def finish(self, may_stop: bool) -> str:
        """No token follows: returns the rest."""
        return self._settle(self._stream.finish(), may_stop, last=True)

    def _settle(self, piece: str, may_stop: bool, last: bool) -> str:
        self._held += piece
        if may_stop:
            found = [(self._held.find(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
            if found:
                start, _, self.stop_string = min(found)
                return self._emit(start, drop_rest=True)
        keep = 0 if last or not may_stop else max((self._overlap(stop) for stop in self._stop), default=0)
        return self._emit(len(self._held) - keep)

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _emit(self, end: int, drop_rest: bool = False) -> str:
        piece, self._held = self._held[:end], "" if drop_rest else self._held[end:]
        self.text += piece
        return piece


@dataclass(eq=False)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: its text, if it was given as text.
        prompt_token_ids: what the model sees; at least one.
        sampling: concrete parameters.
        tokenizer: decodes and finds stop strings; None for ids only.
        index: which prompt of the call.
        priority: lower ones run first; equal ones in order of arrival.
        cache_salt: requests share pages of equal beginnings only with those of the same salt.
        timeout: seconds from now after which it ends with RequestTimeoutError; None: never.
        on_token: called with a sample when it got a token; what it raises ends the request.
        pooling: which hidden states of the prompt (after the final norm) are wanted instead of tokens.
        states: of these, what the chunks run so far gave, by their start.
        pooled: these, fp32 on the CPU: [hidden_size], or [num_tokens, hidden_size] for "all".
    """

    prompt: str | None
    prompt_token_ids: list[int]
    sampling: ResolvedSampling
    tokenizer: LlamaTokenizer | None
    index: int = 0
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None
    on_token: Callable[[Sample], None] | None = None
    pooling: Pooling | None = None
    pooled: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    error: LlamaFastError | None = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival=time.monotonic()))

    def __post_init__(self) -> None:
        if self.sampling.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        prompt_len = len(self.prompt_token_ids)
        first = Sequence(
            list(self.prompt_token_ids),
            prompt_len,
            prompt_len + self.sampling.max_tokens,
            self.sampling.n,
            priority=self.priority,
            guesses=self.sampling.prompt_lookup_num_tokens,
        )
        self.samples = [Sample(self, index, first) for index in range(self.sampling.n)]

    @property
    def finished(self) -> bool:
        """Whether all of its samples have ended."""
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def deadline(self) -> float | None:
        """On the monotonic clock."""
        return None if self.timeout is None else self.metrics.arrival + self.timeout

    def output(self) -> RequestOutput:
        """What is known by now."""
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[sample.output() for sample in self.samples],
            metrics=self.metrics,
            error=self.error,
        )


class Sample:
    """One continuation of a request's prompt.

    Attributes:
        sequence: its tokens in the cache; until the prompt has run, that of sample 0.
    """

    def __init__(self, request: Request, index: int, sequence: Sequence) -> None:
        self.request = request
        self.index = index
        self.sequence = sequence
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] | None = [] if request.sampling.logprobs is not None else None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._told_chars = self._told_ids = 0

    @cached_property
    def _text(self) -> StoppableText | None:
        """Made with the first token, when the prompt has been checked."""
        request = self.request
        if request.tokenizer is None:
            return None
        stream = request.tokenizer.stream(skip_special_tokens=request.sampling.skip_special_tokens)
        # A SentencePiece decoder drops the space before a text's first word: the text goes on from the prompt's.
        stream.skip(request.prompt_token_ids)
        return StoppableText(stream, request.sampling.stop)

    @cached_property
    def lookup(self) -> PromptLookup | None:
        """Guesses what follows, if that is wanted. Penalties and bias depend on the tokens before: none then."""
        sampling = self.request.sampling
        if not sampling.prompt_lookup_num_tokens or sampling.penalizes or sampling.logit_bias or sampling.min_tokens:
            return None
        return PromptLookup(
            self.sequence.token_ids, sampling.prompt_lookup_num_tokens, sampling.max_matching_ngram_size
        )

    @property
    def may_stop(self) -> bool:
        """Whether `min_tokens` is reached, counting the tokens so far."""
        return len(self.token_ids) >= self.request.sampling.min_tokens

    def append(self, token_id: int) -> None:
        """Take a generated token and decide whether the sample ends with it."""
        sampling = self.request.sampling
        self.token_ids.append(token_id)
        self.sequence.token_ids.append(token_id)
        if token_id in sampling.stop_token_ids and self.may_stop:
            self._end("stop", token_id)
            return
        if self._text is not None:
            self._text.push(token_id, self.may_stop)
            if self._text.stop_string is not None:
                self._end("stop", self._text.stop_string)
                return
        if len(self.token_ids) >= sampling.max_tokens:
            self._end("length")

    def finish(self, reason: FinishReason) -> None:
        """End the sample without a further token."""
        self._end(reason)

    def _end(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        # The text that was held back becomes final.
        if self.token_ids and self._text is not None and self._text.stop_string is None:
            self._text.finish(self.may_stop)
            if self._text.stop_string is not None and reason in ("stop", "length"):
                reason, stop_reason = "stop", self._text.stop_string
        self.finish_reason, self.stop_reason = reason, stop_reason

    @property
    def text(self) -> str:
        """What is final of its text."""
        # Not made yet, or not to be made: then the request has failed.
        text = self.__dict__.get("_text")
        return text.text if text is not None else ""

    def news(self) -> tuple[str, list[int]]:
        """Text that became final and tokens that came since the last call."""
        text, token_ids = self.text[self._told_chars :], self.token_ids[self._told_ids :]
        self._told_chars += len(text)
        self._told_ids += len(token_ids)
        return text, token_ids

    def output(self) -> CompletionOutput:
        """What is known by now."""
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.token_ids),
            # An interrupt may have come between a token and its log probability.
            logprobs=None if self.logprobs is None else self.logprobs[: len(self.token_ids)],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

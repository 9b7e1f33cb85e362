"""Perplexity of a model on a text: how well it predicts each token from those before it.

The text is cut into windows of `context` tokens. Each begins with the bos token, if the tokenizer puts one before a
text, else with the token that stands before the window's first one; the other context - 1 tokens are text. The next
window begins `stride` tokens later and scores only the tokens that the one before did not reach: what the two share is
context. So every token is scored once, from at least context - 1 - stride text tokens before it (fewer at the start).
A smaller stride gives more context, a lower perplexity and more work. Without a bos token the text's first token is not
scored, since nothing predicts it.

Perplexity is per token, so it compares models of one tokenizer only; bits per byte of UTF-8 compares any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_fast.config import LlamaConfig
from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import NonFiniteLogitsError, RequestError
from llama_fast.hub import find_folder
from llama_fast.model.progress import ProgressBar

MAX_DEFAULT_CONTEXT = 2048


# exp of more is no finite number.
_LARGEST_EXPONENT = 709


@dataclass(frozen=True)
class PerplexityResult:
    """How well a text was predicted.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        bits_per_byte: the sum in bits, over the bytes of the whole text.
        negative_log_likelihood: the sum over the scored tokens, in nats, accumulated in fp64.
        num_tokens: scored tokens.
        num_bytes: of the text in UTF-8.
        num_windows, context, stride: how the text was cut.
    """

    perplexity: float
    bits_per_byte: float
    negative_log_likelihood: float
    num_tokens: int
    num_bytes: int
    num_windows: int
    context: int
    stride: int

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} per token, {self.bits_per_byte:.4f} bits per byte\n"
            f"{self.num_tokens} tokens scored, {self.num_bytes} bytes; {self.num_windows} windows of {self.context} "
            f"tokens, stride {self.stride}"
        )


@dataclass(frozen=True)
class _Window:
    """Tokens of one forward run; those from `first_scored` on count."""

    token_ids: list[int]
    first_scored: int


def load_for_perplexity(
    model: str | Path, context: int | None = None, *, revision: str | None = None, **options: Any
) -> LLM:
    """An LLM with a cache for windows of `context` tokens only; the model's whole context may need far more.

    Args:
        model: checkpoint folder or hub id.
        context: as in `perplexity`.
        revision: of a hub id.
        options: further arguments of `LLM`.

    Raises:
        As `LLM` does.
    """
    if context is not None and context < 2:
        raise RequestError(f"context={context} must be at least 2: a token is scored behind another one")
    folder = find_folder(model, revision=revision)
    limit = LlamaConfig.from_pretrained(folder).max_position_embeddings
    return LLM(folder, max_seq_len=min(limit, MAX_DEFAULT_CONTEXT) if context is None else context, **options)


def perplexity(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    show_progress: bool | None = False,
) -> PerplexityResult:
    """Score `text` in windows; see the module's docstring.

    Args:
        llm: the model; its `max_batch` windows run at once.
        text: at least one token, two if the tokenizer adds no bos token.
        context: tokens of a window, 2 to the engine's max_seq_len. Default: max_seq_len, at most 2048.
        stride: text tokens from one window's start to the next one's, 1 to context - 1. Default: context - 1, which
            overlaps nothing.
        show_progress: a bar over the tokens on stderr; None shows it on a terminal.

    Raises:
        RequestError: the text is too short, or `context` or `stride` is out of range.
        NonFiniteLogitsError: the model gave NaN or an infinite log-likelihood.
        GenerationInterrupted: Ctrl-C.
    """
    limit = llm.engine.max_seq_len
    context = min(limit, MAX_DEFAULT_CONTEXT) if context is None else context
    if not 2 <= context <= limit:
        raise RequestError(f"context={context} must be 2 to {limit}, the longest sequence of this model and cache")
    stride = context - 1 if stride is None else stride
    if not 1 <= stride < context:
        raise RequestError(f"stride={stride} must be 1 to context - 1 = {context - 1}, or tokens would go unscored")
    # Quietly: a text longer than the context is what the windows are for.
    text_ids = llm.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    bos_ids = _bos_ids(llm)
    if len(bos_ids) + len(text_ids) < 2:
        raise RequestError(f"the text has {len(text_ids)} tokens; perplexity needs at least {2 - len(bos_ids)}")

    windows = list(_windows(bos_ids + text_ids, context, stride, repeat_first=bool(bos_ids)))
    num_tokens = sum(len(window.token_ids) - window.first_scored for window in windows)
    sums: list[float] = []
    with ProgressBar(
        total=num_tokens, unit="token", disable=None if show_progress is None else not show_progress
    ) as bar:
        # A few windows a call: the log probabilities of a long text would fill the memory as Python objects.
        for start in range(0, len(windows), llm.engine.max_batch):
            group = windows[start : start + llm.engine.max_batch]
            sums += _negative_log_likelihoods(llm, group)
            bar.update(sum(len(window.token_ids) - window.first_scored for window in group))
    total = math.fsum(sums)
    mean = total / num_tokens
    if mean >= _LARGEST_EXPONENT:
        raise NonFiniteLogitsError(f"{mean:.1f} nats per token is no finite perplexity; check the weights")
    num_bytes = len(text.encode("utf-8"))
    return PerplexityResult(
        perplexity=math.exp(mean),
        bits_per_byte=total / math.log(2) / num_bytes,
        negative_log_likelihood=total,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_windows=len(windows),
        context=context,
        stride=stride,
    )


def _bos_ids(llm: LLM) -> list[int]:
    """[bos] if the tokenizer puts it before a text, else []."""
    bos = [llm.tokenizer.bos_token_id]
    return bos if llm.tokenizer.encode("")[:1] == bos else []  # type: ignore[return-value]


def _windows(token_ids: list[int], context: int, stride: int, *, repeat_first: bool) -> Iterator[_Window]:
    """Cut `token_ids`, whose first one is only context; `repeat_first` puts it before every window."""
    scored = 1  # of token_ids, how many are done; the first one is never scored
    start = 1
    while scored < len(token_ids):
        end = min(start + context - 1, len(token_ids))
        before = token_ids[0] if repeat_first else token_ids[start - 1]
        yield _Window([before, *token_ids[start:end]], first_scored=1 + scored - start)
        scored = end
        start += stride


def _negative_log_likelihoods(llm: LLM, windows: list[_Window]) -> list[float]:
    """Sum over the scored tokens of each window, in nats."""
    outputs = llm.generate(
        [window.token_ids for window in windows], SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=False
    )
    sums = []
    for window, output in zip(windows, outputs, strict=True):
        if output.error is not None:
            raise output.error
        scored = list(zip(window.token_ids, output.prompt_logprobs or [], strict=True))[window.first_scored :]
        total = -math.fsum(logprobs[token_id].logprob for token_id, logprobs in scored if logprobs is not None)
        if not math.isfinite(total):
            raise NonFiniteLogitsError(
                f"the log-likelihood of a window is {total}; check the weights, or use dtype='float32'"
            )
        sums.append(total)
    return sums

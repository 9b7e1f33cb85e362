"""A line of a batch's output: OpenAI's batch format, the same bytes whenever it is written.

    {"id": "batch_req_0", "custom_id": "a", "response": {"status_code": 200, "request_id": "req_...", "body": {...}},
     "error": null}

body    OpenAI's completion or chat completion. `created` is 0 and no time is told: the bytes say what the model
        answered, not when. `system_fingerprint` stands for the model and all settings that have a say in the answer.
error   {"code", "message", "request_id", "system_fingerprint"} where there is no answer; `response` is null then.
        Messages name no file and no address of an object.
ASCII   all else is escaped, so that a reader may split lines at whatever it takes for a line break.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from llama_fast.engine.outputs import CompletionOutput, PositionLogprobs
from llama_fast.engine.request import Request
from llama_fast.errors import (
    LlamaFastError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    RequestError,
    TemplateError,
    UnsupportedError,
    without_places,
)
from llama_fast.serving.batch_files import InputLine
from llama_fast.serving.batch_lines import Job
from llama_fast.tokenizer import LlamaTokenizer

# Without a `code` of their own.
_CODES: tuple[tuple[type[LlamaFastError], str], ...] = (
    (RequestError, "invalid_request"),
    (UnsupportedError, "unsupported"),
    (TemplateError, "invalid_template"),
    (NonFiniteLogitsError, "non_finite_logits"),
    (OutOfMemoryError, "out_of_memory"),
)
# As OpenAI says it where JSON has no number: of a token that cannot come.
_NEVER = -9999.0


@dataclass
class Record:
    """The answer to one line.

    Attributes:
        line: of the input.
        fingerprint: of the run.
        custom_id: None as long as it is not known.
    """

    line: InputLine
    fingerprint: str
    custom_id: str | None = None

    def _head(self) -> dict[str, Any]:
        return {"id": self.line.id, "custom_id": self.custom_id}

    def failed(self, error: LlamaFastError) -> bytes:
        """For a line that is wrong, or whose request failed."""
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "request_failed")
        message = " ".join(str(error).split())
        told = {
            "code": getattr(error, "code", code),
            "message": message if isinstance(error, RequestError | UnsupportedError) else without_places(message),
            "request_id": self.line.request_id,
            "system_fingerprint": self.fingerprint,
        }
        return _encoded({**self._head(), "response": None, "error": told}) + b"\n"

    def answered(self, job: Job, request: Request, model: str, tokens: TokenTexts) -> bytes:
        """For a request that has run.

        Args:
            job: what the line asked for.
            request: finished, without an error.
            model: its name, if the line gave none.
            tokens: of its tokenizer.
        """
        samples = [sample.output() for sample in request.samples]
        generated = sum(len(sample.token_ids) for sample in samples)
        choice = _chat_choice if job.chat else _completion_choice
        body = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{self.line.id}",
            "object": "chat.completion" if job.chat else "text_completion",
            "created": 0,
            "model": model if job.model is None else job.model,
            "choices": [choice(sample, job.params.logprobs or 0, tokens) for sample in samples],
            "usage": {
                "prompt_tokens": len(request.prompt_token_ids),
                "completion_tokens": generated,
                "total_tokens": len(request.prompt_token_ids) + generated,
            },
            "system_fingerprint": self.fingerprint,
        }
        response = {"status_code": 200, "request_id": self.line.request_id, "body": body}
        return _encoded({**self._head(), "response": response, "error": None}) + b"\n"


class TokenTexts:
    """Texts of single tokens, as they stand inside a text; each is decoded once."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        if token_id not in self._known:
            stream = self._tokenizer.stream()
            # What a token adds behind itself: SentencePiece drops the space before a text's first word.
            stream.skip([token_id])
            self._known[token_id] = stream.push(token_id) + stream.finish()
        return self._known[token_id]


def head(record_id: str) -> bytes:
    """How the record begins, whatever it says."""
    return _encoded({"id": record_id})[:-1] + b", "


def _completion_choice(sample: CompletionOutput, num_top: int, tokens: TokenTexts) -> dict[str, Any]:
    logprobs = None
    if sample.logprobs is not None:
        texts = [tokens[token_id] for token_id in sample.token_ids]
        tops: list[dict[str, float]] = [{} for _ in texts]
        for top, position in zip(tops, sample.logprobs, strict=True):
            for token_id, value in _top(position, num_top):
                top.setdefault(tokens[token_id], value)  # two tokens may have one text
        logprobs = {
            "tokens": texts,
            "token_logprobs": [
                _finite(position[token_id].logprob)
                for token_id, position in zip(sample.token_ids, sample.logprobs, strict=True)
            ],
            "top_logprobs": tops if num_top else None,
            "text_offset": [0, *accumulate(map(len, texts))][:-1],
        }
    return {
        "index": sample.index,
        "text": sample.text,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }


def _chat_choice(sample: CompletionOutput, num_top: int, tokens: TokenTexts) -> dict[str, Any]:
    logprobs = None
    if sample.logprobs is not None:
        content = [
            {
                **_token(tokens[token_id], position[token_id].logprob),
                "top_logprobs": [_token(tokens[top_id], value) for top_id, value in _top(position, num_top)],
            }
            for token_id, position in zip(sample.token_ids, sample.logprobs, strict=True)
        ]
        logprobs = {"content": content, "refusal": None}
    return {
        "index": sample.index,
        "message": {"role": "assistant", "content": sample.text},
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has no text that tells its bytes.
    told = None if "\ufffd" in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": _finite(logprob), "bytes": told}


def _top(position: PositionLogprobs, num_top: int) -> list[tuple[int, float]]:
    """The most probable tokens in order, with their log probabilities."""
    ordered = sorted(position.items(), key=lambda item: -item[1].logprob)
    return [(token_id, _finite(found.logprob)) for token_id, found in ordered[:num_top]]


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii")

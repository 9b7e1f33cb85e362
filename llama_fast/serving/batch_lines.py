"""What a line of a batch asks for: OpenAI's batch format, read strictly.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 9}}

url     /v1/completions with `prompt`, a text or a list of token ids; /v1/chat/completions with `messages`.
body    the fields of SamplingParams, null as unset. A chat has OpenAI's spellings too: `max_completion_tokens`,
        `logprobs` as true or false and `top_logprobs`. `model` is told again in the answer and chooses nothing; `user`
        and `metadata` are ignored. All else is refused: fields that are unknown, and by name those that would change
        the answer. `stream` may be false.
Unlike  OpenAI's, an answer without `max_tokens` goes on to the context's end, and `temperature` is what the model's
        generation_config.json says (greedy if nothing): as everywhere in llama_fast.
seed    where none is given it follows from the batch's seed and the line's index, and from nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_fast.engine.inputs import Prompt
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import RequestError, UnsupportedError, brief, listed
from llama_fast.files import parse_json_object
from llama_fast.serving.batch_files import MAX_LINE_BYTES, InputLine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_FIELDS = ("custom_id", "method", "url", "body")
_IGNORED = ("user", "metadata")
_NOT_IN_A_BATCH = "not supported in a batch; leave it out"


class InvalidJsonError(RequestError):
    """The line is no JSON object, or none that every parser would read alike."""

    code = "invalid_json"


class DuplicateIdError(RequestError):
    """An earlier line has the custom_id."""

    code = "duplicate_custom_id"


@dataclass(frozen=True)
class Job:
    """What to run for a line.

    Attributes:
        prompt, params: as for `LLM.request`.
        chat: whether the answer is a chat completion.
        model: what the answer calls the model; None: its own name.
    """

    prompt: Prompt
    params: SamplingParams
    chat: bool
    model: str | None


class CustomIds:
    """Those that were seen; a few dozen bytes each, however long they are."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def take(self, custom_id: str, line: InputLine) -> None:
        """Raises DuplicateIdError if it was taken before."""
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            raise DuplicateIdError(f"line {line.number}: an earlier line has the custom_id {brief(custom_id)}")
        self._seen.add(digest)


def parse(line: InputLine) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        InvalidJsonError: it is too long, or is none.
    """
    if line.too_long:
        raise InvalidJsonError(f"line {line.number} has more than {MAX_LINE_BYTES:,} bytes; split or shorten it")
    return parse_json_object(line.content, f"line {line.number}", InvalidJsonError)


def custom_id_of(content: Mapping[str, Any]) -> str | None:
    """The line's name, if it has a valid one."""
    custom_id = content.get("custom_id")
    return custom_id if isinstance(custom_id, str) and custom_id else None


def job_of(content: Mapping[str, Any], index: int, seed: int) -> Job:
    """What a line asks for.

    Args:
        content: its JSON object.
        index: of the line.
        seed: of the batch.

    Raises:
        RequestError: a field is missing, unknown, of another type or out of range.
        UnsupportedError: a field that would change the answer is not supported.
    """
    if custom_id_of(content) is None:
        raise _wrong(content, "custom_id", "a text that is not empty")
    if content.get("method") != "POST":
        raise _wrong(content, "method", '"POST"')
    if content.get("url") not in (COMPLETIONS, CHAT):
        raise _wrong(content, "url", f'"{COMPLETIONS}" or "{CHAT}"')
    if not isinstance(content.get("body"), dict):
        raise _wrong(content, "body", "an object")
    if unknown := [name for name in content if name not in _FIELDS]:
        raise RequestError(f"unknown fields: {listed(unknown)}; a line has {', '.join(_FIELDS)}")
    chat = content["url"] == CHAT
    fields = {name: value for name, value in content["body"].items() if value is not None and name not in _IGNORED}
    model = fields.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise RequestError(f"body.model={brief(model)} must be a text")
    _refuse_what_batches_lack(fields)
    prompt = _messages(fields) if chat else _prompt(fields)
    if chat:
        _translate(fields)
    if "seed" not in fields:
        fields["seed"] = seed_of(index, seed)
    return Job(prompt, SamplingParams.from_dict(fields), chat, model)


def seed_of(index: int, seed: int) -> int:
    """64 bits for the line `index` of a batch with `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "little")


def _wrong(content: Mapping[str, Any], name: str, accepted: str) -> RequestError:
    if name not in content:
        return RequestError(f"{name} is missing; it must be {accepted}")
    return RequestError(f"{name}={brief(content[name])} must be {accepted}")


def _refuse_what_batches_lack(fields: dict[str, Any]) -> None:
    stream = fields.pop("stream", False)
    if stream is True:
        raise UnsupportedError(f"stream=true: {_NOT_IN_A_BATCH}")
    if stream is not False:
        raise RequestError(f"body.stream={brief(stream)} must be false")
    for name in ("prompt_logprobs", "stream_options"):
        if name in fields:
            raise UnsupportedError(f"{name}: {_NOT_IN_A_BATCH}")


def _prompt(fields: dict[str, Any]) -> Prompt:
    """Take the prompt out of a completion's fields."""
    if "messages" in fields:
        raise RequestError(f"body.messages: {COMPLETIONS} takes prompt; use the url {CHAT}")
    if "prompt" not in fields:
        raise RequestError("body.prompt is missing; it must be a text or a list of token ids")
    prompt = fields.pop("prompt")
    # type: true is no token id. A list of messages would be taken for a chat.
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt)):
        return prompt
    several = isinstance(prompt, list) and all(isinstance(item, str | list) for item in prompt)
    hint = "; give each prompt a line of its own" if several else ""
    raise RequestError(f"body.prompt={brief(prompt)} must be a text or a list of token ids{hint}")


def _messages(fields: dict[str, Any]) -> Prompt:
    """Take the messages out of a chat's fields; the tokenizer checks what is in them."""
    if "prompt" in fields:
        raise RequestError(f"body.prompt: {CHAT} takes messages; use the url {COMPLETIONS}")
    if "messages" not in fields:
        raise RequestError("body.messages is missing; it must be a list of objects with role and content")
    messages = fields.pop("messages")
    # All, not the first alone: a list that begins with something else would be taken for token ids.
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise RequestError(f"body.messages={brief(messages)} must be a list of objects with role and content")
    return messages


def _translate(fields: dict[str, Any]) -> None:
    """OpenAI's names of a chat's fields into those of SamplingParams."""
    most = fields.pop("max_completion_tokens", None)
    if most is not None:
        if fields.get("max_tokens", most) != most:
            raise RequestError(
                f"body.max_tokens={brief(fields['max_tokens'])} and max_completion_tokens={brief(most)} differ; "
                "give one of them"
            )
        fields["max_tokens"] = most
    asked, top = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    if not isinstance(asked, bool):
        raise RequestError(f"body.logprobs={brief(asked)} must be true or false in a chat; top_logprobs says how many")
    if top is not None and not asked:
        raise RequestError("body.top_logprobs needs logprobs=true")
    if asked:
        fields["logprobs"] = 0 if top is None else top

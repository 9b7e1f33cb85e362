"""What callers give, made plain: prompts as a list, and one value for each of them. Nothing is converted silently."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llama_fast.errors import RequestError, brief

Message = Mapping[str, Any]
# A text, token ids, or a chat.
Prompt = str | Sequence[int] | Sequence[Message]
Prompts = Prompt | Sequence[Prompt]


def prompt_list(prompts: Prompts) -> list[Prompt]:
    """One text, one list of ids or one list of messages is one prompt; a list of these is several."""
    if isinstance(prompts, str):
        return [prompts]
    if hasattr(prompts, "tolist"):  # a tensor or array of ids
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        raise RequestError(
            "prompts must be a text, a list of token ids, a list of messages, or a list of them; got "
            f"{type(prompts).__name__}"
        )
    if is_chat(cast(Prompt, prompts)) or (len(prompts) and isinstance(prompts[0], numbers.Integral)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping) and bool(prompt[0])


def id_list(prompt: Any, index: int) -> Sequence[int]:
    """A list, tuple, tensor or array as a list or tuple."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, list | tuple):
        raise RequestError(
            f"prompt {index} must be a text, a list of token ids or a list of messages; got {type(prompt).__name__}"
        )
    return prompt


def plain_ids(prompt_ids: Sequence[int]) -> list[int]:
    """Plain ints for any integers; what is not an id is left for the engine to refuse."""
    return [i if isinstance(i, bool) or not isinstance(i, numbers.Integral) else int(i) for i in prompt_ids]


def one_each(name: str, kind: type, value: Any, count: int) -> Sequence[Any]:
    """`value` for each of `count` prompts, or a list with one for each."""
    values = value if isinstance(value, list | tuple) else [value] * count
    if len(values) != count or not all(isinstance(one, kind) for one in values):
        raise RequestError(f"{name} must be {kind.__name__}, one for all or one for each of {count} prompts")
    return values


def check_options(priority: Any, cache_salt: Any, timeout: Any, on_token: Any) -> None:
    """Raise RequestError for a field of a request that is out of its range or of another type."""
    if type(priority) is not int or abs(priority) >= 2**63:
        raise RequestError(f"priority={brief(priority)} must be an integer of 64 bits; lower ones run first")
    if not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt must be a text; got {type(cache_salt).__name__}")
    is_number = isinstance(timeout, numbers.Real) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 <= timeout < math.inf):
        raise RequestError(f"timeout={brief(timeout)} must be seconds, from 0, or None")
    if on_token is not None and not callable(on_token):
        raise RequestError(f"on_token must be callable or None; got {type(on_token).__name__}")

"""Types and ranges of a request's parameters, which generation_config.json shares."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from llama_fast.errors import RequestError, brief

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 16384
MAX_INT32 = 2**31 - 1

# Field: (lowest, highest).
_INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, 1024),
    "max_tokens": (0, MAX_INT32),
    "min_tokens": (0, MAX_INT32),
    "top_k": (-1, 2**63 - 1),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, 128),
    "prompt_logprobs": (0, 128),
    "prompt_lookup_num_tokens": (0, 64),
    "max_matching_ngram_size": (1, 16),
    "max_new_tokens": (0, MAX_INT32),
    "max_length": (0, MAX_INT32),
    "min_new_tokens": (0, MAX_INT32),
    "num_return_sequences": (1, 1024),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e4),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    # Far from 0: dividing a logit by it must not overflow.
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
_HINTS = {
    "max_tokens": "0 only scores the prompt; leave it out to run to the context's end",
    "temperature": "0 is greedy",
    "top_k": "0 or -1 switches it off",
    "top_p": "1 switches it off",
    "min_p": "0 switches it off",
    "repetition_penalty": "1 switches it off",
    "seed": "leave it out for a fresh one",
}


def checked(name: str, value: Any) -> Any:
    """`value` of the field as plain int, float, bool, tuple or dict.

    Raises:
        RequestError: it is of the wrong type or out of range.
    """
    if name in _INTEGERS:
        return integer(name, value, *_INTEGERS[name])
    if name in _NUMBERS:
        return _number(name, value, *_NUMBERS[name])
    if name == "stop":
        return _stop_strings(value)
    if name == "stop_token_ids":
        return id_tuple(name, value)
    if name == "logit_bias":
        return _logit_bias(value)
    if not isinstance(value, bool):
        raise _refused(name, value, "True or False")
    return value


def id_tuple(name: str, value: Any) -> tuple[int, ...]:
    """Token ids given as one id, a list or None.

    Raises:
        RequestError: it is something else, holds something else, or is too long.
    """
    if value is None:
        return ()
    if isinstance(value, numbers.Integral):
        value = [value]
    if not isinstance(value, (list, tuple)) or len(value) > MAX_TOKEN_IDS:
        raise _refused(name, value, f"a list of at most {MAX_TOKEN_IDS} token ids")
    return tuple(integer(f"{name}[{index}]", item, 0, MAX_INT32) for index, item in enumerate(value))


def integer(name: str, value: Any, low: int, high: int) -> int:
    # numbers.Integral: NumPy's integers too.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise _refused(name, value, f"an integer from {low} to {high}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        number = math.nan
    else:
        try:
            number = float(value)
        except OverflowError:  # an int beyond every float
            number = math.inf
    if not low <= number <= high:  # true of NaN
        raise _refused(name, value, f"a number from {low:g} to {high:g}")
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or len(strings) > MAX_STOP_STRINGS:
        raise _refused("stop", value, f"a string or a list of at most {MAX_STOP_STRINGS}")
    for index, item in enumerate(strings):
        if not isinstance(item, str) or not 0 < len(item) <= MAX_STOP_CHARS:
            raise _refused(f"stop[{index}]", item, f"a string of 1 to {MAX_STOP_CHARS} characters")
    return tuple(strings)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping) or len(value) > MAX_LOGIT_BIAS:
        raise _refused("logit_bias", value, f"a mapping from token id to bias of at most {MAX_LOGIT_BIAS} entries")
    return {
        integer("logit_bias token id", key, 0, MAX_INT32): _number(f"logit_bias[{key}]", bias, -100.0, 100.0)
        for key, bias in value.items()
    }


def _refused(name: str, value: Any, accepted: str) -> RequestError:
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    return RequestError(f"{name}={brief(value)} is not accepted; use {accepted}{hint}")

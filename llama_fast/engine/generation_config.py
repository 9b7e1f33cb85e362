"""generation_config.json, and the types and ranges that its fields share with a request's parameters."""

from __future__ import annotations

import json
import logging
import math
import numbers
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_fast.errors import CheckpointIOError, ConfigError, RequestError, UnsupportedError

logger = logging.getLogger(__name__)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 16384
_MAX_INT32 = 2**31 - 1

# Field: (lowest, highest).
_INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, 1024),
    "max_tokens": (0, _MAX_INT32),
    "min_tokens": (0, _MAX_INT32),
    "top_k": (-1, 2**63 - 1),
    "seed": (0, 2**64 - 1),
    "logprobs": (0, 128),
    "prompt_logprobs": (0, 128),
    "max_new_tokens": (0, _MAX_INT32),
    "max_length": (0, _MAX_INT32),
    "min_new_tokens": (0, _MAX_INT32),
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
        return _integer(name, value, *_INTEGERS[name])
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
    return tuple(_integer(f"{name}[{index}]", item, 0, _MAX_INT32) for index, item in enumerate(value))


def _integer(name: str, value: Any, low: int, high: int) -> int:
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
        _integer("logit_bias token id", key, 0, _MAX_INT32): _number(f"logit_bias[{key}]", bias, -100.0, 100.0)
        for key, bias in value.items()
    }


def _refused(name: str, value: Any, accepted: str) -> RequestError:
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    return RequestError(f"{name}={reprlib.repr(value)} is not accepted; use {accepted}{hint}")


# Fields of generation_config.json that change results, with the values that leave them out of play (None always does).
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (0, 1),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
_PARSED = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "pad_token_id",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
}
_FILE_NAME = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json: defaults that a model's authors set. Everything unset without the file.

    Attributes:
        eos_token_id: one id or several.
        pad_token_id, bos_token_id: negative numbers, which old files use for "none", are None.
        other: the remaining keys, which do not change results; kept for `save`.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: str | Path) -> GenerationDefaults:
        """Read a folder's generation_config.json; empty if there is none.

        Raises:
            CheckpointIOError: the file cannot be read.
            ConfigError: it is not a JSON object, or a value is of the wrong type or out of range.
            UnsupportedError: it sets a field that would change results and is not supported.
        """
        path = Path(folder) / _FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise CheckpointIOError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); repair or delete the file") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
        try:
            return cls.from_dict(content)
        except RequestError as error:
            raise ConfigError(f"{path}: {error}") from None
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GenerationDefaults:
        """Parse the file's content; null is unset.

        Raises:
            RequestError: a value is of the wrong type or out of range.
            UnsupportedError: a field would change results and is not supported.
        """
        values: dict[str, Any] = {}
        other: dict[str, Any] = {}
        for name, value in content.items():
            if name in _UNSUPPORTED and value is not None and value not in _UNSUPPORTED[name]:
                raise UnsupportedError(
                    f"{name}={reprlib.repr(value)} is not supported and would change the text; remove this field"
                )
            if name in _PARSED and value is not None:
                if name == "eos_token_id":
                    ids = id_tuple(name, value)
                    values[name] = list(ids) if isinstance(value, list) else ids[0]
                elif name in ("bos_token_id", "pad_token_id"):
                    token_id = _integer(name, value, -_MAX_INT32, _MAX_INT32)
                    values[name] = token_id if token_id >= 0 else None
                else:
                    values[name] = checked(name, value)
            elif name not in _PARSED:
                other[name] = value
        if ignored := other.keys() - _UNSUPPORTED.keys():
            logger.debug("%s: no effect here: %s", _FILE_NAME, ", ".join(sorted(ignored)))
        return cls(**values, other=other)

    def to_dict(self) -> dict[str, Any]:
        """The file's content: what is set, and `other`."""
        content = {name: getattr(self, name) for name in _PARSED}
        return {**self.other, **{name: value for name, value in content.items() if value is not None}}

    def save(self, folder: str | Path) -> None:
        """Write the folder's generation_config.json.

        Raises:
            CheckpointIOError: it cannot be written.
        """
        path = Path(folder) / _FILE_NAME
        try:
            path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointIOError(f"{path}: cannot be written ({error.strerror})") from error

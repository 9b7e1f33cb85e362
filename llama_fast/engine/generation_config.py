"""generation_config.json: what a model's authors want unless a request says otherwise.

Precedence, field by field: an argument of the call, then generation_config.json, then config.json, which gives token
ids, and in a folder without generation_config.json the other parameters too.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_fast.engine.parameter_checks import MAX_INT32, checked, id_tuple, integer
from llama_fast.errors import CheckpointIOError, ConfigError, RequestError, UnsupportedError, brief, listed
from llama_fast.files import read_json_object, written_whole

logger = logging.getLogger(__name__)

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
_IN_CONFIG = (_PARSED | _UNSUPPORTED.keys()) - {"bos_token_id", "eos_token_id", "pad_token_id"}
FILE_NAME = "generation_config.json"


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
        """Read a folder's generation_config.json.

        Without that file the generation parameters in config.json count, where checkpoints of 2023 kept them. Token ids
        are not among them: those of config.json count wherever this file names none.

        Raises:
            CheckpointIOError: the file cannot be read.
            ConfigError: it is not strict JSON, or a value is of the wrong type or out of range.
            UnsupportedError: it sets a field that would change results and is not supported.
        """
        path = Path(folder) / FILE_NAME
        if os.path.lexists(path):
            content = read_json_object(path, ConfigError, io_error=CheckpointIOError)
        elif os.path.lexists(path := Path(folder) / "config.json"):
            content = read_json_object(path, ConfigError, io_error=CheckpointIOError)
            content = {name: value for name, value in content.items() if name in _IN_CONFIG}
            if content.get("max_length") == 20:  # the default, which old versions of transformers wrote out
                del content["max_length"]
        else:
            return cls()
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
                    f"{name}={brief(value)} is not supported and would change the text; remove this field"
                )
            if name in _PARSED and value is not None:
                if name == "eos_token_id":
                    ids = id_tuple(name, value)
                    values[name] = list(ids) if isinstance(value, list) else ids[0]
                elif name in ("bos_token_id", "pad_token_id"):
                    token_id = integer(name, value, -MAX_INT32, MAX_INT32)
                    values[name] = token_id if token_id >= 0 else None
                else:
                    values[name] = checked(name, value)
            elif name not in _PARSED:
                other[name] = value
        if ignored := other.keys() - _UNSUPPORTED.keys():
            logger.debug("%s: no effect here: %s", FILE_NAME, listed(sorted(ignored)))
        return cls(**values, other=other)

    def check_vocab(self, vocab_size: int) -> None:
        """Check the special ids against the model that the file stands beside.

        Raises:
            ConfigError: an id is not in [0, vocab_size).
        """
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            for token_id in id_tuple(name, getattr(self, name)):
                if token_id >= vocab_size:
                    raise ConfigError(
                        f"{FILE_NAME}: {name}={token_id} is not below vocab_size={vocab_size} of config.json; "
                        "correct it, or remove it to use config.json's"
                    )

    def to_dict(self) -> dict[str, Any]:
        """The file's content: what is set, and `other`."""
        content = {name: getattr(self, name) for name in _PARSED}
        return {**self.other, **{name: value for name, value in content.items() if value is not None}}

    def save(self, folder: str | Path) -> None:
        """Write the folder's generation_config.json.

        Raises:
            CheckpointIOError: it cannot be written.
        """
        path = Path(folder) / FILE_NAME
        try:
            with written_whole(path) as temporary:
                temporary.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointIOError(f"{path}: cannot be written ({error.strerror})") from error

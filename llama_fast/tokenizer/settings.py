"""Fields of tokenizer_config.json, their types checked.

A token that it names is special even if tokenizer.json does not say so; one that tokenizer.json does not contain is
logged and counts as unset, since a new id would have no row in the model's embedding. One that is ordinary text, as
`"pad_token": "!"`, is named and not special, with a warning: transformers would drop every "!" from decoded text.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import TokenizerFileError, listed, shown
from llama_fast.tokenizer.token_stream import translated
from llama_fast.tokenizer.vocabulary import NAMED_TOKENS

logger = logging.getLogger(__name__)

NO_LIMIT = int(1e30)  # Hugging Face's model_max_length where none is given


def named_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that `config` names, by name. Those that are not special in `backend` become it."""
    return _special_tokens(backend, {name: config.get(name) for name in NAMED_TOKENS})


def extra_special_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> list[str]:
    """Special tokens of `config` without one of these names; it may have another in an object."""
    entries = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = list(entries.values()) if isinstance(entries, Mapping) else entries
    if not isinstance(entries, list):
        raise TokenizerFileError(f"extra_special_tokens must be a list of tokens; got {entries!r:.80}")
    named = {f"extra_special_tokens[{index}]": entry for index, entry in enumerate(entries)}
    return list(_special_tokens(backend, named).values())


def model_max_length(config: Mapping[str, Any]) -> int:
    value = config.get("model_max_length")
    if value is None:
        return NO_LIMIT
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < float("inf"):
        raise TokenizerFileError(f"model_max_length must be a positive number; got {value!r:.80}")
    return int(value)


def model_input_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("model_input_names") or ["input_ids", "attention_mask"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TokenizerFileError(f"model_input_names must be a list of strings; got {names!r:.80}")
    return names


def flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise TokenizerFileError(f"tokenizer_config.json: {name} must be true, false or null; got {shown(repr(value))}")
    return value


def side(config: Mapping[str, Any], name: str, default: str) -> str:
    """The field `name`, "left" or "right"."""
    value = config.get(name) or default
    if value not in ("left", "right"):
        raise TokenizerFileError(f"{name} must be 'left' or 'right'; got {value!r:.80}")
    return str(value)


def _special_tokens(backend: Tokenizer, entries: Mapping[str, object]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    unknown = []
    for name, entry in entries.items():
        token = entry.get("content") if isinstance(entry, Mapping) else entry
        if entry is None:
            continue
        if not isinstance(token, str):
            raise TokenizerFileError(f'{name} must be a string, {{"content": string}} or null; got {entry!r:.80}')
        if backend.token_to_id(token) is None:
            unknown.append(f"{name} '{token}'")
        else:
            tokens[name] = token
    if unknown:
        logger.warning("not in tokenizer.json, so unset: %s", listed(unknown))
    # All at once: the library goes through all its added tokens at each of these calls, and Orpheus has 29,000.
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    new = [token for token in tokens.values() if not added.get(token)]
    with translated(TokenizerFileError, "the named tokens cannot be used"):
        ordinary = {token for token in new if token not in added and _is_text(backend, token)}
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in new if token not in ordinary]
        )
    if ordinary:
        logger.warning("ordinary text, so not special although it is named: %s", listed(sorted(ordinary)))
    return tokens


def _is_text(backend: Tokenizer, token: str) -> bool:
    """Whether BPE makes `token` of its own text."""
    return backend.token_to_id(token) in backend.encode(token, add_special_tokens=False).ids

"""Fields of tokenizer_config.json, their types checked.

A token that it names is special even if tokenizer.json does not say so; one that tokenizer.json does not contain is
logged and counts as unset, since a new id would have no row in the model's embedding.
"""

import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import TokenizerFileError, shown
from llama_fast.tokenizer.vocabulary import NAMED_TOKENS

logger = logging.getLogger(__name__)

NO_LIMIT = int(1e30)  # Hugging Face's model_max_length where none is given


def named_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that `config` names, by name. Those that are not special in `backend` become it."""
    tokens = {name: _token(backend, name, config.get(name)) for name in NAMED_TOKENS}
    return {name: token for name, token in tokens.items() if token is not None}


def extra_special_tokens(backend: Tokenizer, config: Mapping[str, Any]) -> list[str]:
    """Special tokens of `config` without one of these names; it may have another in an object."""
    entries = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = list(entries.values()) if isinstance(entries, Mapping) else entries
    if not isinstance(entries, list):
        raise TokenizerFileError(f"extra_special_tokens must be a list of tokens; got {entries!r:.80}")
    tokens = [_token(backend, f"extra_special_tokens[{index}]", entry) for index, entry in enumerate(entries)]
    return [token for token in tokens if token is not None]


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


def side(config: Mapping[str, Any], name: str, default: str) -> str:
    """The field `name`, "left" or "right"."""
    value = config.get(name) or default
    if value not in ("left", "right"):
        raise TokenizerFileError(f"{name} must be 'left' or 'right'; got {value!r:.80}")
    return str(value)


def _token(backend: Tokenizer, name: str, entry: object) -> str | None:
    token = entry.get("content") if isinstance(entry, Mapping) else entry
    if token is None and not isinstance(entry, Mapping):
        return None
    if not isinstance(token, str):
        raise TokenizerFileError(f'{name} must be a string, {{"content": string}} or null; got {entry!r:.80}')
    token_id = backend.token_to_id(token)
    if token_id is None:
        logger.warning("%s '%s' is not in tokenizer.json and counts as unset", name, shown(token))
        return None
    known = backend.get_added_tokens_decoder().get(token_id)
    if known is None or not known.special:
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    return token

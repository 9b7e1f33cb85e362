"""Reads the tokenizer's files of a checkpoint folder.

Which file decides what:
    tokenizer.json          the tokenizer itself, taken as it is: pipeline, vocabulary, ids and flags of added tokens,
                            and what its post-processor puts around a text.
    tokenizer.model         SentencePiece's file, converted (`sentencepiece_conversion.py`) where there is no
                            tokenizer.json, or if the caller asks for it by `from_slow` or `add_prefix_space`. The first
                            three pieces are unk, bos and eos if tokenizer_config.json names no others. Only here
                            legacy (false if it is not there, as in transformers 5; it was true before) and
                            add_prefix_space of tokenizer_config.json count, and add_bos_token is true if not there.
    added_tokens_decoder    in tokenizer_config.json: tokens by id, with their flags. Those that tokenizer.json or
                            tokenizer.model does not have are added; it must be possible with their ids. At an id where
                            tokenizer.json has another token, that one stays, with a warning; unk, bos, eos and other
                            control pieces of tokenizer.model take the name given here.
    added_tokens.json       the same in older checkpoints, read only where there is no added_tokens_decoder.
    tokenizer_config.json   names bos, eos, unk and pad; model_max_length, clean_up_tokenization_spaces, chat_template.
                            add_bos_token and add_eos_token count where tokenizer.json puts nothing around a text, as
                            in transformers 4 (5 forgets them). tokenizer_class is not looked at.
    special_tokens_map.json names the same four tokens in older checkpoints: it is read, and wins, only where
                            tokenizer_config.json has no added_tokens_decoder (Hugging Face's rule).
    chat_template.jinja     wins over chat_template of tokenizer_config.json.
Ids may have holes, as in `tokenizers`: an id that no token has decodes to nothing. Two tokens with one id are refused.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import TokenizerFileError, listed, shown
from llama_fast.files import parse_json_object, read_file, read_json_object
from llama_fast.tokenizer.chat_template import read_chat_templates
from llama_fast.tokenizer.growth import check_growth
from llama_fast.tokenizer.sentencepiece_conversion import add_tokens, convert_sentencepiece
from llama_fast.tokenizer.settings import flag
from llama_fast.tokenizer.token_stream import translated

__all__ = ["TokenizerFiles", "read_sentencepiece", "read_tokenizer_files"]

logger = logging.getLogger(__name__)

# The largest seen: Llama 3's with 17 MB, a multilingual Llama 2's with 1 MB.
_MAX_JSON_BYTES = 64 << 20
_MAX_IDS = 1 << 20  # Llama 3 has 128,256
_MAX_MODEL_BYTES = 4 << 20
MAX_SIDE_BYTES = 16 << 20  # Orpheus's tokenizer_config.json has 5 MB, for 29,000 added tokens

# Goes through all that a tokenizer has: a word, digits, spaces, a line end, bytes.
_PROBE = "A word, 12  \n\té"

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a checkpoint folder says about its tokenizer."""

    backend: Tokenizer
    config: dict[str, Any]  # tokenizer_config.json and what belongs to it
    chat_templates: dict[str, str]  # Jinja sources by name
    vocab_file: Path | None  # tokenizer.model, if there is one


def read_tokenizer_files(
    folder: str | Path, *, legacy: bool | None = None, from_slow: bool = False, add_prefix_space: bool | None = None
) -> TokenizerFiles:
    """The tokenizer of a checkpoint folder; the module's docstring says which file decides what.

    Args:
        legacy: for tokenizer.model: how spaces are treated; None: what tokenizer_config.json says.
        from_slow: convert tokenizer.model even if there is a tokenizer.json.
        add_prefix_space: convert tokenizer.model, and put a space in front of texts or not.

    Raises:
        TokenizerFileError: a file is missing, malformed, too large, not supported, or contradicts another one.
        TemplateError: `chat_template` in tokenizer_config.json has a wrong shape.
    """
    folder = Path(folder)
    tokenizer_file, vocab_file = folder / "tokenizer.json", folder / "tokenizer.model"
    config = _optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config.update(_optional_json(folder / "special_tokens_map.json"))

    added_tokens = _added_tokens(folder, config)
    if tokenizer_file.exists() and not from_slow and add_prefix_space is None:
        backend = _load(tokenizer_file)
        with translated(TokenizerFileError, f"{tokenizer_file}: cannot be used with the tokens of files beside it"):
            _add_missing_tokens(backend, added_tokens, tokenizer_file)
        if legacy is not None:
            logger.warning("legacy=%s has no effect: tokenizer.json decides; pass from_slow=True", legacy)
    elif vocab_file.exists():
        legacy = flag(config, "legacy") if legacy is None else legacy
        add_prefix_space = flag(config, "add_prefix_space") if add_prefix_space is None else add_prefix_space
        backend = read_sentencepiece(vocab_file, bool(legacy), add_prefix_space, added_tokens)
        added = backend.get_added_tokens_decoder()
        for token_id, name in enumerate(("unk_token", "bos_token", "eos_token")):
            if config.get(name) == "":  # in the first conversions
                del config[name]
            if token_id in added and added[token_id].special:
                config.setdefault(name, added[token_id].content)
        config.setdefault("add_bos_token", True)
    elif tokenizer_file.exists():
        raise TokenizerFileError(
            f"{folder} has no tokenizer.model, which from_slow and add_prefix_space need; leave them out, so that "
            "tokenizer.json is used"
        )
    else:
        raise TokenizerFileError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; download the whole checkpoint, or copy "
            "tokenizer.json into this folder"
        )
    with translated(TokenizerFileError, f"{folder}: the tokenizer cannot encode its own special tokens"):
        _check_special_tokens(backend, folder)
    return TokenizerFiles(
        backend, config, read_chat_templates(folder, config), vocab_file if vocab_file.exists() else None
    )


def _load(path: Path) -> Tokenizer:
    content = read_file(path, TokenizerFileError, max_bytes=_MAX_JSON_BYTES)
    spec = parse_json_object(content, str(path), TokenizerFileError)
    if isinstance(spec.get("model"), dict) and (prefix := spec["model"].get("continuing_subword_prefix")):
        raise TokenizerFileError(  # the library cuts characters by it and ends the process
            f"{path}: model.continuing_subword_prefix is {prefix!r:.80}; Llama's is null, the only one supported"
        )
    with translated(TokenizerFileError, f"{path}: cannot be used; download or convert it again"):
        backend = Tokenizer.from_buffer(content)
        backend.no_truncation()
        backend.no_padding()
        check_growth(backend, str(path))
        # Some faults show only here.
        ids = backend.encode(_PROBE, _PROBE).ids + backend.encode(_PROBE).ids
        for decoded in (ids, [], *([token_id] for token_id in ids)):
            backend.decode(decoded)
    for token_id in ids:
        if backend.id_to_token(token_id) is None:
            raise TokenizerFileError(f"{path}: post_processor adds the id {token_id}, which no token has")
    _check_ids(backend, spec, path)
    return backend


def _check_ids(backend: Tokenizer, spec: Mapping[str, Any], path: Path) -> None:
    vocab = backend.get_vocab()
    token_of = {token_id: token for token, token_id in vocab.items()}
    if (highest := max(token_of, default=0)) >= _MAX_IDS:  # the library makes a list of all ids that are not there
        raise TokenizerFileError(
            f"{path}: '{shown(token_of[highest])}' has the id {highest}; ids must be below {_MAX_IDS:,}"
        )
    if len(token_of) != len(vocab):
        one, token_id = next(pair for pair in vocab.items() if token_of[pair[1]] != pair[0])
        both = f"'{shown(one)}' and '{shown(token_of[token_id])}'"
        raise TokenizerFileError(f"{path}: {both} have the same id, {token_id}")
    # The library gives added tokens the next free ids, whatever the file says.
    for entry in spec.get("added_tokens") or []:
        received = backend.token_to_id(entry["content"])
        if received != entry["id"]:
            raise TokenizerFileError(
                f"{path}: added_tokens: '{shown(entry['content'])}' should have id {entry['id']}, but has {received}: "
                "ids of added tokens follow those of the vocabulary without a hole"
            )


def _add_missing_tokens(backend: Tokenizer, tokens: Mapping[int, AddedToken], path: Path) -> None:
    known = backend.get_added_tokens_decoder()
    present = {token_id: backend.id_to_token(token_id) for token_id in tokens}
    other = [token.content for token_id, token in tokens.items() if present[token_id] not in (None, token.content)]
    missing = {
        token_id: token
        for token_id, token in tokens.items()
        if present[token_id] in (None, token.content) and token_id not in known
    }
    if other:
        logger.warning("%s has other tokens in place of those that the files beside it add: %s", path, listed(other))
    add_tokens(backend, missing, str(path))


def _check_special_tokens(backend: Tokenizer, folder: Path) -> None:
    """D05: no ordinary text may have the id of a special token, or a stranger could write one into a prompt."""
    parsed = backend.encode_special_tokens
    backend.encode_special_tokens = True
    for token_id, token in backend.get_added_tokens_decoder().items():
        if token.special and token_id in backend.encode(token.content, add_special_tokens=False).ids:
            raise TokenizerFileError(
                f"{folder}: the text '{shown(token.content)}' becomes the special token {token_id} even where special "
                "tokens are not asked for: merges make it, or it is one character; the vocabulary must not do that"
            )
    backend.encode_special_tokens = parsed


def read_sentencepiece(
    path: Path, legacy: bool, add_prefix_space: bool | None, added_tokens: Mapping[int, AddedToken]
) -> Tokenizer:
    """The tokenizer of a tokenizer.model; the arguments, and what it raises, are those of `convert_sentencepiece`."""
    content = read_file(path, TokenizerFileError, max_bytes=_MAX_MODEL_BYTES)
    for start, what, fix in (
        (
            rb"[A-Za-z0-9+/]+=* \d+\r?\n",
            "a tiktoken file, as in Meta's own downloads of Llama 3",
            "copy tokenizer.json of the model's Hugging Face download into this folder",
        ),
        (b"version https://git-lfs", "a git-lfs pointer", "run `git lfs pull`"),
    ):
        if re.match(start, content):
            raise TokenizerFileError(f"{path} is no SentencePiece model but {what}; {fix}")
    return convert_sentencepiece(
        content, str(path), legacy=legacy, add_prefix_space=add_prefix_space, added_tokens=added_tokens
    )


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens by id that the files beside tokenizer.model add to it."""
    if "added_tokens_decoder" in config:
        name = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
        entries = config["added_tokens_decoder"]
        if not isinstance(entries, dict):
            raise TokenizerFileError(f"{name} must be an object of tokens by id; got {shown(repr(entries))}")
        pairs = [(int(key) if re.fullmatch("[0-9]{1,10}", key) else key, entry) for key, entry in entries.items()]
    else:
        name = str(folder / "added_tokens.json")
        extra = config.get("additional_special_tokens")
        named = [value for key, value in config.items() if key.endswith("_token")]
        named += extra if isinstance(extra, list) else []
        special = [value.get("content") if isinstance(value, dict) else value for value in named]
        # Flags as in transformers.
        pairs = [
            (token_id, {"content": token, "special": token in special, "normalized": token not in special})
            for token, token_id in _optional_json(folder / "added_tokens.json").items()
        ]
    tokens: dict[int, AddedToken] = {}
    for token_id, entry in pairs:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 2**32:
            raise TokenizerFileError(f"{name}: an id must be an integer in [0, 2**32); got {shown(repr(token_id))}")
        if token_id in tokens:
            raise TokenizerFileError(f"{name}: two tokens have the id {token_id}")
        tokens[token_id] = _added_token(f"{name}: id {token_id}", entry)
    return tokens


def _added_token(name: str, entry: Any) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    flags = {flag: entry.get(flag, False) for flag in _FLAGS} if isinstance(entry, dict) else {}
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerFileError(
            f"{name}: must be an object with a string content, not empty, and true or false for {listed(_FLAGS)}; got "
            f"{shown(repr(entry))}"
        )
    return AddedToken(content, **flags)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, TokenizerFileError, max_bytes=MAX_SIDE_BYTES) if path.exists() else {}

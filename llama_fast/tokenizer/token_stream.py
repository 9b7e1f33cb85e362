"""Incremental decoding: the text of token ids, as soon as no later id can change it.

The texts given out, joined, are exactly the decode of all ids. `tokenizers.decoders.DecodeStream` (0.23) promises less:
for the ids of <0x41> <0xFF>, which decode to two U+FFFD, it gives "A" first and then raises, and it never gives out the
U+FFFD of a character left incomplete at the end. So each kind of decoder has its own rule here for how far its output
is final, at a cost per token that does not grow with the text:

ByteLevel (Llama 3): a token is bytes, whatever stands around it. An incomplete character is kept back, at most 3 bytes.
SentencePiece's (Llama 1 and 2): Replace and Metaspace map each token alone (Metaspace: the first one differently).
    ByteFallback turns a run of <0xNN> into characters or, if the run as a whole is not UTF-8, each of its bytes into
    U+FFFD; so a run is kept back until another token ends it. Strip takes spaces off the front, once.
None: tokens joined by spaces.
Any other: nothing is known to be final; all text comes at the end.
"""

import codecs
import functools
import json
import logging
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tokenizers import Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

from llama_fast.errors import LlamaFastError, RequestError, shown

logger = logging.getLogger(__name__)

# Hugging Face's clean_up_tokenization, in its order.
CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {suffix}", suffix) for suffix in ("n't", "'m", "'s", "'ve", "'re")),
)

# Metaspace before ByteFallback is not among them: dropping the first token's "▁" could make a byte token of it.
_SENTENCE_PIECE_STAGES = (
    ["Replace", "ByteFallback"],
    ["ByteFallback", "Replace"],
    ["ByteFallback", "Metaspace"],
    ["ByteFallback"],
    ["Replace"],
    ["Metaspace"],
)


class TokenStream:
    """Text of a growing sequence of ids; made by `LlamaTokenizer.stream`. For one thread at a time.

    `"".join([push(id) for id in ids] + [finish()]) == tokenizer.decode(ids)` for every `ids`.
    """

    def __init__(self, tokenizer: Tokenizer, skipped_ids: frozenset[int], clean_up: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = skipped_ids
        self._text = _incremental_decoder(tokenizer)
        self._replacements = [_Replacement(*pair) for pair in CLEAN_UP] if clean_up else []
        self._finished = False

    def skip(self, token_ids: Iterable[int]) -> None:
        """Take ids whose text is known: what is given out later goes on from it, without a character cut in two."""
        for token_id in token_ids:
            self.push(token_id)
        self._text.finish()
        for replacement in self._replacements:
            replacement.finish()

    def push(self, token_id: int) -> str:
        """Takes the next id; returns the text that is final now, maybe "".

        Raises:
            RequestError: `token_id` is not an integer in [0, 2**32), or `finish` was called.
        """
        if self._finished:
            raise RequestError("push after finish: this stream has ended; start another one")
        token_id = checked_id(token_id)
        token = None if token_id in self._skipped_ids else self._tokenizer.id_to_token(token_id)
        if token is None:  # special, or unknown to the tokenizer
            return ""
        text = self._text.push(token)
        for replacement in self._replacements:
            text = replacement.push(text)
        return text

    def finish(self) -> str:
        """Returns the rest of the text; a second call returns "".

        Raises:
            RequestError: the tokenizer's decoder fails on these ids, as `decode` would.
        """
        if self._finished:
            return ""
        self._finished = True
        text = self._text.finish()
        for replacement in self._replacements:
            text = replacement.push(text) + replacement.finish()
        return text


def checked_id(value: object, index: int | None = None) -> int:
    """`value` as an int that `tokenizers` accepts as an id.

    Raises:
        RequestError: it is not an integer in [0, 2**32); the message names `index`.
    """
    try:
        token_id = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        token_id = -1
    if not 0 <= token_id < 2**32:
        name = "token id" if index is None else f"token id at index {index}"
        raise RequestError(f"{name} must be an integer in [0, 2**32); got {value!r:.80}")
    return token_id


@contextmanager
def translated(error: type[LlamaFastError], what: str) -> Iterator[None]:
    """Raises `error` for what `tokenizers` or a file access raises.

    A Rust panic arrives as a PanicException, which is a BaseException and no Exception.
    """
    try:
        yield
    except LlamaFastError:
        raise
    except BaseException as cause:
        if isinstance(cause, Exception) or type(cause).__name__ == "PanicException":
            raise error(f"{what}: {shown(str(cause))}") from cause
        raise


class _IncrementalText(Protocol):
    def push(self, token: str) -> str: ...

    def finish(self) -> str: ...


class _ByteLevelText:
    """decoders.ByteLevel: UTF-8 of the tokens' bytes. Python and Rust put U+FFFD in the same places."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        table = _byte_of_char()
        try:
            return self._utf8.decode(bytes([table[char] for char in token]))
        except KeyError:  # an added token that was not written in the byte alphabet stands for itself
            return self._utf8.decode(token.encode("utf-8"))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePieceText:
    """Replace("▁" -> " ") or Metaspace around ByteFallback, then Fuse and Strip from the left.

    Every stage before Fuse looks at one token, at whether it is the first, or at its run of byte tokens. So
    decoding the windows between byte runs one by one and joining them is decoding the whole, provided that a later
    window does not think it is first: an empty token is put before it.
    """

    def __init__(self, stages: decoders.Decoder, stripped: str, num_stripped: int) -> None:
        self._stages = stages
        self._stripped = stripped
        self._num_stripped = num_stripped  # how many may still be taken off
        self._window: list[str] = []

    def push(self, token: str) -> str:
        self._window.append(token)
        # A little more than what ByteFallback takes for a byte; holding back too much is harmless.
        return "" if token.startswith("<0x") and token.endswith(">") else self.finish()

    def finish(self) -> str:
        text = self._stages.decode(self._window)
        self._window = [""]
        while self._num_stripped and text:
            if not text.startswith(self._stripped):
                self._num_stripped = 0
                break
            text = text[len(self._stripped) :]
            self._num_stripped -= 1
        return text


class _JoinedText:
    """No decoder: the tokens with a space between them."""

    def __init__(self) -> None:
        self._separator = ""

    def push(self, token: str) -> str:
        text, self._separator = self._separator + token, " "
        return text

    def finish(self) -> str:
        return ""


class _HeldText:
    """A decoder whose text may change until the end."""

    def __init__(self, decoder: decoders.Decoder) -> None:
        self._decoder = decoder
        self._tokens: list[str] = []

    def push(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        tokens, self._tokens = self._tokens, []
        with translated(RequestError, "the ids could not be decoded"):
            return self._decoder.decode(tokens)


class _Replacement:
    """`str.replace` on a stream: keeps back the longest end of the text that may be the start of `pattern`."""

    def __init__(self, pattern: str, replacement: str) -> None:
        self._pattern = pattern
        self._replacement = replacement
        self._held = ""

    def push(self, text: str) -> str:
        *done, rest = (self._held + text).split(self._pattern)
        lengths = range(min(len(rest), len(self._pattern) - 1), 0, -1)
        num_held = next((n for n in lengths if self._pattern.startswith(rest[-n:])), 0)
        self._held = rest[len(rest) - num_held :]
        return self._replacement.join([*done, rest[: len(rest) - num_held]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 in ascending order."""
    alphabet = sorted(ByteLevel.alphabet())
    printable = [ord(char) for char in alphabet if ord(char) < 256]
    return dict(zip(alphabet, [*printable, *sorted(set(range(256)) - set(printable))], strict=True))


def _incremental_decoder(tokenizer: Tokenizer) -> _IncrementalText:
    decoder = tokenizer.decoder
    if decoder is None:
        return _JoinedText()
    # The library shows a decoder's parts only in its serialised form.
    spec = json.loads(decoder.__getstate__())
    stages = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return _ByteLevelText()

    stripped, num_stripped = "", 0
    if kinds[-2:] == ["Fuse", "Strip"] and stages[-1]["stop"] == 0:
        stripped, num_stripped = stages[-1]["content"], stages[-1]["start"]
        stages = stages[:-1]
    if stages and stages[-1]["type"] == "Fuse":
        stages = stages[:-1]
    parts = [_sentence_piece_stage(stage) for stage in stages]
    if None not in parts and [stage["type"] for stage in stages] in _SENTENCE_PIECE_STAGES:
        return _SentencePieceText(decoders.Sequence(parts), stripped, num_stripped)
    _log_held(shown(repr(decoder)))
    return _HeldText(decoder)


def _sentence_piece_stage(stage: dict[str, Any]) -> decoders.Decoder | None:
    """The stage if `_SentencePieceText` holds for it. Another Replace could make or break byte tokens."""
    match stage:
        case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
            return decoders.Replace("▁", " ")
        case {"type": "Metaspace", "replacement": "▁"}:
            return decoders.Metaspace(prepend_scheme=stage.get("prepend_scheme", "always"))
        case {"type": "ByteFallback"}:
            return decoders.ByteFallback()
    return None


@functools.lru_cache(maxsize=32)
def _log_held(decoder: str) -> None:
    logger.warning("streamed text comes all at the end: not known to be final earlier with the decoder %s", decoder)

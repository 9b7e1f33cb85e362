"""Texts to ids: `tokenizer(texts)`, with padding, truncation and tensors, as in transformers.

Where this differs from transformers:
    Special tokens written in a text stay text, and only `split_special_tokens=False` turns them into their ids: a
    prompt rendered from a chat template needs that, and text from strangers must not get it. A text that starts with
    one and is not parsed is logged, once. If a parsed text itself starts with the bos token, no second one is added.
    Nothing is cut without a word: `max_length` alone cuts, as in transformers, but says so once.
    An empty `text_pair` is a text too, also beside a single text.
    A text has at most MAX_TEXT_BYTES of `text_checks.py`.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from tokenizers import Encoding, Tokenizer

from llama_fast.errors import RequestError, UnsupportedError
from llama_fast.tokenizer.around_text import AroundText
from llama_fast.tokenizer.batch_encoding import BatchEncoding, check_length, check_side, kept_positions, pad_rows
from llama_fast.tokenizer.settings import NO_LIMIT
from llama_fast.tokenizer.text_checks import checked_texts
from llama_fast.tokenizer.token_stream import translated

logger = logging.getLogger(__name__)

_TRUNCATION = {
    None: None,
    False: None,
    "do_not_truncate": None,
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}


class TextEncoder(AroundText):
    """The part of `LlamaTokenizer` that makes ids of texts."""

    model_max_length: int
    model_input_names: list[str]
    padding_side: str
    truncation_side: str
    split_special_tokens: bool
    _warned: set[str]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        text_target: None = None,
        text_pair_target: None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        parse_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Ids of a text, or of several, and their masks.

        Args:
            text: a text, or a list of texts.
            text_pair: second texts, if the ids of two are to follow each other.
            add_special_tokens: add what the tokenizer puts around a text, for Llama the bos token.
            padding: False; True or "longest": to the longest text; "max_length": to `max_length`. Needs a pad token.
            truncation: False; True or "longest_first"; "only_first"; "only_second": cut to `max_length`. None: as
                "longest_first" if there is a `max_length` and no padding.
            max_length: None means `model_max_length`, if the tokenizer has one.
            pad_to_multiple_of: round the padded length up to a multiple of it.
            padding_side: "left" or "right"; None means the attribute.
            return_tensors: "pt", "np" or None for lists.
            return_*: columns to give beside input_ids; None: whether `model_input_names` has it.
            verbose: warn once of a text with more than `model_max_length` tokens.
            split_special_tokens: False makes ids of special tokens in the text. None means the attribute: True.
            parse_special_tokens: the same, the other way round.
            text_target, text_pair_target, stride, is_split_into_words, return_overflowing_tokens: not supported.

        Returns:
            Columns by name. A column has a row for each text; with one text and no `return_tensors` it is that row.

        Raises:
            RequestError: a text is not a string, holds a lone surrogate, is too long or makes the tokenizer fail, or an
                argument is wrong.
            UnsupportedError: an argument is not supported.
        """
        _refuse(
            text_target=text_target,
            text_pair_target=text_pair_target,
            stride=stride,
            is_split_into_words=is_split_into_words,
            return_overflowing_tokens=return_overflowing_tokens,
        )
        one = not isinstance(text, list | tuple)
        strategy, max_length_used = self._truncation(truncation, max_length, padding, pad_to_multiple_of)
        parse = self._parses(split_special_tokens, parse_special_tokens)
        texts, pairs = checked_texts(text, text_pair, one)
        if not parse and any(first.startswith(self._special_texts) for first in texts):
            self._warn_once(
                "a text starts with a special token written out, as chat templates write it, and it stays text: pass "
                "add_special_tokens=False, parse_special_tokens=True, or take the ids of apply_chat_template"
            )
        encodings = self._encodings(texts, pairs, add_special_tokens, parse)
        kept = [_kept_of(encoding, parse, strategy, max_length_used, self.truncation_side) for encoding in encodings]

        names = self.model_input_names
        wanted = {
            "input_ids": ("ids", True),
            "token_type_ids": ("type_ids", return_token_type_ids),
            "attention_mask": ("attention_mask", return_attention_mask),
            "special_tokens_mask": ("special_tokens_mask", return_special_tokens_mask),
            "offset_mapping": ("offsets", return_offsets_mapping),
        }
        columns = {
            name: [_rows(getattr(encoding, attribute), at) for encoding, at in zip(encodings, kept, strict=True)]
            for name, (attribute, asked) in wanted.items()
            if asked or (asked is None and name in names)
        }
        if verbose and max_length is None:
            self._warn_of_length(max(map(len, columns["input_ids"])))
        columns = self._pad(columns, padding, max_length_used, pad_to_multiple_of, padding_side)
        encoding = BatchEncoding(columns)
        if return_length:
            encoding["length"] = [len(row) for row in columns["input_ids"]]
        if one and return_tensors is None:
            encoding.update({name: rows[0] for name, rows in columns.items()})
        return encoding.convert_to_tensors(return_tensors)

    encode_plus = batch_encode_plus = __call__  # the names before transformers 5

    def encode(
        self, text: str, text_pair: str | None = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of `text`; the arguments, and what it raises, are those of `tokenizer(text)`."""
        return cast(list[int], self(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)["input_ids"])

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str | None]:
        """Tokens of `text` as they stand in the vocabulary; the arguments are those of `tokenizer(text)`."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens, **kwargs))

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads what `tokenizer(...)` gave before, for one text or several; the arguments are those of the call.

        Args:
            encoded_inputs: columns by name, or a list of them, one for each text. Columns that are not of a tokenizer,
                labels for example, stay as they are.
        """
        if not isinstance(encoded_inputs, Mapping | BatchEncoding):
            names = list(encoded_inputs[0]) if encoded_inputs else []
            encoded_inputs = {name: [row[name] for row in encoded_inputs] for name in names}
        if not encoded_inputs.get("input_ids"):
            raise RequestError(f"pad needs input_ids with at least one text; got {sorted(encoded_inputs)!r:.80}")
        columns = {name: _plain(column) for name, column in encoded_inputs.items()}
        one = not isinstance(columns["input_ids"][0], list)
        if one:
            columns = {name: [row] for name, row in columns.items()}
        if return_attention_mask or (return_attention_mask is None and "attention_mask" in self.model_input_names):
            columns.setdefault("attention_mask", [[1] * len(row) for row in columns["input_ids"]])
        columns = self._pad(columns, padding, max_length or self._limit(), pad_to_multiple_of, padding_side)
        if one:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(columns).convert_to_tensors(return_tensors)

    @property
    def max_len_single_sentence(self) -> int:
        """Most tokens of a text within `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Most tokens of two texts within `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @functools.cached_property
    def _parsing_tokenizer(self) -> Tokenizer:
        # A second tokenizer and not a switch of the first: another thread may be encoding.
        twin = Tokenizer.from_str(self._tokenizer.to_str())
        twin.encode_special_tokens = False
        return twin

    def _backend_changed(self) -> None:
        super()._backend_changed()
        self.__dict__.pop("_parsing_tokenizer", None)

    def _encodings(
        self, texts: list[str], pairs: list[str] | None, add_special_tokens: bool, parse: bool
    ) -> list[Encoding]:
        tokenizer = self._parsing_tokenizer if parse else self._tokenizer
        with translated(RequestError, "the text could not be encoded"):
            if len(texts) == 1:  # without the library's threads
                pair = None if pairs is None else pairs[0]
                return [tokenizer.encode(texts[0], pair, add_special_tokens=add_special_tokens)]
            inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
            return tokenizer.encode_batch(inputs, add_special_tokens=add_special_tokens)

    def _parses(self, split: bool | None, parse: bool | None) -> bool:
        if parse is not None and split is not None and parse == split:
            raise RequestError("parse_special_tokens and split_special_tokens are opposites; pass one of them")
        if parse is not None:
            return parse
        return not (self.split_special_tokens if split is None else split)

    def _limit(self) -> int | None:
        check_length("model_max_length", self.model_max_length)
        return None if self.model_max_length >= NO_LIMIT else self.model_max_length

    def _truncation(
        self, truncation: bool | str | None, max_length: int | None, padding: bool | str, multiple_of: int | None
    ) -> tuple[str | None, int | None]:
        """How to cut, None for not at all, and the length to cut and to pad to."""
        check_length("max_length", max_length)
        check_side("truncation_side", self.truncation_side)
        strategy = _TRUNCATION.get(truncation, "") if isinstance(truncation, bool | str | None) else ""
        if strategy == "":
            raise RequestError(
                "truncation must be True, False, 'longest_first', 'only_first' or 'only_second'; "
                f"got {truncation!r:.80}"
            )
        if truncation is None and max_length is not None and padding is False:
            strategy = "longest_first"
            self._warn_once("max_length=%s without truncation cuts texts; pass truncation=True to say so", max_length)
        length = self._limit() if max_length is None else max_length
        if length is None and (strategy or padding == "max_length"):
            self._warn_once("nothing is cut or padded to a length: pass max_length, this tokenizer has none of its own")
            strategy = None
        if strategy and padding not in (False, "do_not_pad") and multiple_of and length and length % multiple_of:
            raise RequestError(f"max_length={length} must be a multiple of pad_to_multiple_of={multiple_of}")
        return strategy, length

    def _pad(
        self,
        columns: dict[str, Any],
        padding: bool | str,
        max_length: int | None,
        multiple_of: int | None,
        side: str | None,
    ) -> dict[str, Any]:
        return pad_rows(
            columns,
            padding,
            pad_token_id=self.pad_token_id,
            max_length=max_length,
            multiple_of=multiple_of,
            side=self.padding_side if side is None else side,
        )

    def _warn_of_length(self, num_tokens: int) -> None:
        if num_tokens > self.model_max_length:
            self._warn_once(
                "a text has %s tokens, more than model_max_length=%s; nothing is cut", num_tokens, self.model_max_length
            )

    def _warn_once(self, message: str, *args: object) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *args)


def _kept_of(
    encoding: Encoding, parse: bool, strategy: str | None, max_length: int | None, side: str
) -> list[int] | None:
    """Positions that stay of an encoding; None for all."""
    first = 0
    if parse:
        mask = encoding.special_tokens_mask  # 1 where the post-processor added the token
        num_added = mask.index(0) if 0 in mask else 0
        if encoding.ids[:num_added] == encoding.ids[num_added : 2 * num_added]:
            first = num_added
    if strategy is None or max_length is None or len(encoding) - first <= max_length:
        return list(range(first, len(encoding))) if first else None
    how = cast(Literal["longest_first", "only_first", "only_second"], strategy)
    return kept_positions(encoding.sequence_ids, range(first, len(encoding)), max_length, how, side)


def _rows(values: list[Any], kept: list[int] | None) -> list[Any]:
    return values if kept is None else [values[at] for at in kept]


def _plain(column: Any) -> Any:
    if hasattr(column, "tolist"):
        return column.tolist()
    return [_plain(row) if hasattr(row, "tolist") or isinstance(row, list | tuple) else row for row in column]


def _refuse(**arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise UnsupportedError(f"tokenizer({name}=...) is not supported yet")

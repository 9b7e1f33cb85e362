"""What can be encoded as a text."""

from collections.abc import Sequence
from typing import cast

from llama_fast.errors import RequestError

# UTF-8. Encoding takes up to 1 s and 180 MB of memory a megabyte. Llama 3.1's whole context is about half of one.
MAX_TEXT_BYTES = 8 << 20


def checked_texts(
    text: str | Sequence[str], text_pair: str | Sequence[str] | None, one: bool
) -> tuple[list[str], list[str] | None]:
    """The texts and their pairs as lists; `one`: they are single texts.

    Raises:
        RequestError: they are no strings, or not as many pairs as texts, or one is too long or holds a lone surrogate.
    """
    texts = [text] if one else list(text)
    if not texts:
        raise RequestError("text is an empty list; give at least one text")
    pairs = [text_pair] if one else text_pair
    if text_pair is None:
        pairs = None
    elif not isinstance(pairs, list | tuple) or len(pairs) != len(texts):
        raise RequestError(f"text_pair must be a list with one text for each of the {len(texts)} texts")
    for name, values in (("text", texts), ("text_pair", pairs or [])):
        for index, value in enumerate(values):
            _check_text(value, name if one else f"{name}[{index}]")
    return cast(list[str], texts), cast("list[str] | None", pairs and list(pairs))


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a string; got {type(text).__name__}")
    num_bytes = len(text)
    if num_bytes <= MAX_TEXT_BYTES and not text.isascii():
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as cause:
            raise RequestError(
                f"{name}[{cause.start}] is the lone surrogate U+{ord(text[cause.start]):04X}, which is no character; "
                'remove it or decode the text with errors="replace"'
            ) from cause
    if num_bytes > MAX_TEXT_BYTES:
        raise RequestError(f"{name} has {num_bytes:,} bytes or more, a text at most {MAX_TEXT_BYTES:,}; split it")

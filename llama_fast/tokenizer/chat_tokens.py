"""Who wrote the special tokens of a prompt: the chat template, or whoever wrote a message, a name, a tool, a document.

The template's become ids; the others must stay text, or a message could end itself and go on as the system's. To tell
them apart the conversation is rendered again, with rare characters in place of what special tokens are made of in
all that the caller gave: the special tokens that are still there are the template's.

A token is the template's if it wrote all its punctuation: some write '<|' + message.role + '|>'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_fast.errors import LlamaFastError, RequestError, shown
from llama_fast.tokenizer.chat_template import Chat

# Rare characters (CJK extension B) to stand for others: Python prints them as they are, unlike private ones.
_RARE = range(0x20000, 0x2A6DE)

# A prompt in pieces; every second one is a special token that the template wrote.
Pieces = list[str]


def pieces_of_prompt(chat: Chat, prompt: str, tokens: Sequence[str]) -> Pieces | None:
    """The prompt in pieces; None where the template wrote all special tokens in it, which is nearly always.

    Args:
        prompt: `chat.text()`.
        tokens: the tokenizer's special tokens.

    Raises:
        RequestError: the template acts on a special token in a message, so that it is not known who wrote what.
    """
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")
    written = pattern.findall(prompt)
    marks = {char for token in written for char in token if not (char.isalnum() or char.isspace() or char == "_")}
    texts = [text for _, text in _texts("", chat.given)]
    holds_tokens = any(pattern.search(text) for text in texts)
    if not holds_tokens and not any(mark in text for text in texts for mark in marks):
        return None

    parts = set("".join(written))
    hidden = {ord(char): rare for char, rare in zip(parts, _unused(prompt, len(parts)), strict=True)}
    shown_again = {ord(rare): chr(char) for char, rare in hidden.items()}
    cuts = [(token[:n], token[n:]) for token in set(written) for n in range(1, len(token))]
    tails = {start for start, _ in cuts if marks.intersection(start)}
    heads = {end for _, end in cuts if marks.intersection(end)}

    def without_tokens(text: str) -> str:
        return pattern.sub(lambda match: match[0].translate(hidden), text)

    def without(some: Iterable[str]) -> Callable[[str], str]:
        table = {ord(mark): hidden[ord(mark)] for mark in some}
        return lambda text: without_tokens(text).translate(table)

    def without_edges(text: str) -> str:
        text = without_tokens(text)
        start, end = _edges(text, heads, tails)
        return text[:start].translate(hidden) + text[start:end] + text[end:].translate(hidden)

    # First without any mark, which also shows tokens that the template puts together from parts of texts. Where it
    # looks for such marks in a text ("</think>" for example), without one that is in each token; else without tokens
    # and what may be one's start or end.
    shared = sorted(mark for mark in marks if all(mark in token for token in written))
    without_marks = without(marks)
    for change in (without_marks, *map(without, shared), without_edges):
        marked = _rendered(chat, change)
        if change is without_marks and not holds_tokens and pattern.findall(marked) == written:
            return None
        if marked.translate(shown_again) == prompt:
            pieces = re.split(f"({pattern.pattern})", marked)
            return None if pieces[1::2] == written else [piece.translate(shown_again) for piece in pieces]
    raise RequestError(_acted_on(chat, pattern))


def encode_pieces(backend: Tokenizer, pieces: Pieces) -> list[int]:
    """Ids of a prompt in pieces, as if the texts between the special tokens held nothing that looks like one.

    A tokenizer of the same parts, whose special tokens have names of one rare character, encodes all of it in one go:
    what it does to a text may depend on whether the text is the first and on what stands beside it.

    Raises:
        RequestError: a special token of the template is none where it stands, by the flags of this tokenizer.
    """
    added = sorted(backend.get_added_tokens_decoder().items())
    rare = _unused("".join(pieces), len(added))
    twin = Tokenizer(backend.model)
    if backend.normalizer is not None:
        twin.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        twin.pre_tokenizer = backend.pre_tokenizer
    names, id_of = {}, {}
    for (token_id, token), name in zip(added, rare, strict=True):
        name = names[token.content] = name if token.special else token.content
        flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        twin.add_tokens([AddedToken(name, **flags)])
        id_of[twin.token_to_id(name)] = token_id
    renamed = [names[piece] if index % 2 else piece for index, piece in enumerate(pieces)]
    ids = twin.encode("".join(renamed), add_special_tokens=False).ids
    special = {twin.token_to_id(name) for name in rare} - {None}
    if sum(token_id in special for token_id in ids) != len(pieces) // 2:
        raise RequestError(
            "a message holds a special token as text, and in this tokenizer the template's own are none where they "
            'stand (they are "normalized" or "single_word"); take it out, or pass parse_special_tokens=True'
        )
    return [id_of.get(token_id, token_id) for token_id in ids]


def _unused(text: str, count: int) -> list[str]:
    """Characters that are not in `text`."""
    used = set(text)
    unused = [chr(code) for code in _RARE if chr(code) not in used][:count]
    if len(unused) < count:
        raise RequestError("the conversation has nearly every character there is, and special tokens; leave one out")
    return unused


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a JSON value, keys included, and where it stands."""
    if isinstance(value, str):
        yield name, value
    for index, item in enumerate(value if isinstance(value, list) else []):
        yield from _texts(f"{name}[{index}]", item)
    for key, item in (value if isinstance(value, dict) else {}).items():
        yield f"{name}, a key", key
        yield from _texts(f"{name}.{key}" if name else key, item)


def _edges(text: str, heads: set[str], tails: set[str]) -> tuple[int, int]:
    """Where the longest of `heads` at the start of `text` ends, and where the longest of `tails` at its end begins;
    white space around the text is passed over."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    longest = max(map(len, heads | tails), default=0)
    head = max((n for n in range(1, longest + 1) if text[start : start + n] in heads), default=0)
    tail = max((n for n in range(1, min(longest, end - start) + 1) if text[end - n : end] in tails), default=0)
    return start + head if head else 0, max(start + head, end - tail) if tail else len(text)


def _rendered(chat: Chat, change: Callable[[str], str]) -> str:
    try:
        return chat.text(change)
    except LlamaFastError:
        return ""  # the template accepted the texts as they are


def _acted_on(chat: Chat, pattern: re.Pattern[str]) -> str:
    found = ((name, match[0]) for name, text in _texts("", chat.given) for match in pattern.finditer(text))
    name, token = next(found, ("a message", "a part of one"))
    return (
        f"{shown(name)} holds the special token '{shown(token)}' as text, and the chat template acts on it, so that it "
        "cannot stay text; take it out, or pass parse_special_tokens=True if it is meant"
    )

"""Mutations of JSON documents, Python values and bytes. All take a `random.Random` and depend on nothing else.

A document of parsed JSON is changed in place, by `mutate_document`, at places found by random descent; `to_json` writes
what JSON itself cannot hold (NaN, a key twice, 10^5 brackets) from marks in strings.
"""

import json
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Sequence[Any]
NO_KEYS: Mapping[str, Values] = {}

NUMBERS: Values = (
    *(0, 1, -1, 2, 3, 7, 80, 127, 128, 255, 256, 4096, 65535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, 10**30, 10**399, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1.0, 4096.0, 4096.5, -1.5, 1e-5, 1e-45),
    *(5e-324, 1e30, 1e300, 1.7e308, True, False, None),
)
STRINGS: Values = (
    *("", " ", "0", "4096", "nan", "null", "true", "llama", "model", "\0", "a\0b", "\x1b[2J\x1b[31m", "\x7f", "\x85"),
    *("\u202eright to left", "\u2028", "\ufeff", "\ud800", "\udfff\ud800", "é", "你好", "\U0001f917", "a\u0301" * 30),
    *("../../etc/passwd", "..", ".", "a/b", "a\\b", "C:\\x", "%s%d%n", "{0}{x!r}"),
    *("<s>", "</s>", "__class__", "__proto__", "'\"`\n\r\t", "x" * 200, "x" * 5000, "\x1b" * 300),
)
CONTAINERS: Values = ((), [], {}, [[]], [None], {"": {}}, [0] * 100, {"a": {"a": {"a": []}}}, [{}, []], [1, "1", None])

# Text that takes a value's place in JSON; the second tuple is large, and so rare.
_RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-400", "-0", "-0.0", "1.0e2", "01", "+1", "0x10", "1_000"),
    *('"/etc/passwd"', '"/dev/zero"'),  # not in a request: its message may show what came, but looks like a leak then
    *("True", "nul", "'a'", "[1,]", "{,}", "", "/**/1", '"\\ud800"', '"\\u0000"', '"\\x"', '"\t"', '"\x00"', '"'),
    *("1" + "0" * 400, "9" * 5000, "1." + "1" * 5000, "[" * 70 + "]" * 70, '{"a":' * 63 + "1" + "}" * 63),
)
_LARGE_RAW = ("[" * 100_000, '{"a":' * 100_000, f"[{'0,' * 100_000}0]", f'"{"x" * (1 << 20)}"', "1" * (1 << 20))
_RAW_MARK = re.compile(r'"\\u0001raw(\d+)\\u0001"')
_TWICE_MARK = "\x01twice\x01"


def mutate_document(
    rng: random.Random, document: Any, *, also: Values = (), keys: Mapping[str, Values] = NO_KEYS, raw: bool = True
) -> Any:
    """`document` with one or a few changes, made in place.

    Args:
        also: further values to put in a value's place.
        keys: members that any object may get: values by name.
        raw: whether marks for `to_json` may be put in.
    """
    root = [document]
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 6))):
        rng.choice(_CHANGES)(rng, root, (also, keys, raw))
    return root[0] if root else None


def to_json(rng: random.Random, document: Any) -> bytes:
    """The document's text, rarely damaged further."""
    text = json.dumps(document, ensure_ascii=rng.random() < 0.7)
    raws = (*_RAW, *_LARGE_RAW)
    text = _RAW_MARK.sub(lambda mark: raws[int(mark[1]) % len(raws)], text).replace("\\u0001twice\\u0001", "")
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        content = rng.choice((b"\xef\xbb\xbf", b" ", b"\n", b"[", b"\0")) + content
    return mutate_bytes(rng, content) if rng.random() < 0.15 else content


def any_value(rng: random.Random, also: Values = (), raw: bool = False) -> Any:
    """A value that few fields expect."""
    if raw and rng.random() < 0.2:
        number = rng.randrange(len(_RAW)) if rng.random() < 0.95 else len(_RAW) + rng.randrange(len(_LARGE_RAW))
        return f"\x01raw{number}\x01"
    return _fresh(rng.choice(rng.choice((NUMBERS, NUMBERS, STRINGS, CONTAINERS, *([also] * 3 if also else [])))))


def mutate_bytes(
    rng: random.Random, content: bytes, pieces: Sequence[bytes] = (b"\0", b"\xff", b'"', b"{", b"}")
) -> bytes:
    """`content` with one to four changes: bits, bytes, ranges, numbers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 8, 16, 64, 1000)), len(data) - at)
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                data[at:at] = rng.choice((rng.randbytes(rng.choice((1, 2, 8))), rng.choice(pieces)))
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 5:
                del data[at:]
            case 6:  # splice: another part of the same content
                other = rng.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case 7 if len(data) >= 8:
                at = rng.randrange(len(data) - 7)
                struct.pack_into("<Q", data, at, nasty_u64(rng, len(data)))
            case 8:
                digits = [found.span() for found in re.finditer(rb"\d+", data[at : at + 200])]
                if digits:
                    first, last = rng.choice(digits)
                    data[at + first : at + last] = json.dumps(rng.choice(NUMBERS)).encode()
    return bytes(data)


def nasty_u64(rng: random.Random, size: int) -> int:
    """Lengths and offsets round what a file of `size` bytes may have, and far beyond."""
    edge = rng.choice((0, 8, size, size // 2, 100 << 20, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(2**64)))
    return (edge + rng.choice((-8, -1, 0, 0, 0, 1, 2, 8))) % 2**64


def _fresh(value: Any, depth: int = 20) -> Any:
    """A copy of lists and dicts, which may be changed later; those that hold themselves end at `depth`."""
    if isinstance(value, dict) and depth:
        return {key: _fresh(item, depth - 1) for key, item in value.items()}
    return [_fresh(item, depth - 1) for item in value] if isinstance(value, list) and depth else value


_Options = tuple[Values, Mapping[str, Values], bool]


def _place(rng: random.Random, root: list[Any]) -> tuple[Any, Any] | None:
    """A container and an index or key of it; places near the top come more often."""
    container: Any = root
    if not root:
        return None
    key: Any = 0
    go_on = 0.97
    while isinstance(value := container[key], dict | list) and value and rng.random() < go_on:
        container, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        go_on = 0.7
    return container, key


def _object(rng: random.Random, root: list[Any]) -> dict[Any, Any] | None:
    """The root, where it is an object, or one deeper."""
    if root and isinstance(root[0], dict) and rng.random() < 0.6:
        return root[0]
    container, key = _place(rng, root) or (None, None)
    found = container if isinstance(container, dict) or container is None else container[key]
    return found if isinstance(found, dict) else None


def _replace(rng: random.Random, root: list[Any], options: _Options) -> None:
    if place := _place(rng, root):
        place[0][place[1]] = any_value(rng, options[0], options[2])


def _tweak(rng: random.Random, root: list[Any], options: _Options) -> None:
    """Another value that looks much the same."""
    container, key = _place(rng, root) or (None, None)
    if container is None:
        return
    value = container[key]
    if isinstance(value, bool):
        container[key] = rng.choice((not value, int(value), str(value).lower()))
    elif isinstance(value, int | float) and abs(value) < 1e9:
        near = (value + 1, value - 1, value + 0.5, float(value), str(value), [value])
        container[key] = rng.choice((*near, -value, value * 2, value // 2, value * 2**32))
    elif isinstance(value, str):
        at, piece = rng.randrange(len(value) + 1), rng.choice(STRINGS)
        longer = (value[:at] + piece + value[at:], piece + value, value * 2)
        container[key] = rng.choice((*longer, value[:at], value.upper()))
    elif isinstance(value, list):
        at = rng.randrange(len(value) + 1)
        longer = (value + value, [value], [*value, any_value(rng)])
        container[key] = rng.choice((*longer, value[:at], value[at:], value[::-1]))
    elif isinstance(value, dict):
        lists = ([value], list(value), list(value.items()))
        container[key] = rng.choice((*lists, {"": value}, dict(reversed(value.items()))))


def _remove(rng: random.Random, root: list[Any], options: _Options) -> None:
    if (place := _place(rng, root)) and place[0] is not root:
        del place[0][place[1]]


def _rename(rng: random.Random, root: list[Any], options: _Options) -> None:
    if (members := _object(rng, root)) and (names := list(members)):
        old = rng.choice(names)
        names += options[1]
        tail = "x" if not isinstance(old, str) else rng.choice((old + " ", old.upper(), old[:-1], "_" + old))
        members[rng.choice((tail, rng.choice(names), rng.choice(STRINGS)))] = members.pop(old)


def _twice(rng: random.Random, root: list[Any], options: _Options) -> None:
    """A member twice, the second with another value or the same one."""
    if (members := _object(rng, root)) and options[2]:
        name = rng.choice(list(members))
        members[f"{_TWICE_MARK}{name}"] = rng.choice((members[name], any_value(rng, options[0], True)))


def _add(rng: random.Random, root: list[Any], options: _Options) -> None:
    if (members := _object(rng, root)) is not None:
        if options[1] and rng.random() < 0.8:
            name = rng.choice(list(options[1]))
            usual = rng.random() < 0.6
            members[name] = _fresh(rng.choice(options[1][name])) if usual else any_value(rng, options[0], options[2])
        else:
            members[rng.choice(STRINGS)] = any_value(rng, options[0], options[2])


def _swap(rng: random.Random, root: list[Any], options: _Options) -> None:
    one, other = _place(rng, root), _place(rng, root)
    if one and other:
        # Copies, since the one may hold the other.
        a, b = _fresh(one[0][one[1]]), _fresh(other[0][other[1]])
        one[0][one[1]], other[0][other[1]] = b, a


_CHANGES: Sequence[Callable[[random.Random, list[Any], _Options], None]] = (
    *(_replace, _replace, _replace, _tweak, _tweak, _remove, _rename, _twice, _add, _add, _swap),
)

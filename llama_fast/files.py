"""Files of a checkpoint folder: JSON read strictly, any file written whole or not at all.

What JSON parsers could understand differently is refused. Beyond RFC 8259: no key twice in one object, no NaN, Infinity
or number beyond a double, UTF-8 without a byte order mark, an object at the top, a limit on size and on depth. Sizes
are checked before anything is parsed, and only regular files are opened: a FIFO would wait for its writer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from llama_fast.errors import LlamaFastError, shown

MAX_BYTES = 1 << 20  # config.json and its like: the largest seen, with long lists of labels, have tens of KB
MAX_DEPTH = 64

_KINDS = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}


def read_file(
    path: str | os.PathLike[str],
    error: type[LlamaFastError],
    *,
    max_bytes: int,
    io_error: type[LlamaFastError] | None = None,
) -> bytes:
    """The content of a regular file; nothing of one that is too large is read.

    Args:
        error: what is raised; `io_error`, if given, is raised instead where the file cannot be opened or read.
        max_bytes: most bytes the file may have.

    Raises:
        error: naming the file, and what is wrong with it.
    """
    path = Path(path)
    cannot_read = io_error or error
    try:
        if os.path.lexists(path) and not path.is_file():  # opening a FIFO would wait for its writer
            raise cannot_read(f"{path}: is {'a folder and ' if path.is_dir() else ''}not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # It may grow meanwhile.
            content = file.read(max_bytes + 1) if size <= max_bytes else None
    except LlamaFastError:  # some are a ValueError too
        raise
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        raise cannot_read(f"{path}: cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause
    if content is None or len(content) > max_bytes:
        raise error(f"{path}: has {size:,} bytes; such a file has at most {max_bytes:,}")
    return content


def read_json_object(
    path: str | os.PathLike[str],
    error: type[LlamaFastError],
    *,
    max_bytes: int = MAX_BYTES,
    io_error: type[LlamaFastError] | None = None,
) -> dict[str, Any]:
    """The JSON object in a file; the arguments, and what it raises, are those of `read_file`."""
    content = read_file(path, error, max_bytes=max_bytes, io_error=io_error)
    return parse_json_object(content, str(path), error)


def parse_json_object(content: bytes, name: str, error: type[LlamaFastError]) -> dict[str, Any]:
    """The JSON object in `content`, which messages call `name`.

    Raises:
        error: naming `name`, and what is wrong in it.
    """
    try:
        text = content.decode("utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it starts with a byte order mark; save it as UTF-8 without one")
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_float, parse_constant=_refuse_constant, parse_int=_int
        )
        if b"\\ud" in content.lower():
            _refuse_half_characters(value)
    except UnicodeDecodeError as cause:
        raise error(f"{name}: is not UTF-8: byte {cause.start} is 0x{content[cause.start]:02x}") from cause
    except RecursionError as cause:
        raise error(f"{name}: is nested more than {MAX_DEPTH} deep") from cause
    except ValueError as cause:
        empty = "the file is empty" if not content.strip() else cause
        raise error(f"{name}: is not strict JSON: {empty}") from cause
    if not isinstance(value, dict):
        kind = "null" if value is None else _KINDS[type(value)]
        raise error(f"{name}: must hold a JSON object, {{...}}; it holds {kind}")
    if _deeper_than(value, MAX_DEPTH):
        raise error(f"{name}: is nested more than {MAX_DEPTH} deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{shown(twice)}' appears twice; keep one")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is beyond a double")
    return value


def _int(text: str) -> int:
    if len(text) > 400:  # no double holds it, and a message should not
        raise ValueError(f"the number {shown(text)} is beyond a double")
    return int(text)


def _refuse_half_characters(value: object) -> None:
    """JSON can write half of a surrogate pair; no UTF-8, and so no file name, tokenizer or safetensors header, can."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as cause:
        half = ord(cause.object[cause.start])
        raise ValueError(f"\\u{half:04x} is half of a surrogate pair and no character") from cause


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which takes its place when the block ends well and is removed when not."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a kill left; and writing through a link would change another file
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private; a checkpoint follows the umask
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""What a chat template may compute with values, each operation paid for before or as it happens.

Values are JSON's, and tuples. A template can share them, so that `[x, x]` forty times over is a tree of 2**40 leaves in
a few hundred bytes: whatever looks at all of a value is therefore preceded by a walk that spends.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import Undefined
from markupsafe import Markup

from llama_fast.errors import TemplateError

# A step is about one node of the syntax tree: at most 0.3 us, and 16 bytes that stay. Published templates take 50 to
# 200 of them a message, so that ten thousand messages can be rendered, and a loop without end takes half a second.
MAX_STEPS = 2_000_000
# Text that may be made, whether it is dropped again or not; published templates make each message up to ten times over.
MAX_TEXT_BYTES = 16 * 1024 * 1024
TEXT_BYTES_PER_CHARACTER_GIVEN = 32
MAX_TEXT = 4 * 1024 * 1024  # characters of the prompt and of any one string: several times the longest context
MAX_INTEGER = 2**63  # of any number computed: Python's integers could fill the memory
MAX_NESTING = 64  # of lists and dicts, as in files.py

_CHARACTERS_PER_STEP = 64
_LEAVES = (float, type(None), range, Undefined)
_KEYS: tuple[type, ...] = (dict, type({}.keys()))
_LISTS: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
_NUMBERS = (int, float, bool)
_SCALARS = (str, int, float, bool, type(None))
_PRINTABLE = (list, tuple, dict, Undefined, Markup)
_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv}
_ARITHMETIC |= {"%": operator.mod, "**": operator.pow}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt}
_COMPARISONS |= {"lteq": operator.le, "gt": operator.gt, "gteq": operator.ge}


def one_line(text: object) -> str:
    """`text` as it may stand in a message: printable, no addresses of objects, and no megabyte."""
    line = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(text)[:1000].split()))
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= 500 else f"{line[:500]}..."


class OneShot:
    """What a filter made where Jinja gives a generator: true, without a length, to be looped over once.

    Its items are there already: generators of generators, nested deep, would overflow the stack when they run.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(list(items))

    def __iter__(self) -> Iterator[Any]:
        return self._items


class Budget:
    """Steps that one rendering has left, and the operations that take from them.

    Every method raises TemplateError when the steps are used up or a value grows beyond its limit.
    """

    def __init__(self, characters_given: int = 0) -> None:
        self._steps = MAX_STEPS
        self._text_bytes = MAX_TEXT_BYTES + TEXT_BYTES_PER_CHARACTER_GIVEN * characters_given

    def spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise TemplateError(f"the chat template takes more than {MAX_STEPS:,} steps; is a loop in it too long?")

    def text(self, value: str) -> str:
        """`value`, newly made, paid for."""
        self.spend(2 + len(value) // _CHARACTERS_PER_STEP)
        self._text_bytes -= sys.getsizeof(value)
        if self._text_bytes < 0:
            raise TemplateError("the chat template makes too much text; does it repeat the conversation?")
        return value

    def room(self, length: int) -> None:
        """Whether a string or list of `length`, about to be made, is not too long."""
        if length > MAX_TEXT:
            raise TemplateError(f"the chat template makes a value of {length:,} characters; the limit is {MAX_TEXT:,}")

    def walk(self, value: Any) -> int:
        """Spends what it takes to look at all of `value`; returns the characters of its texts and numbers."""
        level, characters = [value], 0
        for _ in range(MAX_NESTING):
            inner: list[Any] = []
            for item in level:
                if isinstance(item, str):
                    self.spend(1 + len(item) // _CHARACTERS_PER_STEP)
                    characters += len(item)
                elif type(item) in _LISTS:
                    before = len(inner)
                    inner += item
                    self.spend(1 + len(inner) - before)
                elif isinstance(item, dict):
                    self.spend(1 + 2 * len(item))
                    inner += item
                    inner += item.values()
                elif isinstance(item, int):
                    digits = item.bit_length() // 3
                    self.spend(1 + digits // 16)
                    characters += digits
                elif isinstance(item, _LEAVES):
                    self.spend(1)
                else:
                    raise TemplateError(f"the chat template treats a {type(item).__name__} as a value")
            if not inner:
                return characters
            level = inner
        raise TemplateError(f"the chat template nests values more than {MAX_NESTING} deep")

    def printed(self, value: Any) -> str:
        """`value` as a template writes it."""
        if type(value) not in _SCALARS:
            if not isinstance(value, _PRINTABLE):
                raise TemplateError(f"the chat template writes a {type(value).__name__}, which has no text")
            if not isinstance(value, Undefined):
                self.room(4 * self.walk(value))  # repr may write one character as ten
        return self.text(str(value))

    def arithmetic(self, symbol: str, left: Any, right: Any) -> Any:
        """`left symbol right`."""
        result: Any
        if type(left) in _NUMBERS and type(right) in _NUMBERS:
            if symbol == "**" and isinstance(right, int) and abs(right) > 64:
                raise TemplateError(f"the chat template raises a number to the power {right:.0f}; the limit is 64")
            result = _ARITHMETIC[symbol](left, right)
            if isinstance(result, int) and abs(result) > MAX_INTEGER:
                raise TemplateError("the chat template computes an integer beyond 64 bits")
            return result
        if isinstance(left, Undefined) or isinstance(right, Undefined):
            return _ARITHMETIC[symbol](left, right)  # raises, and says what is not defined
        if symbol == "+" and type(left) is type(right) and type(left) in (str, list, tuple):
            return self.joined([left, right])
        if symbol == "*" and type(left) is int:
            left, right = right, left
        if symbol == "*" and type(left) in (str, list, tuple) and type(right) is int:
            self.room(len(left) * max(right, 0))
            if isinstance(left, str):
                return self.text(left * right)
            self.spend(len(left) * max(right, 0) // 2)
            return left * right
        if symbol == "%" and type(left) is str:
            return self.percent(left, right)
        raise TemplateError(
            f"the chat template computes {type(left).__name__} {symbol} {type(right).__name__}, which has no result"
        )

    def joined(self, parts: list[Any]) -> Any:
        """The sum of strings, of lists or of tuples."""
        length = sum(map(len, parts))
        self.room(length)
        if isinstance(parts[0], str):
            return self.text("".join(parts))
        self.spend(length // 2)
        return parts[0] + parts[1]

    def concatenated(self, *values: Any) -> str:
        """Jinja's `~`."""
        if any(isinstance(value, Markup) for value in values):
            raise TemplateError("the chat template joins text that it marked as safe, which would escape the rest")
        return str(self.joined([self.printed(value) for value in values]))

    def percent(self, pattern: str, values: Any) -> str:
        """Python's `%` on a string, with %s, %d and %% alone: a width could ask for any amount of memory."""
        if not re.fullmatch(r"(?:[^%]|%[sd%])*+", pattern):
            raise TemplateError("the chat template formats by % with more than %s, %d and %%")
        values = values if isinstance(values, tuple) else (values,)
        self.walk(pattern)
        shown = [value if type(value) in _NUMBERS else self.printed(value) for value in values]
        return self.text(pattern % tuple(shown))

    def formatted(self, pattern: str, /, *values: Any, **named: Any) -> str:
        """str.format with {}, {0} and {name} alone: no attributes, no widths."""
        if not re.fullmatch(r"(?:[^{}]|\{\{|\}\}|\{\w*\})*+", pattern):
            raise TemplateError("the chat template calls format with more than {}, {0} and {name}")
        texts = [self.printed(value) for value in values]
        named_texts = {name: self.printed(value) for name, value in named.items()}
        longest = max(map(len, [*texts, *named_texts.values(), ""]))
        self.walk(pattern)
        self.room(len(pattern) + pattern.count("{") * longest)
        return self.text(pattern.format(*texts, **named_texts))

    def compared(self, left: Any, *rest: Any) -> bool:
        """A chain of comparisons: operator, value, operator, value..."""
        for symbol, right in zip(rest[::2], rest[1::2], strict=True):
            if symbol in ("in", "notin"):
                result = self.contained(left, right) is (symbol == "in")
            else:
                # What ends first ends the comparison.
                self.walk(left if type(left) in _SCALARS else right)
                if type(right) not in _SCALARS and type(left) not in _SCALARS:
                    self.walk(left)
                result = bool(_COMPARISONS[symbol](left, right))
            if not result:
                return False
            left = right
        return True

    def contained(self, item: Any, container: Any) -> bool:
        """`item in container`."""
        if isinstance(container, str) and isinstance(item, str):
            self.search(container, item)
        elif type(container) in _KEYS:
            self.key(item)
        elif isinstance(container, range):
            self.spend(1 if isinstance(item, int) else len(container))
        else:
            container = list(container) if isinstance(container, OneShot) else container
            self.walk(container)
            self.walk(item)
        return item in container

    def search(self, text: str, pattern: str, *, product: bool = False) -> None:
        """Spends what looking for `pattern` takes. In short texts Python's search may take their product; stripping
        and searching from the right always may."""
        length = len(pattern) if product or len(text) < 2500 else min(len(pattern), 100)
        self.spend(1 + len(text) * (1 + length) // 256)

    def key(self, value: Any) -> Any:
        """`value` if it may be a key: the hash of a tuple walks all of it, every time."""
        if type(value) not in _SCALARS:
            raise TemplateError(
                f"the chat template uses a {type(value).__name__} as a key; keys are strings and numbers"
            )
        return value

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        if isinstance(value, str | list | tuple | range):
            length = len(range(*slice(start, stop, step).indices(len(value))))
            self.spend(length // (4 if isinstance(value, str) else 2))
        elif not isinstance(value, Undefined):
            raise TemplateError(f"the chat template takes a slice of a {type(value).__name__}")
        return value[start:stop:step]

"""The filters, tests, methods and functions that a chat template may use: those of published templates, no others.

Jinja's own run where they are safe once their argument is paid for. Left out on purpose: `attr` and `pprint`, which
reach or show Python's objects, and `center`, `round`, `batch` and others whose arguments ask for any amount of time or
memory and which no published template needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Undefined, filters, pass_context, pass_environment, tests
from jinja2.runtime import Context, LoopContext
from jinja2.utils import Namespace
from markupsafe import Markup

from llama_fast.errors import RequestError, TemplateError
from llama_fast.tokenizer.chat_budget import MAX_INTEGER, Budget, OneShot, one_line

JINJA_FILTERS: Mapping[str, Callable[..., Any]] = filters.FILTERS
JINJA_TESTS: Mapping[str, Any] = tests.TESTS

MAX_RANGE = 100_000
_MAX_INDENT = 64  # spaces
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # as str.splitlines has them
_ITEM_STEPS = 8  # for each item that a filter looks at


def budget_of(environment: Environment) -> Budget:
    budget: Budget = environment.budget  # type: ignore[attr-defined]
    return budget


def _items(budget: Budget, value: Any, *arguments: Any) -> Iterator[Any]:
    """The items of `value`, each paid for, also for what a filter does to it by `arguments`."""
    if isinstance(value, LoopContext):  # Jinja's filters would take items from the loop, some of them later
        raise TemplateError("the chat template gives its loop to a filter; give it the list that the loop goes through")
    steps = _ITEM_STEPS + sum(len(argument) for argument in arguments if isinstance(argument, str)) // 4
    for item in value:
        budget.spend(steps)
        yield item


# Methods: the budget, the value, what the template passes.


def _text_method(name: str) -> Callable[..., Any]:
    """A method of str whose result is no longer than three times the text."""

    def call(budget: Budget, text: str, *arguments: Any) -> Any:
        budget.walk(text)
        budget.room(3 * len(text) if name in ("capitalize", "lower", "title", "upper") else 0)
        for argument in arguments:
            for pattern in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(pattern, str):
                    budget.search(text, pattern, product=name[0] == "r" or name.endswith("strip"))
        result = getattr(text, name)(*arguments)
        return budget.text(result) if isinstance(result, str) else result

    return call


def _split_method(name: str) -> Callable[..., list[str]]:
    def call(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        # For the pieces: an object each, which are smaller if they are ASCII.
        if sep is None:
            budget.spend(1 + len(text) * (1 if text.isascii() else 3))
        else:
            budget.search(text, sep, product=name == "rsplit")
            found = text.count(sep)
            budget.spend(6 * found)
            if found:
                budget.text(text)  # the pieces are copies
        pieces: list[str] = text.splitlines() if name == "splitlines" else getattr(text, name)(sep, maxsplit)
        return pieces

    return call


def _replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    budget.search(text, old)
    found = text.count(old)
    budget.room(len(text) + (found if count < 0 else min(found, count)) * (len(new) - len(old)))
    return budget.text(text.replace(old, new, count))


def _join(budget: Budget, separator: str, items: Iterable[Any]) -> str:
    parts = list(_items(budget, items))
    budget.room(sum(map(len, parts)) + len(separator) * len(parts))
    return budget.text(separator.join(parts))


def _find_in_list(name: str) -> Callable[..., int]:
    def call(budget: Budget, values: list[Any], item: Any) -> int:
        budget.walk(values)
        budget.printed(item)  # in the error of index
        found: int = getattr(values, name)(item)
        return found

    return call


def _shallow(name: str) -> Callable[..., Any]:
    def call(budget: Budget, value: dict[Any, Any], *arguments: Any) -> Any:
        for argument in arguments[:1]:
            budget.key(argument)
        return getattr(value, name)(*arguments)

    return call


_TEXT_METHODS: tuple[str, ...] = ("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdecimal")
_TEXT_METHODS += ("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "lstrip")
_TEXT_METHODS += ("removeprefix", "removesuffix", "rfind", "rindex", "rstrip", "startswith", "strip", "title", "upper")

METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {name: _text_method(name) for name in _TEXT_METHODS}
    | {name: _split_method(name) for name in ("split", "rsplit", "splitlines")}
    | {"replace": _replace, "join": _join, "format": Budget.formatted},
    dict: {name: _shallow(name) for name in ("get", "items", "keys", "values")},
    list: {name: _find_in_list(name) for name in ("count", "index")},
    tuple: {name: _find_in_list(name) for name in ("count", "index")},
    LoopContext: {"cycle": lambda budget, loop, *values: loop.cycle(*values)},
}


# Filters: Jinja passes the environment, or the context, before the value.


def _of_text(name: str) -> Callable[..., Any]:
    """The method of str as a filter."""
    method = METHODS[str][name]

    @pass_environment
    def call(environment: Environment, value: Any, *arguments: Any) -> Any:
        budget = budget_of(environment)
        return method(budget, budget.printed(value), *arguments)

    return call


def _paid(name: str, *, whole: type | tuple[type, ...] = (), sorts: bool = False) -> Callable[..., Any]:
    """Jinja's own filter after a walk over its value: `whole` types as they are, others as a list of their items."""
    function = JINJA_FILTERS[name]
    takes_environment = hasattr(function, "jinja_pass_arg")

    @pass_environment
    def call(environment: Environment, value: Any, *arguments: Any, **named: Any) -> Any:
        budget = budget_of(environment)
        budget.spend(16)
        if not isinstance(value, whole):
            value = list(_items(budget, value, *arguments, *named.values()))
        if sorts:
            if any("," in argument for argument in (*arguments, *named.values()) if isinstance(argument, str)):
                raise TypeError("the filter sort takes one attribute")
            budget.room(3 * budget.walk(value))  # its texts are copied in lower case
            for _ in range(len(value).bit_length()):  # each is compared with about log2(n) others
                budget.walk(value)
        result = function(*((environment,) if takes_environment else ()), value, *arguments, **named)
        if isinstance(result, str):
            return budget.text(result)
        return result if isinstance(result, list) else OneShot(result)

    return call


def _for_each(name: str) -> Callable[..., OneShot]:
    """map, select and their like."""
    function = JINJA_FILTERS[name]

    @pass_context
    def call(context: Context, value: Any, *arguments: Any, **named: Any) -> OneShot:
        budget_of(context.environment).spend(16)
        items = _items(budget_of(context.environment), value, *arguments, *named.values())
        return OneShot(function(context, items, *arguments, **named))

    return call


@pass_environment
def _list(environment: Environment, value: Any) -> list[Any]:
    return list(_items(budget_of(environment), value))


@pass_environment
def _joined(environment: Environment, value: Any, d: Any = "", attribute: str | None = None) -> str:
    budget = budget_of(environment)
    items = _items(budget, value, attribute)
    if attribute is not None:
        items = (environment.getitem(item, attribute) for item in items)
    return _join(budget, budget.printed(d), [budget.printed(item) for item in items])


@pass_environment
def _unique(
    environment: Environment, value: Any, case_sensitive: bool = False, attribute: str | None = None
) -> OneShot:
    # Jinja's own takes tuples, and Python's hash of tuples has as many collisions as one likes.
    first: dict[Any, Any] = {}
    for item in _items(budget_of(environment), value, attribute):
        key = item if attribute is None else environment.getitem(item, attribute)
        if isinstance(key, str) and not case_sensitive:
            key = METHODS[str]["lower"](budget_of(environment), key)
        first.setdefault(budget_of(environment).key(key), item)
    return OneShot(first.values())


@pass_environment
def _string(environment: Environment, value: Any) -> str:
    return budget_of(environment).printed(value)


@pass_environment
def _format(environment: Environment, value: Any, *arguments: Any) -> str:
    budget = budget_of(environment)
    return budget.percent(budget.printed(value), arguments)


@pass_environment
def _indent(
    environment: Environment, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    budget = budget_of(environment)
    if (len(width) if isinstance(width, str) else width) > _MAX_INDENT:
        raise TemplateError(f"the chat template indents by more than {_MAX_INDENT} characters")
    if not isinstance(value, str):
        raise TypeError("the filter indent takes a text")
    lines = 1 + sum(map(value.count, _LINE_ENDS))
    budget.spend(8 * lines)
    budget.room(len(value) + _MAX_INDENT * lines)
    return budget.text(str(JINJA_FILTERS["indent"](value, width, first, blank)))


@pass_environment
def _to_json(
    environment: Environment,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which the models were not trained on.
    budget = budget_of(environment)
    budget.spend(32)
    budget.walk(value)
    wide = (indent is not None and not 0 <= indent <= _MAX_INDENT) or any(
        len(s) > _MAX_INDENT for s in separators or ()
    )
    if wide:
        raise TemplateError(
            f"the chat template calls tojson with an indent or separator beyond {_MAX_INDENT} characters"
        )
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        budget.spend(_ITEM_STEPS)
        parts.append(budget.text(part))
    return budget.text("".join(parts))


def _number(name: str) -> Callable[..., Any]:
    @pass_environment
    def call(environment: Environment, value: Any, *default: Any) -> Any:
        if len(default) > 1:  # a base, which may ask for an integer of any size
            raise TypeError(f"the filter {name} takes a default alone")
        budget_of(environment).spend(budget_of(environment).walk(value) // 4)
        result = JINJA_FILTERS[name](value, *default)
        if isinstance(result, int) and abs(result) > MAX_INTEGER:
            raise TemplateError("the chat template computes an integer beyond 64 bits")
        return result

    return call


@pass_environment
def _pairs(environment: Environment, value: Any) -> OneShot:
    if not isinstance(value, dict | Undefined):
        raise TypeError("the filter items takes an object")
    return OneShot(_items(budget_of(environment), value.items() if isinstance(value, dict) else ()))


@pass_environment
def _title(environment: Environment, value: Any) -> str:
    budget = budget_of(environment)
    text = budget.printed(value)
    budget.spend(2 * len(text))
    budget.room(3 * len(text))
    return budget.text(JINJA_FILTERS["title"](text))  # other words than str.title's


@pass_environment
def _safe(environment: Environment, value: Any) -> Markup:
    return Markup(budget_of(environment).printed(value))


FILTERS: dict[str, Callable[..., Any]] = {
    **{name: _of_text(name) for name in ("capitalize", "lower", "replace", "upper")},
    **{name: _for_each(name) for name in ("map", "reject", "rejectattr", "select", "selectattr")},
    **{name: _number(name) for name in ("float", "int")},
    **{name: JINJA_FILTERS[name] for name in ("abs", "count", "d", "default", "first", "last", "length")},
    "dictsort": _paid("dictsort", whole=dict, sorts=True),
    "format": _format,
    "indent": _indent,
    "items": _pairs,
    "join": _joined,
    "list": _list,
    "reverse": _paid("reverse", whole=str),
    "safe": _safe,
    "sort": _paid("sort", sorts=True),
    "string": _string,
    "title": _title,
    "tojson": _to_json,
    "trim": _of_text("strip"),
    "unique": _unique,
}


# Tests


def _comparison(symbol: str) -> Callable[..., bool]:
    @pass_environment
    def call(environment: Environment, value: Any, other: Any) -> bool:
        return budget_of(environment).compared(value, symbol, other)

    return call


def _parity(remainder: int) -> Callable[..., bool]:
    def call(value: Any) -> bool:
        if not isinstance(value, int | float):  # of a text Jinja's own computes `text % 2`, which formats it
            raise TypeError("odd and even are for numbers")
        return value % 2 == remainder

    return call


_PLAIN_TESTS: tuple[str, ...] = ("boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none")
_PLAIN_TESTS += ("number", "sameas", "sequence", "string", "true", "undefined")
_COMPARISONS = {"eq": "eq == equalto", "ne": "ne !=", "lt": "lt < lessthan", "lteq": "le <=", "gt": "gt > greaterthan"}
_COMPARISONS |= {"gteq": "ge >=", "in": "in"}

TESTS: dict[str, Callable[..., Any]] = {
    **{name: JINJA_TESTS[name] for name in _PLAIN_TESTS},
    **{name: _comparison(symbol) for symbol, names in _COMPARISONS.items() for name in names.split()},
    "odd": _parity(1),
    "even": _parity(0),
}


# Functions


@pass_environment
def _range(environment: Environment, *arguments: int) -> range:
    result = range(*arguments)
    if len(result) > MAX_RANGE:
        raise TemplateError(f"the chat template counts to {len(result):,}; the limit is {MAX_RANGE:,}")
    return result


@pass_environment
def _dict(environment: Environment, pairs: Any = (), /, **named: Any) -> dict[Any, Any]:
    budget = budget_of(environment)
    budget.walk(pairs)
    budget.spend(8 + 4 * len(named))
    pairs = pairs.items() if isinstance(pairs, dict | Undefined) else pairs
    return {**{budget.key(key): value for key, value in pairs}, **named}


@pass_environment
def _namespace(environment: Environment, pairs: Any = (), /, **named: Any) -> Namespace:
    return Namespace(_dict(environment, pairs, **named))


@pass_environment
def _raise_exception(environment: Environment, message: object = "") -> NoReturn:
    text = budget_of(environment).printed(message)
    raise RequestError(f"the chat template refuses these messages: {one_line(text)}")


def now() -> datetime:
    """The clock of strftime_now."""
    return datetime.now()


@pass_environment
def _strftime_now(environment: Environment, format: str) -> str:
    budget_of(environment).spend(32)
    if len(format) > 200:
        raise TemplateError(f"the chat template calls strftime_now with a format of {len(format)} characters")
    return now().strftime(format)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}

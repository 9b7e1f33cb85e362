"""Runs a chat template, which is code from a download, with bounded steps, memory and reach.

Jinja compiles the template after its syntax tree was checked against a list of what may appear, and every block was
given a first statement that pays for it (chat_budget.py). What a template may touch is listed in chat_builtins.py;
nothing else exists for it: no Python attribute, no loader, no file.

The limits are counts and no clock: what renders once renders on every machine. They are such that no template takes a
second or 64 MiB, and several times what published ones need (the longest: 20,000 characters, 3,000 tokens, 15 levels).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import Undefined, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llama_fast.errors import LlamaFastError, TemplateError
from llama_fast.tokenizer.chat_budget import MAX_INTEGER, MAX_TEXT, Budget, one_line
from llama_fast.tokenizer.chat_builtins import FILTERS, FUNCTIONS, METHODS, TESTS

MAX_SOURCE = 256 * 1024  # characters
MAX_TOKENS = 10_000  # without white space; the time to compile grows faster than the source
MAX_NAMES = 200  # that get values: Jinja passes those of a loop to every call in it
MAX_DEPTH = 100  # of the syntax tree: the compilers of Jinja and Python call themselves for each level
MAX_CALLS = 64  # of macros inside one another, which walk JSON schemas

_LOOP_ATTRIBUTES = frozenset(["depth", "depth0", "first", "index", "index0", "last", "length"])
_LOOP_ATTRIBUTES |= {"nextitem", "previtem", "revindex", "revindex0"}

# Steps for what takes longer or makes more than the other nodes, which take one.
_STEPS: dict[type[nodes.Node], int] = {nodes.Call: 8, nodes.CallBlock: 16, nodes.Dict: 16, nodes.Filter: 4}
_STEPS |= {nodes.For: 8, nodes.List: 5, nodes.Macro: 16, nodes.Tuple: 5, nodes.Pair: 4, nodes.Test: 4}
_STEPS |= {nodes.Compare: 4, nodes.Concat: 4}

_ALLOWED: tuple[type[nodes.Node], ...] = (nodes.Assign, nodes.AssignBlock, nodes.BinExpr, nodes.Break, nodes.Call)
_ALLOWED += (nodes.CallBlock, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const, nodes.Continue, nodes.Dict)
_ALLOWED += (nodes.Filter, nodes.FilterBlock, nodes.For, nodes.Getattr, nodes.Getitem, nodes.If, nodes.Keyword)
_ALLOWED += (nodes.List, nodes.Macro, nodes.Name, nodes.NSRef, nodes.Operand, nodes.Output, nodes.Pair, nodes.Scope)
_ALLOWED += (nodes.Slice, nodes.Template, nodes.TemplateData, nodes.Test, nodes.Tuple, nodes.UnaryExpr, nodes.With)

# What Python code inside a template raises when it meets a value that it was not written for; a tree too deep for
# Python's compiler gives MemoryError or SyntaxError.
_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of the template `source`; `variables` are plain JSON values.

    Raises:
        RequestError: the template called raise_exception.
        TemplateError: the template is malformed, fails, uses what is not allowed, or goes beyond a limit.
    """
    try:
        code = _compiled(source)
        environment = _Sandbox(_num_characters(variables))
        template = jinja2.Template.from_code(environment, code, environment.globals)
        parts, length = [], 0
        # Not template.render, which would rebuild tracebacks through the template's source.
        for part in template.root_render_func(template.new_context(dict(variables))):
            parts.append(part)
            length += len(part)
            if length > MAX_TEXT:
                raise TemplateError(f"the chat template writes more than {MAX_TEXT:,} characters")
        return "".join(parts)
    except LlamaFastError:
        raise
    except jinja2.TemplateSyntaxError as cause:
        message = f"the chat template is malformed at line {cause.lineno}: {one_line(cause.message)}"
    except (jinja2.TemplateError, *_FAILURES) as cause:
        message = f"the chat template failed: {type(cause).__name__}: {one_line(cause)}"
    raise TemplateError(message)


def _num_characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_num_characters, value)) + sum(map(_num_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_num_characters, value))
    return len(value) if isinstance(value, str) else 0


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> CodeType:
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source):,} characters; the limit is {MAX_SOURCE:,}")
    if any(len(word[0]) > 400 for word in re.finditer(r"\d\w*", source)):  # Jinja's lexer and int() take long for it
        raise TemplateError("the chat template has a number of more than 400 digits")
    environment = _Sandbox()
    tokens = (kind for _, kind, _ in environment.lex(source) if kind != "whitespace")
    if any(count >= MAX_TOKENS for count, _ in enumerate(tokens)):
        raise TemplateError(f"the chat template has more than {MAX_TOKENS:,} tokens")
    tree = environment.parse(source)
    if len(_assigned(tree.body)) > MAX_NAMES:
        raise TemplateError(f"the chat template sets more than {MAX_NAMES} variables")
    _Guard().visit(tree)
    tree.set_environment(environment)
    return environment.compile(tree, filename="<chat template>")


def _assigned(body: list[nodes.Node]) -> set[str]:
    found = (name for part in body for name in [part, *part.find_all(nodes.Name)] if isinstance(name, nodes.Name))
    return {name.name for name in found if name.ctx != "load"}


class _Method:
    """A method of a plain value, looked up by the template and not yet called."""

    def __init__(self, function: Callable[..., Any], value: Any) -> None:
        self.function, self.value = function, value


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012, declared mutable by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The world of one rendering. Jinja calls these methods for all that a template does with values."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, characters_given: int = 0) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else constants would be computed while compiling, before any step is counted
            finalize=self._printed,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        self.budget = budget = Budget(characters_given)
        self.calls = 0
        self.globals = dict(FUNCTIONS)
        self.tests = dict(TESTS)
        # The names with a space, which no template can write, are what `_Guard` puts into the tree.
        self.filters = {**FILTERS, " spend": budget.spend, " tested": self._tested, " key": budget.key}
        self.filters |= {" slice": budget.sliced, " concat": budget.concatenated, " compare": budget.compared}

    @pass_context  # which also keeps Jinja from calling it while compiling
    def _printed(self, context: Context, value: Any) -> str:
        return self.budget.printed(value)

    def _tested(self, value: Any, steps: int) -> Any:
        self.budget.spend(steps)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return self.budget.arithmetic(operator, left, right)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """For map: its filter's name is a value, which the tree did not show."""
        if self.budget.key(name) not in FILTERS:
            raise TemplateError(f"the chat template uses the filter {one_line(name)}, which is not allowed")
        return super().call_filter(name, *args, **kwargs)

    def call_test(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """For select and its like."""
        if self.budget.key(name) not in TESTS:
            raise TemplateError(f"the chat template uses the test {one_line(name)}, which is not allowed")
        return super().call_test(name, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if attribute in METHODS.get(kind, ()):
            return _Method(METHODS[kind][attribute], obj)
        if kind is dict and not hasattr(dict, attribute):
            return obj[attribute] if attribute in obj else self._missing(obj, attribute)
        if kind is LoopContext and attribute in _LOOP_ATTRIBUTES:
            return getattr(obj, attribute)
        if kind in (Namespace, Undefined) and not attribute.startswith("__"):
            return super().getattr(obj, attribute)
        if attribute.startswith("__") or hasattr(obj, attribute):
            self.unsafe_undefined(obj, attribute)
        return self._missing(obj, attribute)

    def _missing(self, obj: Any, name: Any) -> Undefined:
        return self.undefined(obj=obj, name=name[:100] if isinstance(name, str) else self.budget.key(name))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise TemplateError(
            f"the chat template uses the attribute {one_line(attribute)} of a {type(obj).__name__}, which is not there"
        )

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, Undefined):
            return obj[argument]  # raises, and says what is not defined
        if isinstance(obj, dict | list | tuple | str | range):
            try:
                return obj[self.budget.key(argument)]
            except (TypeError, LookupError):
                pass
        return self.getattr(obj, argument) if isinstance(argument, str) else self._missing(obj, argument)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(obj, _Method):
            for name in ("_loop_vars", "_block_vars"):  # Jinja's own, for functions that take a context
                kwargs.pop(name, None)
            return obj.function(self.budget, obj.value, *args, **kwargs)
        if not isinstance(obj, Macro | Undefined) and obj not in FUNCTIONS.values():
            raise TemplateError(f"the chat template calls a {type(obj).__name__}, which is not allowed")
        if self.calls == MAX_CALLS:
            raise TemplateError(f"the chat template calls macros more than {MAX_CALLS} deep")
        self.calls += 1
        try:
            return context.call(obj, *args, **kwargs)
        finally:
            self.calls -= 1


class _Guard:
    """Checks a syntax tree and puts into it what pays for each block, and what stands for operations that Jinja would
    compile to bare Python."""

    def __init__(self) -> None:
        self._steps = 0  # of the block being visited
        self._depth = 0

    def visit(self, node: nodes.Node) -> nodes.Node:
        self._check(node)
        self._steps += _STEPS.get(type(node), 1)
        self._depth += 1
        for field, value in node.iter_fields():
            if field == "body" or (field == "else_" and value):
                setattr(node, field, self._block(value, node))
            elif field == "test" and isinstance(node, nodes.For) and value is not None:
                (test,), steps = self._counted([value])
                setattr(node, field, _filter(node, test, " tested", nodes.Const(steps)))
            elif isinstance(value, list):
                setattr(node, field, [self.visit(item) if isinstance(item, nodes.Node) else item for item in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, self.visit(value))
        self._depth -= 1
        return self._replaced(node)

    def _block(self, body: list[nodes.Node], owner: nodes.Node) -> list[nodes.Node]:
        names = _assigned(body)
        body, steps = self._counted(body)
        # What each run of it does besides: a macro's arguments and their defaults, a loop's names.
        heads = [*getattr(owner, "args", ()), *getattr(owner, "defaults", ()), getattr(owner, "target", None)]
        steps += 5 * sum(1 + len(list(head.find_all(nodes.Node))) for head in heads if head is not None)
        steps += len(names) // 4  # Jinja writes down that they have no value yet
        pay = _filter(owner, nodes.Const(steps), " spend")
        return [nodes.ExprStmt(pay, lineno=owner.lineno), *body]

    def _counted(self, parts: list[nodes.Node]) -> tuple[list[nodes.Node], int]:
        outer, self._steps = self._steps, 1
        visited = [self.visit(part) for part in parts]
        steps, self._steps = self._steps, outer
        return visited, steps

    def _check(self, node: nodes.Node) -> None:
        problem = None
        if not isinstance(node, _ALLOWED):
            problem = f"has {{% {type(node).__name__.lower()} %}}"
        elif self._depth >= MAX_DEPTH:
            problem = f"is nested more than {MAX_DEPTH} deep"
        elif isinstance(node, nodes.For) and node.recursive:
            problem = "has a recursive loop"
        elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
            problem = f"uses the filter {one_line(node.name)}"
        elif isinstance(node, nodes.Test) and node.name not in TESTS:
            problem = f"uses the test {one_line(node.name)}"
        elif getattr(node, "dyn_args", None) or getattr(node, "dyn_kwargs", None):
            problem = "passes * or ** arguments"
        elif isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > MAX_INTEGER:
            problem = "has a number beyond 64 bits"  # Jinja compiles infinity to a name
        elif isinstance(node, nodes.TemplateData):
            self._steps += len(node.data) // 4
        if problem is not None:
            raise TemplateError(f"the chat template {problem} at line {node.lineno}, which is not allowed")

    def _replaced(self, node: nodes.Node) -> nodes.Node:
        match node:
            case nodes.Concat():
                return _filter(node, node.nodes[0], " concat", *node.nodes[1:])
            case nodes.Getitem(arg=nodes.Slice() as bounds):
                parts = (part or nodes.Const(None) for part in (bounds.start, bounds.stop, bounds.step))
                return _filter(node, node.node, " slice", *parts)
            case nodes.Compare():
                rest = [part for operand in node.ops for part in (nodes.Const(operand.op), operand.expr)]
                return _filter(node, node.expr, " compare", *rest)
            case nodes.Pair(key=key) if not isinstance(key, nodes.Const):
                node.key = _filter(node, key, " key")
        return node


def _filter(origin: nodes.Node, value: nodes.Node, name: str, *arguments: nodes.Node) -> nodes.Filter:
    made = nodes.Filter(value, name, list(arguments), [], None, None)
    made.set_lineno(origin.lineno)
    return made

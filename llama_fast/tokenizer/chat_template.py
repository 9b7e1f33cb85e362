"""Chat templates: a conversation to one prompt string, by the Jinja source a checkpoint ships.

Rendering follows Hugging Face's conventions, on which published templates rely: blocks are trimmed, `tojson` does not
escape HTML, `raise_exception` and `strftime_now` exist, `{% break %}` works, `{% generation %}` marks assistant text
(here it only opens a scope), and a message's keys with a null value are left out. A template is code from a download,
so it runs in Jinja's immutable sandbox and sees nothing but plain JSON data; text inside messages is data and is never
evaluated.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_fast.errors import RequestError, TemplateError, TokenizerFileError

_DEFAULT = "default"
_TEMPLATE_FILE = "chat_template.jinja"
_NAMED_TEMPLATE_FOLDER = "additional_chat_templates"

# Ends in a space: whether the space survives tells whether the template trims what it is given.
_CONTINUE_HERE = "<<continue the final message here>> "

# What Python code inside a template raises when it meets a value that it was not written for.
_EVALUATION_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of a checkpoint folder by name; the unnamed one is "default".

    chat_template.jinja and additional_chat_templates/<name>.jinja, when there is any, replace `chat_template` of
    tokenizer_config.json, which is one source or a list of `{"name", "template"}`.

    Raises:
        TokenizerFileError: a file cannot be read as UTF-8.
        TemplateError: `chat_template` in tokenizer_config.json has another shape.
    """
    files = {path.stem: path for path in sorted((folder / _NAMED_TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).is_file():
        files[_DEFAULT] = folder / _TEMPLATE_FILE
    if files:
        return {name: _read_text(path) for name, path in files.items()}

    entry = config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    try:
        templates = {item["name"]: item["template"] for item in entry}
    except (TypeError, KeyError):
        templates = {}
    if not templates or not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TemplateError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            '{"name": string, "template": string}; fix it or put the template into chat_template.jinja'
        )
    return templates


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> list[Path]:
    """Writes the files that `read_chat_templates` reads; returns their paths. A name that is a path is refused."""
    paths = []
    for name, source in templates.items():
        if name != Path(name).name:
            raise TemplateError(f"the chat template name {name!r:.80} is no file name; rename it before saving")
        path = folder / _TEMPLATE_FILE if name == _DEFAULT else folder / _NAMED_TEMPLATE_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8", newline="")
        paths.append(path)
    return paths


def choose_template(templates: Mapping[str, str], asked: str | None, *, with_tools: bool) -> str:
    """Source of the template to use: `asked` is a name in `templates` or a source itself; with None it is "tool_use"
    when there are tools and such a template, else "default".

    Raises:
        TemplateError: there is no template, or several and none is named "default".
    """
    if asked is not None:
        return templates.get(asked, asked)
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if _DEFAULT in templates:
        return templates[_DEFAULT]
    if templates:
        raise TemplateError(f'no chat template is named "default"; pass chat_template= one of {sorted(templates)}')
    raise TemplateError(
        "this tokenizer has no chat template; pass chat_template=<Jinja source>, or encode the prompt as plain text"
    )


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> str:
    """The prompt for `messages`.

    Args:
        source: Jinja source.
        messages: `{"role": ..., "content": ...}` each, oldest first; further keys reach the template as they are.
        add_generation_prompt: end with the header of an assistant message. False with `continue_final_message`.
        continue_final_message: end inside the final message, so that the model goes on writing it.
        tools, documents: JSON schemas of functions, and texts, for templates that know them.
        variables: further names the template may use (`bos_token`, `date_string`, ...).

    Raises:
        RequestError: the messages are malformed, or the template refuses them by `raise_exception`.
        TemplateError: the template has a syntax error, fails, leaves the sandbox, or drops the message to continue.
    """
    conversation = _plain_messages(messages)
    final_text = _mark_final_text(conversation[-1]) if continue_final_message else ""
    names = {
        **_plain("template variable", variables),
        "messages": conversation,
        "tools": _plain("tools", tools),
        "documents": _plain("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        prompt = _compile(source).render(names)
    except (RequestError, TemplateError):
        raise
    except (jinja2.TemplateError, *_EVALUATION_ERRORS) as cause:
        raise TemplateError(f"the chat template failed: {type(cause).__name__}: {cause}") from cause
    if not continue_final_message:
        return prompt

    cut = prompt.rfind(_CONTINUE_HERE.rstrip())
    if cut < 0 or final_text.strip() not in prompt[:cut]:
        raise TemplateError("continue_final_message: the chat template does not render the final message verbatim")
    return prompt[:cut] if prompt.startswith(_CONTINUE_HERE, cut) else prompt[:cut].rstrip()


def _plain(what: str, value: Any) -> Any:
    """`value` rebuilt of JSON types alone: objects have methods, and the sandbox cannot know which of them are safe."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as cause:
        raise RequestError(f"{what}: only JSON values can be given to a chat template; {cause}") from cause


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(
            'messages must be a non-empty list of {"role": ..., "content": ...}; '
            f"got {'an empty one' if messages in ([], ()) else type(messages).__name__}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f'messages[{index}] must be an object with a string "role"; got {message!r:.80}')
    plain = (_plain(f"messages[{index}]", dict(message)) for index, message in enumerate(messages))
    return [{key: value for key, value in message.items() if value is not None} for message in plain]


def _mark_final_text(message: dict[str, Any]) -> str:
    """Appends the marker to the last text of `message`; returns that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_HERE
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _CONTINUE_HERE
            return text
    raise RequestError("continue_final_message: the final message has no text content to continue")


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012, declared mutable by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as cause:
        raise TemplateError(f"the chat template is malformed at line {cause.lineno}: {cause.message}") from cause
    except (SyntaxError, RecursionError) as cause:  # the Python code Jinja made of it does not compile
        raise TemplateError(f"the chat template cannot be compiled: {cause}") from cause


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which the models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise RequestError(f"the chat template refuses these messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise TokenizerFileError(f"{path} cannot be read as UTF-8 text: {cause}") from cause

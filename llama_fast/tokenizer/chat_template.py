"""Chat templates: a conversation to one prompt, by the Jinja source a checkpoint ships.

Rendering follows Hugging Face's conventions, on which published templates rely: blocks are trimmed, `tojson` does not
escape HTML, `raise_exception` and `strftime_now` exist, `{% break %}` works, `{% generation %}` marks assistant text
(here it only opens a scope), and a message's keys with a null value are left out. A template runs in a sandbox
(chat_sandbox.py) and sees nothing but plain JSON data; text inside messages is data and is never evaluated.

Which roles there are, and in which order, is the template's business: what it refuses by `raise_exception` is a
RequestError, what it renders is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_fast.errors import RequestError, TemplateError, TokenizerFileError, listed, shown
from llama_fast.files import MAX_DEPTH, read_file, written_whole
from llama_fast.tokenizer.chat_budget import one_line
from llama_fast.tokenizer.chat_builtins import FUNCTIONS
from llama_fast.tokenizer.chat_sandbox import MAX_SOURCE, render

_DEFAULT = "default"
_TEMPLATE_FILE = "chat_template.jinja"
_NAMED_TEMPLATE_FOLDER = "additional_chat_templates"

_MAX_PARTS = 10_000  # of one message's content
_RESERVED = frozenset(["messages", "tools", "documents", "add_generation_prompt", *FUNCTIONS])

# A private character and a space: whether the space survives tells whether the template trims what it is given.
_CONTINUE_HERE = "\U000ffffd "


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates of a checkpoint folder by name; the unnamed one is "default".

    chat_template.jinja and additional_chat_templates/<name>.jinja, when there is any, replace `chat_template` of
    tokenizer_config.json, which is one source or a list of `{"name", "template"}`.

    Raises:
        TokenizerFileError: a file cannot be read, is too large or not UTF-8.
        TemplateError: `chat_template` in tokenizer_config.json has another shape, or two templates have one name.
    """
    files = {path.stem: path for path in sorted((folder / _NAMED_TEMPLATE_FOLDER).glob("*.jinja"))}
    if (folder / _TEMPLATE_FILE).exists():
        files[_DEFAULT] = folder / _TEMPLATE_FILE
    if files:
        return {name: _read_text(path) for name, path in files.items()}

    entry = config.get("chat_template")
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {_DEFAULT: entry}
    items = entry if isinstance(entry, list) else [entry]
    pairs: list[tuple[Any, Any]] = [
        (item.get("name"), item.get("template")) for item in items if isinstance(item, dict)
    ]
    if len(pairs) < len(items) or not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise TemplateError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            '{"name": string, "template": string}; fix it or put the template into chat_template.jinja'
        )
    templates = dict(pairs)
    if len(templates) < len(pairs):
        raise TemplateError(
            f"{folder / 'tokenizer_config.json'}: chat_template has two templates of one name, and which one is meant "
            f"is not known; the names are {listed(name for name, _ in pairs)}"
        )
    return templates


def write_chat_templates(folder: Path, templates: Mapping[str, str]) -> list[Path]:
    """Writes the files that `read_chat_templates` reads; returns their paths. A name that is a path is refused."""
    paths = []
    for name, source in templates.items():
        if name != Path(name).name or not name.isprintable():
            raise TemplateError(f"the chat template name '{shown(name)}' is no file name; rename it before saving")
        path = folder / _TEMPLATE_FILE if name == _DEFAULT else folder / _NAMED_TEMPLATE_FOLDER / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(source, encoding="utf-8", newline="")
        paths.append(path)
    return paths


def choose_template(templates: Mapping[str, str], asked: str | None, *, with_tools: bool) -> str:
    """Source of the template to use: `asked` is a name in `templates` or a source itself; with None it is "tool_use"
    when there are tools and such a template, else "default".

    Raises:
        TemplateError: there is no template, or several and none is named "default". (Of this kind is all that is wrong
            with templates, wherever they come from.)
        RequestError: `asked` is not a string.
    """
    if asked is not None:
        if not isinstance(asked, str):
            raise RequestError(f"chat_template must be a name or a Jinja source; got {type(asked).__name__}")
        return templates.get(asked, asked)
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if _DEFAULT in templates:
        return templates[_DEFAULT]
    if templates:
        raise TemplateError(
            f'no chat template is named "default"; pass chat_template= one of these names: {listed(sorted(templates))}'
        )
    raise TemplateError(
        "this tokenizer has no chat template; pass chat_template=<Jinja source>, or encode the prompt as plain text"
    )


class Chat:
    """A conversation, checked, and the template that renders it."""

    def __init__(
        self,
        source: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any],
        tokens: Mapping[str, str],
    ) -> None:
        """
        Args:
            source: Jinja source.
            messages: `{"role": ..., "content": ...}` each, oldest first; further keys reach the template as they are.
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: end inside the final message, so that the model goes on writing it.
            tools, documents: JSON schemas of functions, and texts, for templates that know them.
            variables: further names the template may use (`date_string`, ...).
            tokens: special tokens by name (`bos_token`, ...); unlike all else they may become ids.

        Raises:
            RequestError: an argument is malformed; the message names the field.
        """
        if reserved := _RESERVED & variables.keys():
            raise RequestError(f"{listed(sorted(reserved))}: a template variable cannot have this name")
        self._source = source
        self._fixed = {**_plain("token", dict(tokens)), "add_generation_prompt": add_generation_prompt}
        self.given = {
            **_plain("template variable", dict(variables)),
            "messages": _plain_messages(messages),
            "tools": _plain("tools", tools),
            "documents": _plain("documents", documents),
        }
        self._continued = continue_final_message
        if continue_final_message:
            _final_text(self.given["messages"])

    def text(self, change: Callable[[str], str] | None = None) -> str:
        """The prompt; with `change` the one for the conversation in which every text was changed by it.

        Raises:
            RequestError: the template refuses the messages by `raise_exception`.
            TemplateError: the template is malformed, fails, leaves the sandbox, or drops the message to continue.
        """
        given = self.given if change is None else _changed(self.given, change)
        if not self._continued:
            return self._rendered(given)
        given = _changed(given, str)  # the marker is for this rendering alone
        final_text, holder, key = _final_text(given["messages"])
        holder[key] = final_text + _CONTINUE_HERE
        prompt = self._rendered(given)
        cut = prompt.rfind(_CONTINUE_HERE.rstrip())
        if cut < 0 or final_text.strip() not in prompt[:cut]:
            raise TemplateError("continue_final_message: the chat template does not render the final message verbatim")
        return prompt[:cut] if prompt.startswith(_CONTINUE_HERE, cut) else prompt[:cut].rstrip()

    def _rendered(self, given: Mapping[str, Any]) -> str:
        try:
            return render(self._source, {**self._fixed, **given})
        except RequestError as refusal:
            roles = [message["role"] for message in given["messages"]]
            if "system" not in roles[1:]:
                raise
            # The usual reason, which the template's own words seldom tell.
            index = roles.index("system", 1)
            raise RequestError(f"{refusal} (messages[{index}].role is 'system' after others)") from None


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every text, keys included, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return value


def _plain(what: str, value: Any) -> Any:
    """`value` rebuilt of JSON types alone: objects have methods, and the sandbox cannot know which of them are safe."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogates
        plain = json.loads(text, parse_int=_integer)
    except RecursionError:
        plain = None
    except (TypeError, ValueError) as cause:
        raise RequestError(f"{what}: only JSON values can be given to a chat template; {one_line(cause)}") from cause
    if plain is None is not value or _deeper_than(plain, MAX_DEPTH):
        raise RequestError(f"{what} is nested more than {MAX_DEPTH} deep")
    return plain


def _integer(digits: str) -> int:
    if len(digits) > 100:
        raise ValueError("an integer has more than 100 digits")
    return int(digits)


def _deeper_than(value: Any, limit: int) -> bool:
    if limit == 0:
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_deeper_than(item, limit - 1) for item in inner if isinstance(item, dict | list))


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(
            'messages must be a non-empty list of {"role": ..., "content": ...}; '
            f"got {'an empty one' if messages in ([], ()) else type(messages).__name__}"
        )
    return [_plain_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _plain_message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'{name} must be an object with a "role" and a "content"; got {type(message).__name__}')
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RequestError(f"{name}.role must be a string that is not empty; got {type(message.get('role')).__name__}")
    content = message.get("content")
    if isinstance(content, list | tuple) and len(content) > _MAX_PARTS:
        raise RequestError(f"{name}.content has {len(content):,} parts; the limit is {_MAX_PARTS:,}")
    plain = _plain(name, {key: value for key, value in message.items() if value is not None})
    if plain.keys() == {"role"}:
        raise RequestError(f"{name}.content is missing")
    content = plain.get("content", "")
    if not isinstance(content, str | list | dict):
        raise RequestError(f"{name}.content must be a string or a list of parts; got {content!r:.80}")
    for index, part in enumerate(content if isinstance(content, list) else []):
        if not isinstance(part, str | dict):
            raise RequestError(f"{name}.content[{index}] must be an object or a string; got {type(part).__name__}")
    return dict(plain)


def _final_text(messages: list[dict[str, Any]]) -> tuple[str, dict[str, Any], str]:
    """The last text of the last message, the object that holds it, and under which key."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        return content, messages[-1], "content"
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return part["text"], part, "text"
    raise RequestError("continue_final_message: the final message has no text content to continue")


def _read_text(path: Path) -> str:
    content = read_file(path, TokenizerFileError, max_bytes=4 * MAX_SOURCE)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise TokenizerFileError(f"{path}: is not UTF-8: byte {cause.start} is 0x{content[cause.start]:02x}") from cause

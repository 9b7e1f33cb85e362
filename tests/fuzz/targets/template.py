"""A chat template's source. What is rendered is what Jinja, set up as transformers sets it up, makes of it."""

import json
import random
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Scope
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_fast.errors import RequestError, TemplateError
from tests.bad_inputs.harness import CheckFailedError, check
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.target import Target as Base
from tests.fuzz.template_source import block, output, statement
from tests.tokenizer_samples import built

MAX_PROMPT = 4 << 20
MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "  Hi \n é {{ 7 * 7 }}</s> "},
    {
        "role": "assistant",
        "content": "Hello.",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5]}}}],
    },
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
]
LLAMA_2 = """\
{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = \
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + \
'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | string | trim + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """\
{{- bos_token }}
{%- if tools is not none and tools is defined %}{{ tools | tojson(indent=4) }}{% endif %}
{%- set ns = namespace(count=0) %}
{%- macro header(role) -%}<|start_header_id|>{{ role }}<|end_header_id|>{{ "\\n\\n" }}{%- endmacro %}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {{- header(message['role']) }}
    {%- if message.content is string %}{{ message['content'] | trim }}
    {%- elif message.content is mapping or message.content is iterable %}
        {%- for part in message.content %}{{ part.text | default('?') }}{% endfor %}
    {%- else %}{{ message.content }}{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson }},{% endfor %}
        {%- endfor %}
    {%- endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}"""


class Target(Base):
    refusals = (RequestError, TemplateError)

    def __init__(self) -> None:
        self._tokenizer = built("llama3")
        self._jinja = jinja_environment()

    def make(self, rng: random.Random) -> str:
        if rng.random() < 0.6:
            source = block(rng, rng.choice((1, 2, 3, 4)))
        else:  # a published one, in which something is put or replaced
            source = rng.choice((LLAMA_2, LLAMA_3))
            for _ in range(rng.choice((1, 1, 2))):
                at = source.find("{", rng.randrange(len(source)))
                until = at + rng.choice((0, 0, 5, 50))
                source = source[:at] + rng.choice((statement, output))(rng, 2) + source[until:]
        if rng.random() < 0.15:
            source = mutate_bytes(rng, source.encode(), (b"{{", b"}}", b"{%", b"%}", b"'", b"|", b"(", b".")).decode(
                errors=rng.choice(("replace", "surrogateescape"))
            )
        return source

    def run(self, value: str, folder: Path) -> None:
        prompt = self._render(value)
        check(isinstance(prompt, str), f"a prompt that is {type(prompt).__name__}")
        check(len(prompt) <= MAX_PROMPT, f"a prompt of {len(prompt):,} characters")
        check(" at 0x" not in prompt, f"an address in the prompt: {prompt!r:.300}")
        check(self._render(value) == prompt, "rendered twice, with two results")
        try:
            expected = self._by_jinja(value, MESSAGES)
            harmless = self._by_jinja(value, json.loads(json.dumps(MESSAGES).replace("</s>", "QZQZ")))
        except Exception as error:
            raise CheckFailedError(f"rendered as {prompt!r:.200}, where Jinja refuses: {error!r:.200}") from error
        check(prompt == expected, f"rendered as {prompt!r:.300}, by Jinja as {expected!r:.300}")
        if not 0 < len(prompt) < 10_000:
            return
        ids = self._render(value, tokenize=True)
        for token in ("<s>", "</s>"):
            found, written = ids.count(self._tokenizer.convert_tokens_to_ids(token)), harmless.count(token)
            check(
                found == written,
                f"{found} of {token} are ids, but the template itself writes {written}: {prompt!r:.300}",
            )

    def _render(self, source: str, tokenize: bool = False) -> Any:
        return self._tokenizer.apply_chat_template(
            MESSAGES, chat_template=source, tokenize=tokenize, add_generation_prompt=True
        )

    def _by_jinja(self, source: str, messages: Any) -> str:
        names = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        names |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return self._jinja.from_string(source).render(json.loads(json.dumps(names)))

    def show(self, value: str) -> bytes:
        return value.encode("utf-8", "surrogateescape")


class _Generation(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)


def jinja_environment() -> jinja2.Environment:
    """As transformers sets it up. Source: transformers.utils.chat_template_utils."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment.intercepted_binops = frozenset(environment.default_binop_table)  # else 9**9 is computed in dead code
    environment.filters["tojson"] = tojson
    # Further names are undefined, by choice: no published template uses cycler, joiner or lipsum.
    environment.globals = {name: environment.globals[name] for name in ("range", "namespace")}
    environment.globals |= {"dict": lambda *args, **named: dict(*args, **named), "raise_exception": raise_exception}
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment

"""The sandbox of chat templates: what it allows renders as in transformers, what it does not allow is refused."""
# ruff: noqa: E501 a template stands on one line

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_fast.errors import RequestError, TemplateError
from llama_fast.tokenizer import chat_budget, chat_sandbox
from llama_fast.tokenizer.chat_sandbox import render

VARIABLES = {
    "messages": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi <b>&'é😀\n a</think>b", "n": 3},
        {"role": "assistant", "content": [{"type": "text", "text": "x"}], "tool_calls": []},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"b": [1, 2.5, None], "a": True}}}],
    "text": "a-b-C d",
    "numbers": [3, 1, 2, 3],
}

# One line each: what published templates use, and what stands near it.
ALLOWED = """
{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ m.role }}{% endfor %}
{% for m in messages %}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}
{% for m in messages %}{{ loop.previtem is defined }}-{{ loop.nextitem is defined }}{{ loop.nextitem }}{% endfor %}
{% for m in messages if m.role != 'user' %}{{ m.role }}{% else %}none{% endfor %}
{% for m in [] %}x{% else %}none{% endfor %}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in range(5, -1, -2) %}{{ i }}{% endfor %}{{ range(3) | list }}{{ range(9)[2] }}{{ 5 in range(9) }}
{% for k, v in tools[0].function.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in tools[0].function | items %}{{ k }}={{ v }};{% endfor %}
{% for k, v in tools[0].function.parameters | dictsort %}{{ k }}={{ v }};{% endfor %}
{% set x = 1 %}{% for i in range(3) %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}
{% set ns = namespace(n=0, l=[]) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.n }}{{ ns.l }}
{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns.b is defined }}{{ dict(a=1, b=2) }}{{ dict([('a', 1)]) }}
{% if x %}a{% elif messages | length > 2 %}b{% else %}c{% endif %}{% if not x and (1 or 2) %}d{% endif %}
{% macro m(a, b='z', c=none) %}{{ a }}{{ b }}{{ c is none }}{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(1, c=3) }}{{ m('x') | upper }}
{% macro fact(n) %}{% if n > 1 %}{{ n }}*{{ fact(n - 1) }}{% else %}1{% endif %}{% endmacro %}{{ fact(5) }}
{% macro m(a) %}[{{ caller(a) }}]{% endmacro %}{% call(x) m(3) %}<{{ x }}>{% endcall %}
{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, a=3) }}
{% set x %}a{{ 1 + 1 }}{% endset %}{{ x }}{{ x | length }}{% set y | upper %}ab{% endset %}{{ y }}{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% filter upper %}ab{{ text }}{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}
{% generation %}{% set q = 1 %}{{ q }}{% endgeneration %}{{ q is defined }}
{# comment #}a  {%- if true -%}  b  {%- endif %}  c{% raw %}{{ x }}{% endraw %}
{{ text.split('-') }}{{ text.split() }}{{ text.split('-', 1) }}{{ text.rsplit('-', 1)[-1] }}{{ 'a\\nb'.splitlines() }}
{{ text.replace('-', '+') }}{{ text.replace('-', '', 1) }}{{ text.upper() }}{{ text.title() }}{{ text.capitalize() }}{{ text.lower() }}
{{ text.startswith('a') }}{{ text.endswith(('x', 'd')) }}{{ text.find('C') }}{{ text.count('-') }}{{ text.index('b') }}{{ text.rfind('-') }}
{{ ' x '.strip() }}|{{ ' x '.lstrip() }}|{{ ' x '.rstrip() }}|{{ 'xax'.strip('x') }}|{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}
{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}{{ 'A'.isupper() }}{{ ', '.join(['a', 'b']) }}{{ '{} {}'.format(1, 'a') }}{{ '{0}{0}{x}{{}}'.format(1, x=2) }}
{{ '%s is %d%%' % ('a', 3) }}{{ '%s' % 1.5 }}{{ '%s-%s' | format('a', [1]) }}{{ "%s" | format(messages[0].content) }}
{{ messages[0].get('role') }}{{ messages[0].get('x', 'd') }}{{ messages[0].keys() | list }}{{ messages[0].values() | list }}
{{ messages[0]['role'] }}{{ messages[-1].role }}{{ messages[0].nothing }}{{ messages[0]['nothing'] }}{{ messages[9] is defined }}{{ text.nothing }}
{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ text[1:] }}{{ text[:-1] }}{{ text[::2] }}{{ text[0] }}{{ (1, 2, 3)[1:] }}
{{ 'role' in messages[0] }}{{ 'a' in text }}{{ 1 in numbers }}{{ 'x' not in text }}{{ 'role' in messages[0].keys() }}{{ (1, 2) in [(1, 2)] }}
{{ 1 < 2 < 3 }}{{ 1 == 1.0 }}{{ 'a' != 'b' }}{{ [1] == [1] }}{{ {} == {} }}{{ messages[0] == messages[1] }}{{ 2 >= 1 }}{{ 'a' <= 'b' }}
{{ 7 // 2 }}{{ 7 % 3 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ -7 + 3 * 2 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ 1.5 + 1 }}{{ +3 }}
{{ 'a' ~ 1 ~ none ~ 2.5 ~ [1] ~ true }}{{ 'a' + 'b' }}{{ 1 if x is defined }}{{ 1 if true else 2 }}{{ none }}{{ true }}{{ 1e3 }}
{{ [1, 'a', none, {'b': (1, 2)}] }}{{ {'a': 1, 2: 'b', none: 3, 'x' ~ 'y': 4} }}{{ () }}{{ (1,) }}
{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ text | tojson }}{{ none | tojson }}{{ messages | tojson(ensure_ascii=true) }}
{{ tools[0] | tojson(separators=(',', ':'), sort_keys=true) }}{{ 1.5 | tojson }}{{ [] | tojson(indent=4) }}{{ '<é&' | tojson }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | list }}
{{ messages | map(attribute='content') | first }}{{ messages | map(attribute='x', default='d') | list }}{{ ['a', 'b'] | map('upper') | join(',') }}
{{ numbers | select('odd') | list }}{{ numbers | reject('even') | list }}{{ numbers | select('greaterthan', 1) | list }}{{ messages | selectattr('n') | list | length }}
{{ numbers | sort }}{{ numbers | sort(reverse=true) }}{{ messages | sort(attribute='role') | map(attribute='role') | list }}{{ numbers | unique | list }}
{{ numbers | join }}{{ numbers | join(', ') }}{{ messages | join('|', attribute='role') }}{{ numbers | first }}{{ numbers | last }}{{ numbers | reverse | list }}{{ text | reverse }}
{{ numbers | length }}{{ numbers | count }}{{ text | length }}{{ '5' | int + 1 }}{{ 'x' | int(7) }}{{ '2.5' | float }}{{ 'x' | float }}{{ -3 | abs }}{{ 3 | string ~ 'a' }}
{{ ' a ' | trim }}|{{ 'xax' | trim('x') }}|{{ text | upper }}{{ text | lower }}{{ text | capitalize }}{{ text | replace('-', '+') }}{{ none | trim }}
{{ x | default('d') }}{{ '' | default('d', true) }}{{ none | default('d') }}{{ x | d('e') }}{{ messages[0].y | default('f') }}
{{ 'a\\nb\\n\\nc' | indent }}{{ 'a\\nb' | indent(2, true) }}{{ 'a\\nb' | indent('>>') }}{{ '<a>' | safe }}{{ [1] | string }}{{ 'abc' | list }}
{{ x is defined }}{{ x is undefined }}{{ none is none }}{{ text is string }}{{ 1 is number }}{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}
{{ true is true }}{{ false is false }}{{ {} is mapping }}{{ [] is iterable }}{{ [] is sequence }}{{ 'a' is sequence }}{{ 3 is odd }}{{ 3 is even }}{{ x is not defined }}
{{ 1 is eq 1 }}{{ 1 is ne 2 }}{{ 1 is lt 2 }}{{ 2 is ge 2 }}{{ 1 is in [1] }}{{ none is sameas none }}{{ 'a' is equalto('a') }}
{% if messages | selectattr('role', 'equalto', 'nobody') %}generators are true{% endif %}{% set g = numbers | map('string') %}{{ g | list }}{{ g | list }}
{{ messages[1].content.split('</think>')[-1].lstrip('\\n') }}{{ messages[1].content | trim }}{{ 'é' | upper }}{{ '\\u00e9\\x41' }}
{{ text | title }}{% for i in numbers %}{{ loop.cycle('a', 'b') }}{% endfor %}{{ ['B', 'b', 'a'] | unique | list }}
{{ messages | unique(attribute='role') | list | length }}{{ ['B', 'b'] | unique(true) | list }}{{ dict(environment=1, pairs=2) }}
{% macro m(context, obj=1) %}{{ context }}{{ obj }}{% endmacro %}{{ m(context='x', obj=3) }}{{ '{pattern}'.format(pattern='q') }}
{{ numbers.index(2) }}{{ numbers.count(3) }}{{ messages.0.role }}{{ messages[0]['role'][0] }}{{ text['nothing'] }}{{ (messages[0]).role }}
""".strip().split("\n")


@pytest.mark.parametrize("template", ALLOWED)
def test_what_is_allowed_renders_as_in_transformers(template):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    expected = _compile_jinja_template(template).render(VARIABLES)
    assert expected
    assert render(template, VARIABLES) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 + 'a' }}",
        "{{ text + none }}",
        "{{ x.y.z }}",
        "{{ x + 1 }}",
        "{{ x[0] }}",
        "{{ x['a'] }}",
        "{{ x[1:] }}",
        "{{ messages[9].role }}",
        "{{ 1 | indent }}",
        "{{ '{}'.format() }}",
        "{{ '{} {0}'.format(1) }}",
        "{{ '{a}'.format(1) }}",
        "{{ '{'.format(1) }}",
        "{{ '%s %s' % 1 }}",
        "{{ x | indent }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ numbers | map('string') | length }}",
        "{{ 'a' is odd }}",
        "{{ 1 / 0 }}",
        "{{ text.index('?') }}",
        "{{ range(10**9) | list }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__ }}{{ namespace.__init__.__globals__ }}",
    ],
)
def test_what_fails_in_transformers_fails_here(template):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with pytest.raises(Exception):  # noqa: B017, jinja's, TypeError, ...
        _compile_jinja_template(template).render(VARIABLES)
    with pytest.raises(TemplateError, match="chat template"):
        render(template, VARIABLES)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% include 'x' %}", r"{% include %} at line 1"),
        ("\n{% import 'x' as y %}", r"{% import %} at line 2"),
        ("{% from 'x' import y %}", r"{% fromimport %}"),
        ("{% extends 'x' %}", r"{% extends %}"),
        ("{% block b %}{% endblock %}", r"{% block %}"),
        ("{% autoescape true %}{% endautoescape %}", "autoescape|evalcontext"),
        ("{% for a in b recursive %}{% endfor %}", "a recursive loop"),
        ("{{ 'a' | attr('b') }}", "the filter attr"),
        ("{{ ['a'] | map('attr', 'b') | list }}", "the filter attr"),
        ("{{ [-9] | map(' spend') | list }}", "the filter  ?spend"),
        ("{{ 'a' | center(9) }}", "the filter center"),
        ("{{ 'a' is escaped }}", "the test escaped"),
        ("{{ 'a'.center(9) }}", "the attribute center of a str"),
        ("{{ 'a'.encode() }}", "the attribute encode"),
        ("{{ ''.format_map({}) }}", "the attribute format_map"),
        ("{{ ''.__class__ }}", "the attribute __class__ of a str"),
        ("{{ ''['__class__'] }}", "the attribute __class__ of a str"),
        ("{{ (1).real }}", "the attribute real"),
        ("{% macro m() %}{% endmacro %}{{ m.name }}", "the attribute name of a Macro"),
        ("{% set ns = namespace(_x=1) %}{{ ns._x }}", "the attribute _x"),
        ("{% for i in [1] %}{{ loop._iterable }}{% endfor %}", "the attribute _iterable"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ cycler.__init__ }}", "the attribute __init__"),
        ("{{ joiner.x }}", "'joiner' is undefined"),
        ("{{ messages[0]() }}", "calls a dict"),
        ("{{ range }}", "writes a function"),
        ("{{ messages[0].items }}", "writes a _Method"),
        ("{{ numbers | map('string') }}", "writes a OneShot"),
        ("{{ messages[0].items() }}", "writes a dict_items"),
        ("{{ self }}", "writes a TemplateReference"),
        ("{{ loop_.x }}{% for i in [1] %}{{ loop }}{% endfor %}", "undefined|LoopContext"),
        ("{{ range(*numbers) }}", r"\* or \*\* arguments"),
        ("{{ dict(**messages[0]) }}", r"\* or \*\* arguments"),
        ("{{ {numbers: 1} }}", "a list as a key"),
        ("{{ {(1, 2): 1} }}", "a tuple as a key"),
        ("{{ '%5d' % 1 }}", "by % with more than"),
        ("{{ '{:>9}'.format(1) }}", "format with more than"),
        ("{{ '{0.x}'.format(1) }}", "format with more than"),
        ("{{ ('a' | safe) + 'b' }}", r"Markup \+ str"),
        ("{{ ('a' | safe) ~ 'b' }}", "safe"),
        ("{{ 2 ** 65 }}", "power 65"),
        ("{{ 2 ** 64 }}", "beyond 64 bits"),
        ("{{ 99999999999999999999 }}", "beyond 64 bits"),
        ("{{ 1e999 }}", "a number beyond 64 bits"),
        ("{{ ('9' * 30) | int }}", "an integer beyond 64 bits"),
        ("{{ numbers | map('nothing') | list }}", "the filter nothing"),
        ("{{ numbers | select('nothing') | list }}", "the test nothing"),
        ("{{ messages | sort(attribute='role,n') }}", "sort takes one attribute"),
        ("".join(f"{{% set a{i} = 1 %}}" for i in range(201)), "more than 200 variables"),
        ("{{ 9" + "0" * 500 + " }}", "more than 400 digits"),
        ("{{ 'a' * 5000000 }}", "5,000,000 characters"),
        ("{{ range(100001) | list }}", "counts to 100,001"),
        ("{{ 'a' | indent(65) }}", "indents by more than 64"),
        ("{{ 1 | tojson(indent=65) }}", "tojson"),
        ("{{ strftime_now('%d' * 101) }}", "format of 202 characters"),
        ("{% for m in messages %}", "malformed at line 1"),
        ("{{ 'x' | nothing }}", "filter"),
        ("{% nothing %}", "malformed at line 1: .*'nothing'"),
        ("x" * (256 * 1024 + 1), "262,145 characters; the limit is 262,144"),
        ("{{ a }}" * 4000, "more than 10,000 tokens"),
        ("{% if a %}" * 110 + "{% endif %}" * 110, "nested more than 100 deep"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}", "macros more than 64 deep"),
        ("{% for i in range(100000) %}{% for j in range(99) %}{% endfor %}{% endfor %}", "2,000,000 steps"),
        ("{{ ('a' * 4000000 ~ 'b') * 2 }}", "8,000,002 characters"),
        ("{% for i in range(9) %}{{ 'a' * 999999 }}{% endfor %}", "writes more than 4,194,304 characters"),
        (
            "{% set ns = namespace(l=[]) %}{% for i in range(65) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
            "64 deep",
        ),
        ("{% for i in range(99) %}{% set x = 'a' * 4000000 %}{% endfor %}", "too much text"),
        ("{% for i in [1, 2] %}{% set m = loop | reject('none') %}{% endfor %}", "gives its loop to a filter"),
        ("{{ dict(x) }}", "'x' is undefined"),
    ],
)
def test_what_is_refused(template, message):
    with pytest.raises(TemplateError, match=message):
        render(template, VARIABLES)


def test_a_message_is_one_printable_line():
    for template in (
        "{{ (1)[range].x }}",
        "{{ raise_exception('a\n\tb\x1b[31m\u202e' ~ 'x' * 9999) }}",
        "{{ {}['" + "\x07" * 9999 + "'].x }}",
    ):
        with pytest.raises((RequestError, TemplateError)) as raised:
            render(template, {})
        assert str(raised.value).isprintable()
        assert " at 0x" not in str(raised.value)
        assert len(str(raised.value)) < 700


@pytest.mark.parametrize("limit", ["MAX_STEPS", "MAX_TEXT_BYTES", "MAX_TEXT"])
def test_limits_hold_by_themselves(monkeypatch, limit):
    """Negative control of the tests above: the same template is refused only because of the limit."""
    template = "{% for i in range(200) %}{% set x = 'a' * 999 %}{{ x }}{% endfor %}"
    assert len(render(template, {})) == 200 * 999
    for module in (chat_budget, chat_sandbox):
        if hasattr(module, limit):
            monkeypatch.setattr(module, limit, 1000)
    with pytest.raises(TemplateError):
        render(template, {})


def test_the_text_allowance_grows_with_the_conversation():
    template = "{% for i in range(30) %}{% set x = text + 'b' %}{% endfor %}"
    assert render(template, {"text": "a" * 4_000_000}) == ""
    with pytest.raises(TemplateError, match="too much text"):
        render(template.replace("text", "('a' * 4000000)"), {})


def test_steps_do_not_depend_on_the_depth_of_the_caller():
    def deeper(levels):
        return deeper(levels - 1) if levels else render("{% if a %}" * 90 + "{% endif %}" * 90, {})

    assert deeper(0) == deeper(200) == ""


_WORDS = """{% %} {{ }} {# #} for endfor if endif in set macro endmacro m ( ) [ ] . , | ~ + * ** % // = == < 'a' 1 9 messages
loop namespace range tojson join map not and is string raw endraw - call endcall filter upper"""


@given(st.lists(st.sampled_from(_WORDS.split()), max_size=40))
@example(["{{", "{{"])
def test_any_source_renders_or_is_refused(words):
    for source in (" ".join(words), "{{" + " ".join(words) + "}}", "{% for m in messages %}" + " ".join(words)):
        with suppress(RequestError, TemplateError):
            assert isinstance(render(source, VARIABLES), str)

"""Chat template sources made of Jinja's grammar at random: what templates use, what they must not, and what is long."""

import random


def _listed(names: str) -> list[str]:
    return [" ".join(name.split()) for name in names.split("|")]


_NAMES = _listed("""
    messages|messages|message|bos_token|tools|add_generation_prompt|loop|ns|x|y|m|lipsum|cycler|joiner|namespace|range
    |dict|raise_exception|strftime_now|self|caller|varargs|kwargs|none|true|undefined_name|__builtins__|request|config
    |super|documents
""")
_ATTRIBUTES = _listed("""
    role|content|items|keys|values|get|upper|strip|split|startswith|replace|join|format|format_map|append|pop|update
    |clear|copy|count|index|encode|title|lower|__class__|__mro__|__globals__|__init__|__dict__|__subclasses__|__getitem__
    |gi_frame|mro|func_globals|f_globals|cr_frame|index0|first|last|length|previtem|cycle|changed|real|numerator
    |bit_length|zfill|ljust|expandtabs|translate|rsplit|removeprefix|name
""")
_FILTERS = _listed("""
    trim|tojson|length|upper|lower|list|first|last|reverse|sort|unique|string|int|float|abs|random|round|safe|escape|e
    |striptags|sum|title|capitalize|urlencode|urlize|wordcount|xmlattr|filesizeformat|dictsort|items|pprint|min|max|count
    |join|d|default|default('x')|replace('a', 'b')|join(', ')|map('upper')|map(attribute='content')|map('attr', 'x')
    |attr('x')|attr('__class__')|selectattr('role')|selectattr('role', 'equalto', 'user')|rejectattr('content')
    |groupby('role')|batch(2)|batch(10**9, 0)|slice(3)|select('string')|reject('none')|format(1)|indent(4)
    |indent(10**6)|center(80)|center(10**9)|truncate(5)|wordwrap(3)|tojson(indent=2)|tojson(indent=10**6)
    |round(2, 'floor')|sort(attribute='role')|forceescape|wat
""")
_TESTS = _listed("""
    defined|none|string|mapping|iterable|sequence|number|undefined|true|false|boolean|integer|float|callable|odd|filter
    |divisibleby(0)|divisibleby(2)|sameas(none)|in([1])|eq(1)|test|escaped|lower|upper|gt(0)|equalto('a')|wat
""")
_CONSTANTS = (
    *("0", "1", "-1", "2", "10**9", "2**63", "1e308", "1.5", "''", "'a'", "'%s%d'", "'{0.__class__}'", "'\\n'"),
    *('"\'"', "9" * 400, f"'{'x' * 1000}'", "[]", "{}", "()", "'é'", "'\\x1b[2J'", "'<b>'", "1_000", "0x1f"),
)
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "and", "or", "in", "not in", "==", "!=", "<", ">=")
_ODD_STATEMENTS = (
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% extends 'x' %}", "{% break %}"),
    *("{% block b %}a{% endblock %}", "{% raw %}{{ x }}{% endraw %}", "{# comment #}", "{% debug %}", "{% continue %}"),
    *("{% autoescape true %}a{% endautoescape %}", "{% do x.append(1) %}", "{% trans %}a{% endtrans %}", "{{", "{%"),
    *("{% macro r(n) %}{{ r(n + 1) }}{% endmacro %}{{ r(0) }}", "{% set x = messages %}" * 500, "%}", "{% endif %}"),
    *("{% for i in range(10**6) %}{% for j in range(10**6) %}", "{% for i in range(10**9) %}x{% endfor %}"),
    *("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "{{ " + "(" * 300 + "1" + ")" * 300 + " }}"),
    *("{{ 1" + " + 1" * 3000 + " }}", "{{ -" + "-" * 500 + "1 }}", "{% set s = 'a' * 10**9 %}", "{{ [0] * 10**9 }}"),
    *("{{ 9**9**9 }}", "{{ '%1000000000d' % 1 }}", "{{ '{:1000000000}'.format(1) }}", "{{ 'a' ~ 'b' * 10**8 }}"),
)


def _expression(rng: random.Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice(rng.choice((_NAMES, _NAMES, _CONSTANTS)))

    def inner() -> str:
        return _expression(rng, depth - rng.choice((1, 1, 2)))

    match rng.randrange(14):
        case 0 | 1 | 2:
            return rng.choice(
                ("messages[0].content", "messages[-1]['role']", "message.content", "messages", "loop.index")
            )
        case 3:
            return f"{inner()}.{rng.choice(_ATTRIBUTES)}"
        case 4:
            return f"{inner()}.{rng.choice(_ATTRIBUTES)}({rng.choice(('', inner()))})"
        case 5:
            return f"{inner()}[{rng.choice(('0', '-1', '1:', '::-1', '::0', inner(), repr(rng.choice(_ATTRIBUTES))))}]"
        case 6:
            return f"({inner()} {rng.choice(_OPERATORS)} {inner()})"
        case 7 | 8:
            return f"({inner()} | {rng.choice(_FILTERS)})"
        case 9:
            return f"({inner()} is {rng.choice(('', 'not '))}{rng.choice(_TESTS)})"
        case 10:
            return f"({inner()} if {inner()} else {inner()})"
        case 11:
            return rng.choice(
                (f"[{inner()}, {inner()}]", f"{{{inner()}: {inner()}}}", f"({inner()},)", f"(not {inner()})")
            )
        case 12:
            return f"{rng.choice(_NAMES)}({rng.choice(('', inner(), 'x=' + inner(), '*' + inner(), '**' + inner()))})"
        case _:
            return rng.choice((f"range({rng.choice((3, 100, 10**5))})", f"(-{inner()})", f"namespace(x={inner()})"))


def output(rng: random.Random, depth: int) -> str:
    opening, closing = rng.choice(("{{", "{{-")), rng.choice(("}}", "-}}"))
    return f"{opening} {_expression(rng, depth)} {closing}"


def statement(rng: random.Random, depth: int) -> str:
    expression, body = _expression(rng, depth), block(rng, depth - 1)
    dash = rng.choice(("", "-"))
    name = rng.choice(("x", "y", "m", "message"))
    match rng.randrange(12):
        case 0 | 1:
            middle = rng.choice(("", f"{{% else %}}{body}", f"{{% elif {expression} %}}{body}"))
            return f"{{% if {expression} {dash}%}}{body}{middle}{{%{dash} endif %}}"
        case 2 | 3 | 4:
            over = rng.choice(("messages", "messages", "range(3)", expression))
            extra = rng.choice(("", "", "", " if loop", f" if {name}", " recursive"))
            leave = rng.choice(("", "", "{% break %}", "{% if loop.last %}{% continue %}{% endif %}", "{{ loop(x) }}"))
            return f"{{%{dash} for {name} in {over}{extra} %}}{body}{leave}{{% endfor {dash}%}}"
        case 5:
            return f"{{% set {name} = {expression} %}}"
        case 6:
            return (
                f"{{% set ns = namespace(x=0) %}}{{% for i in range(3) %}}{{% set ns.x = {expression} %}}{{% endfor %}}"
            )
        case 7:
            return f"{{% set {name} %}}{body}{{% endset %}}"
        case 8:
            call = rng.choice((f"{{{{ m({expression}) }}}}", f"{{% call m({expression}) %}}{body}{{% endcall %}}", ""))
            return f"{{% macro m(x, y={expression}) %}}{body}{{{{ caller and caller() }}}}{{% endmacro %}}{call}"
        case 9:
            return f"{{% filter {rng.choice(_FILTERS)} %}}{body}{{% endfilter %}}"
        case 10:
            return rng.choice(
                (
                    f"{{% with x = {expression} %}}{body}{{% endwith %}}",
                    f"{{% generation %}}{body}{{% endgeneration %}}",
                )
            )
        case _:
            return rng.choice(_ODD_STATEMENTS)


def block(rng: random.Random, depth: int) -> str:
    """Some text, outputs and statements."""
    if depth <= 0:
        return rng.choice((" text\n", "", "{{ x }}", "{{ message.role }}", "é", "\n  "))
    parts = (statement, output, output, lambda rng, depth: rng.choice((" a\n", "\n\n", "<b>", "  ")))
    return "".join(rng.choice(parts)(rng, depth - rng.choice((0, 1, 1))) for _ in range(rng.choice((1, 1, 2, 3))))

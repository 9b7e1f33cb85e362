"""Chat templates against published renderings and transformers."""

import json
from datetime import datetime

import jinja2
import pytest

from llama_fast.errors import RequestError, TemplateError
from llama_fast.tokenizer import LlamaTokenizer
from tests.tokenizer_samples import BUILT, NAMES, TOKENIZERS, genuine, save_folder

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<b> & 'é'",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
    },
}
CONVERSATION = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Hi {{ 7 * 7 }} <b>&'"},
    {"role": "assistant", "content": "Hello", "tool_calls": None},
    {"role": "user", "content": "Bye"},
]


def render(template: str, messages: object = CONVERSATION, **kwargs: object) -> str:
    return TOKENIZERS["llama3"].apply_chat_template(messages, chat_template=template, **kwargs)


def test_T39_published_renderings(shared_data):
    vectors = json.loads((shared_data / "chat_template_vectors.json").read_text())
    for case in vectors["cases"]:
        prompt = TOKENIZERS["llama3"].apply_chat_template(
            vectors["conversation"],
            chat_template=case["template"],
            bos_token=case["bos_token"],
            eos_token=case["eos_token"],
        )
        assert prompt == case["expected"], case["name"]


def test_T39_equal_to_transformers_on_real_templates(shared_data):
    from transformers import PreTrainedTokenizerFast

    ours = genuine(shared_data, "stories260K")
    theirs = PreTrainedTokenizerFast.from_pretrained(shared_data / "stories260K")
    sources = [path.read_text() for path in sorted((shared_data / "chat_templates").glob("*.jinja"))]
    sources.append((shared_data / "tokenizers" / "tinyllama" / "chat_template.jinja").read_text())
    sources += [
        case["template"] for case in json.loads((shared_data / "chat_template_vectors.json").read_text())["cases"]
    ]
    conversations = [
        (CONVERSATION, {"tools": tools, "add_generation_prompt": add_generation_prompt})
        for tools in (None, [TOOL])
        for add_generation_prompt in (False, True)
    ]
    prefill = [*CONVERSATION, {"role": "assistant", "content": "So long "}]
    conversations.append((prefill, {"continue_final_message": True}))
    refused = 0
    for source in sources:
        for messages, options in conversations:
            options = {**options, "date_string": "1 Jan 2026", "chat_template": source}
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            except (jinja2.TemplateError, TypeError):  # one template needs tools, others refuse these roles
                refused += 1
                with pytest.raises((RequestError, TemplateError)):
                    ours.apply_chat_template(messages, **options)
                continue
            assert ours.apply_chat_template(messages, **options) == expected
            ids = theirs.apply_chat_template(messages, return_dict=False, **options)
            assert ours.apply_chat_template(messages, tokenize=True, **options) == ids
    assert refused < len(sources) * len(conversations) / 2


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n",
        "{% for m in messages %}{{ m | tojson }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
        "{{ messages[1] | tojson(indent=2) }}{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{{ tools is defined }}{{ tools is none }}{{ documents }}{{ 'tool_calls' in messages[2] }}{{ nothing }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_T39_conventions_equal_transformers(tmp_path, template):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(save_folder(tmp_path, BUILT["llama3"], NAMES))
    expected = theirs.apply_chat_template(CONVERSATION, chat_template=template, tokenize=False)
    assert render(template, add_generation_prompt=False) == expected


def test_T38_rendered_prompt_has_one_bos():
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = TOKENIZERS["llama3"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer.apply_chat_template(CONVERSATION, chat_template=template, tokenize=True)
    assert (ids[0], ids.count(bos), ids.count(eos)) == (bos, 1, len(CONVERSATION))
    prompt = tokenizer.apply_chat_template(CONVERSATION, chat_template=template)
    for add_special_tokens in (False, True):
        assert tokenizer.encode(prompt, add_special_tokens, parse_special_tokens=True) == ids
    without_bos = prompt.removeprefix("<s>")
    assert tokenizer.encode(without_bos, parse_special_tokens=True) == ids
    # A second bos that the text itself has is the text's, not ours to drop.
    assert tokenizer.encode(prompt + "<s><s>", parse_special_tokens=True) == [*ids, bos, bos]


def test_E07_user_text_is_not_evaluated():
    assert render("{{ messages[1].content }}") == "Hi {{ 7 * 7 }} <b>&'"


def test_E09_strftime_now():
    before = datetime.now().strftime("%d %b %Y")
    rendered = render("{{ strftime_now('%d %b %Y') }}")
    assert rendered in (before, datetime.now().strftime("%d %b %Y"))


def test_E04_raise_exception_reaches_the_caller():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ messages[0].content + none }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content }}",
        "{% include 'x' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ messages.append(1) }}",
        "{{ ('%s' | attr('__class__')).__mro__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_E01_template_that_fails_or_breaks_out(template):
    with pytest.raises(TemplateError, match="chat template"):
        render(template)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hi", "str"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\]"),
        ([{"content": "a"}], r"messages\[0\]"),
        ([{"role": "user", "content": object()}], r"messages\[0\].*JSON"),
    ],
)
def test_E06_malformed_messages(messages, message):
    with pytest.raises(RequestError, match=message):
        render("{{ messages }}", messages)


def test_E08_choice_of_template(tmp_path):
    message = [{"role": "user", "content": "x"}]
    entry = [{"name": "a", "template": "A"}, {"name": "tool_use", "template": "T"}]
    tokenizer = LlamaTokenizer.from_pretrained(
        save_folder(tmp_path, BUILT["llama3"], {**NAMES, "chat_template": entry})
    )
    assert tokenizer.chat_template is None
    assert tokenizer.apply_chat_template(message, chat_template="a") == "A"
    assert tokenizer.apply_chat_template(message, tools=[TOOL]) == "T"
    with pytest.raises(TemplateError, match=r"\['a', 'tool_use'\]"):
        tokenizer.apply_chat_template(message)
    with pytest.raises(TemplateError, match="no chat template"):
        TOKENIZERS["llama3"].apply_chat_template(message)

    (tmp_path / "chat_template.jinja").write_text("file")
    assert LlamaTokenizer.from_pretrained(tmp_path).apply_chat_template(message) == "file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "a"}]}')
    with pytest.raises(TemplateError, match="chat_template must be"):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_continue_final_message():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    prefill = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]
    assert render(template, prefill, continue_final_message=True) == "[user]a</s>[assistant]b c"
    template = template.replace(" | trim", "")
    assert render(template, prefill, continue_final_message=True) == "[user]a</s>[assistant]b c "
    with pytest.raises(RequestError, match="exclude each other"):
        render(template, prefill, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="no text content"):
        render(template, [{"role": "assistant"}], continue_final_message=True)
    with pytest.raises(TemplateError, match="verbatim"):
        render("{{ messages[0].content }}", prefill, continue_final_message=True)

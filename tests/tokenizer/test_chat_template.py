"""Chat templates against published renderings and transformers."""

import json
from datetime import datetime

import jinja2
import pytest

from llama_fast.errors import RequestError, TemplateError, TokenizerFileError, UnsupportedError
from llama_fast.tokenizer import LlamaTokenizer, chat_builtins
from tests.tokenizer_samples import BUILT, NAMES, TOKENIZERS, built, genuine, save_folder

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
    return TOKENIZERS["llama3"].apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)


def test_T39_published_renderings(shared_data):
    vectors = json.loads((shared_data / "chat_template_vectors.json").read_text())
    for case in vectors["cases"]:
        prompt = TOKENIZERS["llama3"].apply_chat_template(
            vectors["conversation"],
            chat_template=case["template"],
            tokenize=False,
            add_generation_prompt=True,
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
            assert ours.apply_chat_template(messages, tokenize=False, **options) == expected
            ids = theirs.apply_chat_template(messages, return_dict=False, **options)
            assert ours.apply_chat_template(messages, **options) == ids
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
    ids = tokenizer.apply_chat_template(CONVERSATION, chat_template=template)
    assert (ids[0], ids.count(bos), ids.count(eos)) == (bos, 1, len(CONVERSATION))
    prompt = tokenizer.apply_chat_template(CONVERSATION, chat_template=template, tokenize=False)
    for add_special_tokens in (False, True):
        assert tokenizer.encode(prompt, add_special_tokens=add_special_tokens, parse_special_tokens=True) == ids
        assert (
            tokenizer(prompt, None, add_special_tokens=add_special_tokens, split_special_tokens=False).input_ids == ids
        )
    without_bos = prompt.removeprefix("<s>")
    assert tokenizer.encode(without_bos, parse_special_tokens=True) == ids
    # A second bos that the text itself has is the text's, not ours to drop.
    assert tokenizer.encode(prompt + "<s><s>", parse_special_tokens=True) == [*ids, bos, bos]


def test_E07_user_text_is_not_evaluated():
    assert render("{{ messages[1].content }}") == "Hi {{ 7 * 7 }} <b>&'"


def test_E09_a_fixed_clock_and_tools_give_pinned_output(shared_data, monkeypatch):
    """The template of Llama 3.2 writes the date; transformers' clock is stopped at the same moment."""
    from transformers.utils import chat_template_utils

    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 2, 29, 23, 59)

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)
    chat_template_utils._compile_jinja_template.cache_clear()
    monkeypatch.setattr(chat_builtins, "now", lambda: Stopped.now())
    source = (shared_data / "chat_templates" / "meta-llama-Llama-3.2-3B-Instruct.jinja").read_text()
    (expected,), _ = chat_template_utils.render_jinja_template(
        [[{"role": m["role"], "content": m["content"]} for m in CONVERSATION]],
        [TOOL],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert "Today Date: 29 Feb 2024" in expected
    assert render(source, tools=[TOOL], add_generation_prompt=True) == expected
    chat_template_utils._compile_jinja_template.cache_clear()


def test_E04_raise_exception_reaches_the_caller():
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hi", "str"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] must be an object.*str"),
        ([{"content": "a"}], r"messages\[0\]\.role.*NoneType"),
        ([{"role": "", "content": "a"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "a"}], r"messages\[0\]\.role.*int"),
        ([{"role": "user", "content": object()}], r"messages\[0\].*JSON"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content is missing"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content.*got 5"),
        ([{"role": "user", "content": True}], r"messages\[0\]\.content.*got True"),
        ([{"role": "user", "content": [["a"]]}], r"messages\[0\]\.content\[0\].*list"),
        ([{"role": "user", "content": ["a", 1]}], r"messages\[0\]\.content\[1\].*int"),
        (
            [{"role": "user", "content": ["a"] * 10**5}],
            r"messages\[0\]\.content has 100,000 parts; the limit is 10,000",
        ),
    ],
)
def test_E06_malformed_messages(messages, message):
    with pytest.raises(RequestError, match=message):
        render("{{ messages }}", messages)


def test_E06_roles_are_the_templates_business():
    odd = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "poet", "content": "c"}]
    assert render("{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}", odd) == "user:a system:b poet:c "
    strict = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    )
    with pytest.raises(RequestError, match="system first.*messages\\[1\\].role is 'system' after others"):
        render(strict + "{% endif %}{% endfor %}", odd)
    with pytest.raises(RequestError, match="no poets$"):
        render("{% for m in messages %}{{ raise_exception('no poets') }}{% endfor %}", odd[2:])


def test_E06_legal_contents():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    for message in (call, {"role": "tool", "content": {"a": 1}}, {"role": "user", "content": ["a", {"type": "text"}]}):
        rendered = render("{{ messages[0] | tojson }}", [message])
        assert json.loads(rendered) == {key: value for key, value in message.items() if value is not None}


def test_ten_thousand_messages(shared_data):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"Message {i} says a little. " * 8} for i in range(10_000)
    ]
    for path in sorted((shared_data / "chat_templates").glob("*.jinja")):
        tools = [TOOL] if "tool_use" in path.name else None
        rendered = render(path.read_text(), turns, tools=tools)
        assert all(f"Message {i} says" in rendered for i in (0, 5000, 9999))


@pytest.mark.parametrize("name", ["messages", "range", "raise_exception"])
def test_reserved_names(name):
    with pytest.raises(RequestError, match=f"{name}: a template variable"):
        TOKENIZERS["llama3"].apply_chat_template(CONVERSATION, chat_template="a", **{name: 1})


def test_E08_choice_of_template(tmp_path):
    message = [{"role": "user", "content": "x"}]
    entry = [{"name": "a", "template": "A"}, {"name": "tool_use", "template": "T"}]
    tokenizer = LlamaTokenizer.from_pretrained(
        save_folder(tmp_path, BUILT["llama3"], {**NAMES, "chat_template": entry})
    )
    assert tokenizer.chat_template is None
    assert tokenizer.apply_chat_template(message, chat_template="a", tokenize=False) == "A"
    assert tokenizer.apply_chat_template(message, tools=[TOOL], tokenize=False) == "T"
    with pytest.raises(TemplateError, match=r'named "default".*a, tool_use'):
        tokenizer.apply_chat_template(message)
    with pytest.raises(TemplateError, match="no chat template"):
        TOKENIZERS["llama3"].apply_chat_template(message)
    with pytest.raises(RequestError, match="chat_template must be a name or a Jinja source; got int"):
        tokenizer.apply_chat_template(message, chat_template=3)

    (tmp_path / "chat_template.jinja").write_text("file")
    assert LlamaTokenizer.from_pretrained(tmp_path).apply_chat_template(message, tokenize=False) == "file"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([{"name": "a"}], "chat_template must be"),
        ([{"name": "a", "template": 1}], "chat_template must be"),
        ([], "chat_template must be"),
        ([1], "chat_template must be"),
        (7, "chat_template must be"),
        ([{"name": "a", "template": "A"}, {"name": "a", "template": "B"}], "two templates of one name.*a, a"),
    ],
)
def test_E08_malformed_entries(tmp_path, entry, message):
    save_folder(tmp_path, BUILT["llama3"], {**NAMES, "chat_template": entry})
    with pytest.raises(TemplateError, match=message):
        LlamaTokenizer.from_pretrained(tmp_path)


def test_template_files_that_cannot_be_read(tmp_path):
    save_folder(tmp_path, BUILT["llama3"], NAMES)
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(TokenizerFileError, match="UTF-8"):
        LlamaTokenizer.from_pretrained(tmp_path)
    path.write_bytes(b"x" * (1 << 20) + b"y")
    with pytest.raises(TokenizerFileError, match="has at most 1,048,576"):
        LlamaTokenizer.from_pretrained(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(TokenizerFileError, match="not a regular file"):
        LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../x", "a/b", "a\x00b"])
def test_template_names_that_are_no_file_names(tmp_path, name):
    tokenizer = built("llama3")
    tokenizer.chat_template = {name: "x"}
    with pytest.raises(TemplateError, match="no file name"):
        tokenizer.save_pretrained(tmp_path)


def test_continue_final_message():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
    prefill = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]
    assert render(template, prefill, continue_final_message=True) == "[user]a</s>[assistant]b c"
    template = template.replace(" | trim", "")
    assert render(template, prefill, continue_final_message=True) == "[user]a</s>[assistant]b c "
    with pytest.raises(RequestError, match="exclude each other"):
        render(template, prefill, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(RequestError, match="no text content"):
        render(template, [{"role": "assistant", "content": [{"type": "image"}]}], continue_final_message=True)
    with pytest.raises(TemplateError, match="verbatim"):
        render("{{ messages[0].content }}", prefill, continue_final_message=True)


BATCH = [CONVERSATION[1:2], CONVERSATION[:2], CONVERSATION]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def plain(result):
    """Lists of a result that may hold tensors or be a BatchEncoding."""
    if hasattr(result, "keys"):
        return {name: plain(result[name]) for name in result}
    return result.tolist() if hasattr(result, "tolist") else result


@pytest.mark.parametrize("conversation", [CONVERSATION, BATCH, BATCH[:1]], ids=["one", "three", "a list of one"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenize": False},
        {"return_dict": True},
        {"return_tensors": "pt", "padding": True},
        {"return_tensors": "np", "padding": "longest", "return_dict": True},
        {"padding": "max_length", "max_length": 90, "truncation": True},
        {"truncation": True, "max_length": 7},
        {"truncation": True, "max_length": 7, "return_dict": True, "return_tensors": "pt"},
        {"padding": True, "tokenizer_kwargs": {"padding_side": "right", "pad_to_multiple_of": 8}},
        {"add_generation_prompt": True, "tools": [TOOL], "documents": [{"title": "a", "text": "b"}]},
        {"continue_final_message": True},
        {"bos_token": "", "eos_token": "!"},
    ],
    ids=str,
)
def test_T39_arguments_give_what_transformers_gives(tmp_path, conversation, options):
    from transformers import PreTrainedTokenizerFast

    folder = save_folder(tmp_path, BUILT["llama3"], {**NAMES, "pad_token": "<unk>", "chat_template": CHAT})
    ours, theirs = LlamaTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.padding_side = ours.padding_side
    theirs.model_input_names = ours.model_input_names
    expected = theirs.apply_chat_template(conversation, **{"return_dict": False, **options})
    result = ours.apply_chat_template(conversation, **options)
    assert plain(result) == plain(expected)
    assert type(result).__name__ == type(expected).__name__


def test_T39_defaults_are_the_pages():
    """transformers 4.56: ids, no generation prompt, no dict."""
    ids = TOKENIZERS["llama3"].apply_chat_template(CONVERSATION, chat_template=CHAT + "{{ add_generation_prompt }}")
    assert isinstance(ids, list)
    assert TOKENIZERS["llama3"].decode(ids).endswith("False")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"return_assistant_tokens_mask": True}, UnsupportedError, "return_assistant_tokens_mask=True"),
        ({"tokenizer_kwargs": {"stride": 1}}, UnsupportedError, "tokenizer_kwargs: stride is not supported"),
        ({"return_tensors": "tf"}, UnsupportedError, "return_tensors='tf'"),
        ({"padding": True}, RequestError, "padding token"),
        ({"padding": "wide"}, RequestError, "padding must be"),
        ({"truncation": "wide"}, RequestError, "truncation must be"),
        ({"max_length": 0, "truncation": True}, RequestError, "max_length must be"),
        ({"add_generation_prompt": True, "continue_final_message": True}, RequestError, "exclude each other"),
        ({"tools": [print]}, RequestError, "tools: only JSON values"),
    ],
)
def test_T39_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        TOKENIZERS["llama3"].apply_chat_template(CONVERSATION, chat_template=CHAT, **options)


def test_a_prompt_longer_than_the_model_takes_is_told_once(caplog):
    tokenizer = built("llama3", model_max_length=20)
    for _ in range(2):
        assert len(tokenizer.apply_chat_template(CONVERSATION, chat_template=CHAT)) > 20
    assert [record.message for record in caplog.records if "model_max_length=20" in record.message]
    assert len(caplog.records) == 1

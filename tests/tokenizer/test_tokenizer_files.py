"""LlamaTokenizer: which file decides what, saving, and files that cannot be used."""

import json

import pytest
from tokenizers import Tokenizer

from llama_fast.errors import RequestError, TemplateError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from tests.tokenizer_samples import BUILT, NAMES, built, byte_level, save_folder


def test_D08_special_tokens_map_counts_only_in_old_folders(tmp_path):
    from transformers import PreTrainedTokenizerFast

    for config, expected in (({**NAMES, "added_tokens_decoder": {}}, "</s>"), (NAMES, "<unk>")):
        folder = save_folder(
            tmp_path / expected.strip("</>"), BUILT["llama2"], config, {"eos_token": {"content": "<unk>"}}
        )
        assert LlamaTokenizer.from_pretrained(folder).eos_token == expected
        assert PreTrainedTokenizerFast.from_pretrained(folder).eos_token == expected


def test_D08_token_named_by_the_config_is_special(tmp_path):
    """ "<tool call>" is an ordinary added token in tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    folder = save_folder(
        tmp_path, BUILT["llama3"], {**NAMES, "eos_token": {"__type": "AddedToken", "content": "<tool call>"}}
    )
    ours, theirs = LlamaTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [*ours.encode("a"), ours.eos_token_id]
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a"
    assert built("llama3").decode(ids) == "a<tool call>"


def test_D08_token_that_does_not_exist_is_unset_and_logged(caplog):
    tokenizer = built("llama3", pad_token="[PAD]")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (None, None)
    assert "[PAD]" in caplog.text
    assert len(tokenizer) == len(built("llama3"))


def test_add_bos_and_eos_count_only_without_a_post_processor():
    spec = {**json.loads(BUILT["llama3"].to_str()), "post_processor": None}
    flags = {**NAMES, "add_bos_token": True, "add_eos_token": True}
    tokenizer = LlamaTokenizer(Tokenizer.from_str(json.dumps(spec)), flags)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert built("llama3", add_bos_token=False, add_eos_token=True).encode("a") == [tokenizer.bos_token_id, *plain]
    assert LlamaTokenizer(Tokenizer.from_str(json.dumps(spec)), NAMES).encode("a") == plain


def test_T41_save_and_load(tmp_path):
    from transformers import AutoTokenizer

    templates = {"default": "{{ messages[0].content }}\n", "tool_use": "tools: {{ messages[0].content }}"}
    config = {**NAMES, "model_max_length": 77, "chat_template": "replaced by the files"}
    backend = Tokenizer.from_str(BUILT["llama2"].to_str())
    paths = LlamaTokenizer(backend, config, templates).save_pretrained(tmp_path / "new" / "folder")
    assert all(path.is_file() for path in paths)
    ours, theirs = (cls.from_pretrained(tmp_path / "new" / "folder") for cls in (LlamaTokenizer, AutoTokenizer))
    assert ours.model_max_length == theirs.model_max_length == 77
    assert ours.chat_template == theirs.chat_template["default"] == templates["default"]
    for text in ("", "  two leading", "你好 🤗\n"):
        assert ours.encode(text) == theirs.encode(text) == built("llama2").encode(text)
    message = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(message, tools=[]) == "tools: x"


def test_template_name_cannot_leave_the_folder(tmp_path):
    tokenizer = LlamaTokenizer(byte_level(), NAMES, {"../../evil": "x"})
    with pytest.raises(TemplateError, match="evil"):
        tokenizer.save_pretrained(tmp_path / "a" / "b")


def test_D01_missing_tokenizer_json(tmp_path):
    with pytest.raises(TokenizerFileError, match=r"has no tokenizer\.json"):
        LlamaTokenizer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_D01_tokenizer_json_is_not_one(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.json cannot be loaded"):
        LlamaTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"bos_token": 5}', '{"eos_token": {}}', '{"model_max_length": "a"}'])
def test_tokenizer_config_is_wrong(tmp_path, content):
    folder = save_folder(tmp_path, BUILT["llama3"])
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerFileError, match=r"tokenizer_config|bos_token|eos_token|model_max_length"):
        LlamaTokenizer.from_pretrained(folder)


def test_D02_rust_panics_become_errors(tmp_path):
    spec = json.loads(BUILT["llama3"].to_str())
    at_load = {**spec, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(at_load))
    with pytest.raises(TokenizerFileError, match="Precompiled"):
        LlamaTokenizer.from_pretrained(tmp_path)
    at_encode = {**spec, "pre_tokenizer": {"type": "FixedLength", "length": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(at_encode))
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    with pytest.raises(RequestError, match="could not be encoded"):
        tokenizer.encode("hello")

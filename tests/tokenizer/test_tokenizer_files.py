"""LlamaTokenizer: which file decides what, saving, and files that cannot be used."""

import json

import pytest
from tokenizers import Tokenizer

from llama_fast.errors import TemplateError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from llama_fast.tokenizer.files import read_tokenizer_files
from tests.sentencepiece_samples import CONTROL, PIECES, model_file, trained
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
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == "a"
    assert built("llama3").decode(ids, skip_special_tokens=True) == "a<tool call>"


def test_D08_token_that_does_not_exist_is_unset_and_logged(caplog):
    tokenizer = built("llama3", pad_token="[PAD]")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (None, None)
    assert "[PAD]" in caplog.text
    assert len(tokenizer) == len(built("llama3"))


def test_add_bos_and_eos_count_only_without_a_post_processor():
    spec = {**json.loads(BUILT["llama3"].to_str()), "post_processor": None}
    flags = {**NAMES, "add_bos_token": True, "add_eos_token": True}
    tokenizer = LlamaTokenizer.from_backend(Tokenizer.from_str(json.dumps(spec)), flags)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]
    assert built("llama3", add_bos_token=False, add_eos_token=True).encode("a") == [tokenizer.bos_token_id, *plain]
    assert LlamaTokenizer.from_backend(Tokenizer.from_str(json.dumps(spec)), NAMES).encode("a") == plain


def test_T24_bos_and_eos_that_tokenizer_json_leaves_to_the_config(tmp_path):
    """DeepSeek's: its post-processor only trims offsets. transformers 4 adds the bos token there; 5.23 does not."""
    spec = json.loads(BUILT["llama3"].to_str())
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    backend = Tokenizer.from_str(json.dumps(spec))
    plain = backend.encode("a").ids
    for add_bos, add_eos in ((True, False), (False, True), (True, True), (False, False)):
        flags = {**NAMES, "add_bos_token": add_bos, "add_eos_token": add_eos}
        folder = save_folder(tmp_path / f"{add_bos} {add_eos}", backend, flags)
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        assert tokenizer.encode("a") == [261] * add_bos + plain + [262] * add_eos
        assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (add_bos, add_eos)
    assert LlamaTokenizer.from_pretrained(save_folder(tmp_path / "no flags", backend, NAMES)).encode("a") == plain


def test_flags_that_tokenizer_json_contradicts_are_logged(caplog):
    assert built("llama3", add_bos_token=True, add_eos_token=False).add_bos_token
    assert not caplog.text
    assert built("llama3", add_bos_token=False, add_eos_token=True).add_bos_token
    for name in ("add_bos_token", "add_eos_token"):
        assert f"{name} in tokenizer_config.json does not count" in caplog.text


def test_D08_thousands_of_added_tokens(tmp_path):
    """Orpheus has 29,000 and a tokenizer_config.json of 5 MB."""
    first = len(built("llama3"))
    added = {str(first + at): {"content": f"<custom_token_{at}>", "special": True} for at in range(14_000)}
    named = [token["content"] for token in added.values()]
    config = {**NAMES, "added_tokens_decoder": added, "extra_special_tokens": [*named, "<not there>"]}
    folder = save_folder(tmp_path, BUILT["llama3"], config)
    assert (folder / "tokenizer_config.json").stat().st_size > 1 << 20
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert tokenizer.extra_special_tokens == named
    assert tokenizer.encode(named[-1], add_special_tokens=False, parse_special_tokens=True) == [first + 13_999]


def test_T41_save_and_load(tmp_path):
    from transformers import AutoTokenizer

    templates = {"default": "{{ messages[0].content }}\n", "tool_use": "tools: {{ messages[0].content }}"}
    config = {**NAMES, "model_max_length": 77, "chat_template": "replaced by the files"}
    backend = Tokenizer.from_str(BUILT["llama2"].to_str())
    paths = LlamaTokenizer.from_backend(backend, config, templates).save_pretrained(tmp_path / "new" / "folder")
    assert all(path.is_file() for path in paths)
    ours, theirs = (cls.from_pretrained(tmp_path / "new" / "folder") for cls in (LlamaTokenizer, AutoTokenizer))
    assert ours.model_max_length == theirs.model_max_length == 77
    assert ours.chat_template == theirs.chat_template["default"] == templates["default"]
    for text in ("", "  two leading", "你好 🤗\n"):
        assert ours.encode(text) == theirs.encode(text) == built("llama2").encode(text)
    message = [{"role": "user", "content": "x"}]
    assert ours.apply_chat_template(message, tools=[], tokenize=False) == "tools: x"


def test_template_name_cannot_leave_the_folder(tmp_path):
    tokenizer = LlamaTokenizer.from_backend(byte_level(), NAMES, {"../../evil": "x"})
    with pytest.raises(TemplateError, match="evil"):
        tokenizer.save_pretrained(tmp_path / "a" / "b")


def test_D01_nothing_to_read(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TokenizerFileError, match=r"has neither tokenizer\.json nor tokenizer\.model; download"):
            read_tokenizer_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not strict JSON: the file is empty"),
        (b"{", "is not strict JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"model": {"type": "BPE", "type": "BPE"}}', "is not strict JSON: the key 'type' appears twice"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "cannot be used; download or convert it again"),
    ],
)
def test_D01_tokenizer_json_is_not_one(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerFileError, match=rf"tokenizer\.json: {message}"):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize(("name", "size"), [("tokenizer.json", 64 << 20), ("tokenizer.model", 4 << 20)])
def test_D01_large_files_are_not_read(tmp_path, name, size):
    with (tmp_path / name).open("wb") as file:
        file.truncate(size + 1)
    with pytest.raises(TokenizerFileError, match=f"has {size + 1:,} bytes; such a file has at most {size:,}"):
        read_tokenizer_files(tmp_path)


def test_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.model: is a folder and not a regular file"):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"bos_token": 5}', '{"eos_token": {}}', '{"model_max_length": "a"}'])
def test_tokenizer_config_is_wrong(tmp_path, content):
    folder = save_folder(tmp_path, BUILT["llama3"])
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerFileError, match=r"tokenizer_config|bos_token|eos_token|model_max_length"):
        LlamaTokenizer.from_pretrained(folder)


def save_spec(folder, spec):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "Precompiled"),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "chunk size must be non-zero"),
        ("decoder", {"type": "Strip", "content": "A", "start": 1, "stop": 1}, "slice index"),
    ],
)
def test_D02_rust_panics_become_errors(tmp_path, part, value, message):
    save_spec(tmp_path, {**json.loads(BUILT["llama3"].to_str()), part: value})
    with pytest.raises(TokenizerFileError, match=f"tokenizer.json: cannot be used; .*{message}"):
        read_tokenizer_files(tmp_path)


def test_D02_post_processor_adds_a_token_that_does_not_exist(tmp_path):
    spec = json.loads(BUILT["llama3"].to_str())
    spec["post_processor"]["special_tokens"]["<s>"]["ids"] = [7777]
    with pytest.raises(TokenizerFileError, match="post_processor adds the id 7777, which no token has"):
        read_tokenizer_files(save_spec(tmp_path, spec))


def test_D04_ids_of_tokenizer_json(tmp_path):
    spec = json.loads(BUILT["llama3"].to_str())
    vocab = spec["model"]["vocab"]
    with pytest.raises(TokenizerFileError, match="tokenizer.json: '.' and '.' have the same id, 4"):
        read_tokenizer_files(save_spec(tmp_path, {**spec, "model": {**spec["model"], "vocab": {**vocab, "!": 4}}}))
    moved = [{**token, "id": token["id"] + 7} for token in spec["added_tokens"]]
    with pytest.raises(TokenizerFileError, match="added_tokens: '<unk>' should have id 267, but has 260"):
        read_tokenizer_files(save_spec(tmp_path, {**spec, "added_tokens": moved}))


def test_T38_merges_as_strings_and_as_pairs(tmp_path):
    """Before tokenizers 0.20 a merge was "a b"."""
    for name in ("llama2", "llama3"):
        spec = json.loads(BUILT[name].to_str())
        pairs = spec["model"]["merges"]
        assert all(isinstance(pair, list) for pair in pairs)
        new = read_tokenizer_files(save_spec(tmp_path, spec)).backend
        spec["model"]["merges"] = [" ".join(pair) for pair in pairs]
        assert read_tokenizer_files(save_spec(tmp_path, spec)).backend.to_str() == new.to_str()
        spec["model"]["merges"] = [" ".join(pair) for pair in reversed(pairs)]
        assert read_tokenizer_files(save_spec(tmp_path, spec)).backend.to_str() != new.to_str()


def save_model(folder, config=None, content=None, **side_files):
    """A folder with tokenizer.model; `side_files` by their names without .json."""
    (folder / "tokenizer.model").write_bytes(content or model_file())
    for name, value in {"tokenizer_config": config, **side_files}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def pipeline(backend):
    return {part: type(getattr(backend, part)).__name__ for part in ("normalizer", "pre_tokenizer")}


def test_T1_T2_T5_tokenizer_model_alone(tmp_path):
    files = read_tokenizer_files(save_model(tmp_path))
    assert files.vocab_file == tmp_path / "tokenizer.model"
    assert files.config == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("he") == [1, tokenizer.convert_tokens_to_ids("▁he")]
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.pad_token) == (len(PIECES), len(PIECES), None)


def test_T2_config_names_and_flags_win(tmp_path):
    config = {"bos_token": "</s>", "eos_token": {"content": "<s>"}, "unk_token": None, "add_bos_token": False}
    assert read_tokenizer_files(save_model(tmp_path, config)).config == config


@pytest.mark.parametrize(
    ("in_config", "argument", "legacy"),
    [
        *((None, None, False), (None, False, False), (None, True, True)),
        *((True, None, True), (False, None, False), (True, False, False), (False, True, True)),
    ],
)
def test_T10_T40_legacy(tmp_path, in_config, argument, legacy):
    save_model(tmp_path, {"legacy": in_config})
    backend = read_tokenizer_files(tmp_path, legacy=argument).backend
    assert pipeline(backend) == (
        {"normalizer": "Sequence", "pre_tokenizer": "NoneType"}
        if legacy
        else {"normalizer": "NoneType", "pre_tokenizer": "Metaspace"}
    )


def test_T11_add_prefix_space(tmp_path):
    def tokens(**arguments):
        return read_tokenizer_files(tmp_path, **arguments).backend.encode("he").tokens

    for in_config, expected in ((None, ["▁he"]), (True, ["▁he"]), (False, ["he"])):
        save_model(tmp_path, {"add_prefix_space": in_config})
        assert tokens() == expected
        assert tokens(add_prefix_space=True) == ["▁he"]
        assert tokens(add_prefix_space=False) == ["he"]


def test_T36_tokenizer_json_wins_unless_conversion_is_asked_for(tmp_path, caplog):
    save_model(tmp_path, {"legacy": True, "add_prefix_space": False})
    BUILT["llama2"].save(str(tmp_path / "tokenizer.json"))
    from_json, from_model = BUILT["llama2"].get_vocab_size(), len(PIECES)

    files = read_tokenizer_files(tmp_path)
    assert files.backend.get_vocab_size() == from_json
    assert files.vocab_file == tmp_path / "tokenizer.model"
    assert not caplog.text
    assert read_tokenizer_files(tmp_path, from_slow=True).backend.get_vocab_size() == from_model
    assert read_tokenizer_files(tmp_path, add_prefix_space=True).backend.get_vocab_size() == from_model
    assert read_tokenizer_files(tmp_path, legacy=False).backend.get_vocab_size() == from_json
    assert "legacy=False has no effect: tokenizer.json decides; pass from_slow=True" in caplog.text

    (tmp_path / "tokenizer.model").unlink()
    for arguments in ({"from_slow": True}, {"add_prefix_space": False}):
        with pytest.raises(TokenizerFileError, match=r"has no tokenizer\.model, which from_slow and add_prefix_space"):
            read_tokenizer_files(tmp_path, **arguments)


def test_T41_added_tokens_decoder(tmp_path):
    first = len(PIECES)
    config = {
        "added_tokens_decoder": {
            str(first + 1): {"content": "[PAD]", "special": True, "lstrip": True},
            str(first): {"content": "<word>", "normalized": True},
            "1": {"content": "<begin>", "special": True},
        },
    }
    save_model(tmp_path, config, added_tokens={"never read": 5}, special_tokens_map={"eos_token": "never read"})
    files = read_tokenizer_files(tmp_path)
    added = files.backend.get_added_tokens_decoder()
    assert (added[first].content, added[first].special, added[first].normalized) == ("<word>", False, True)
    assert (added[first + 1].content, added[first + 1].special, added[first + 1].lstrip) == ("[PAD]", True, True)
    assert (files.config["bos_token"], files.config["eos_token"]) == ("<begin>", "</s>")


def test_T41_added_tokens_of_old_folders(tmp_path):
    """Flags as in transformers: a named token is special and not normalized, another one is the contrary."""
    first = len(PIECES)
    names = {"pad_token": "[PAD]", "additional_special_tokens": ["<a>", {"content": "<b>"}]}
    added_tokens = {"<b>": first + 2, "[PAD]": first, "<a>": first + 1, "word": first + 3}
    save_model(tmp_path, {}, added_tokens=added_tokens, special_tokens_map=names)
    added = read_tokenizer_files(tmp_path).backend.get_added_tokens_decoder()
    for name, token_id in added_tokens.items():
        assert (added[token_id].content, added[token_id].special, added[token_id].normalized) == (
            name,
            name != "word",
            name == "word",
        )


@pytest.mark.parametrize(
    ("config", "added_tokens", "message"),
    [
        ({"added_tokens_decoder": []}, None, "added_tokens_decoder must be an object of tokens by id"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, None, "an id must be an integer .* got 'x'"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, None, "an id must be .* got '-1'"),
        ({"added_tokens_decoder": {"4294967296": {"content": "a"}}}, None, "an id must be .* got 4294967296"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, None, "an id must be .* got '999"),
        ({"added_tokens_decoder": {"273": "a"}}, None, "id 273: must be an object with a string content"),
        ({"added_tokens_decoder": {"273": {"content": ""}}}, None, "id 273: must be an object .* not empty"),
        ({"added_tokens_decoder": {"273": {"content": "a", "special": 1}}}, None, "id 273: must be .* true or false"),
        ({"added_tokens_decoder": {"7": {"content": "a"}, "07": {"content": "b"}}}, None, "two tokens have the id 7"),
        ({"added_tokens_decoder": {"99999": {"content": "<a>"}}}, None, "should have id 99999, but has 273"),
        (None, {"<a>": 1.5}, "added_tokens.json: an id must be an integer"),
        (None, {"<a>": True}, "added_tokens.json: an id must be an integer"),
        (None, {"<a>": 273, "<b>": 273}, "added_tokens.json: two tokens have the id 273"),
        (None, {"<a>": 274}, "'<a>' should have id 274, but has 273"),
        ({"legacy": "yes"}, None, "legacy must be true, false or null; got 'yes'"),
        ({"add_prefix_space": 1}, None, "add_prefix_space must be true, false or null; got 1"),
    ],
)
def test_D04_side_files_of_tokenizer_model(tmp_path, config, added_tokens, message):
    with pytest.raises(TokenizerFileError, match=message):
        read_tokenizer_files(save_model(tmp_path, config, added_tokens=added_tokens))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\n", "is no SentencePiece model but a tiktoken file.*copy tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1\n", "but a git-lfs pointer; run `git lfs pull`"),
        (model_file()[:-1], "is cut short"),
    ],
)
def test_D01_tokenizer_model_is_not_one(tmp_path, content, message):
    with pytest.raises(TokenizerFileError, match=rf"tokenizer\.model.*{message}"):
        read_tokenizer_files(save_model(tmp_path, content=content))


def test_D01_original_llama_3_download(shared_data, tmp_path):
    original = (shared_data / "tokenizers/llama3/tokenizer.model").read_bytes()
    with pytest.raises(TokenizerFileError, match="a tiktoken file, as in Meta's own downloads of Llama 3"):
        read_tokenizer_files(save_model(tmp_path, content=original))
    # With the Hugging Face file beside it, it is not read.
    files = read_tokenizer_files(shared_data / "tokenizers/llama3")
    assert files.backend.get_vocab_size() == 128256


def test_T41_converted_tokenizer_survives_saving(tmp_path):
    """Saved as tokenizer.json, which transformers reads too."""
    from transformers import AutoTokenizer

    content = trained(remove_extra_whitespaces=True)
    (tmp_path / "model").mkdir()
    ours = LlamaTokenizer.from_pretrained(save_model(tmp_path / "model", {"legacy": True}, content))
    ours.save_pretrained(tmp_path / "saved")
    again, theirs = (cls.from_pretrained(tmp_path / "saved") for cls in (LlamaTokenizer, AutoTokenizer))
    for text in ("", "  the  ball ", "▁ é \n"):
        ids = ours.encode(text)
        assert again.encode(text) == theirs.encode(text) == ids
        decoded = {tokenizer.decode(ids, skip_special_tokens=True) for tokenizer in (ours, again, theirs)}
        assert len(decoded) == 1


def test_D08_tokens_of_side_files_beside_tokenizer_json(tmp_path, caplog):
    """As in transformers, except that it gives any free id to a token whose id is not the next."""
    from transformers import PreTrainedTokenizerFast

    first = len(built("llama3"))
    decoder = {str(first): {"content": "[PAD]", "special": True}, str(first + 1): {"content": "<word>"}}
    save_folder(tmp_path, BUILT["llama3"], {**NAMES, "added_tokens_decoder": decoder})
    ours, theirs = LlamaTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode("a<word>[PAD]") == theirs.encode("a<word>[PAD]", split_special_tokens=True)
    assert {*ours.special_token_ids} - {*built("llama3").special_token_ids} == {first}
    assert not caplog.text

    # tokenizer.json has other tokens at these ids: it wins, and says so.
    decoder = {"5": {"content": "[PAD]"}, str(first - 1): {"content": "[END]"}}
    save_folder(tmp_path, BUILT["llama3"], {**NAMES, "added_tokens_decoder": decoder})
    assert read_tokenizer_files(tmp_path).backend.get_vocab() == BUILT["llama3"].get_vocab()
    assert "tokenizer.json has other tokens in place of those that the files beside it add: [PAD], [END]" in caplog.text

    decoder = {str(first + 1): {"content": "[PAD]"}}
    save_folder(tmp_path, BUILT["llama3"], {**NAMES, "added_tokens_decoder": decoder})
    with pytest.raises(TokenizerFileError, match=f"should have id {first + 1}, but has {first}"):
        read_tokenizer_files(tmp_path)


def test_D05_text_must_not_become_a_special_token(tmp_path):
    spec = json.loads(BUILT["llama3"].to_str())
    vocab, start = spec["model"]["vocab"], len(spec["model"]["vocab"])
    spec["model"]["vocab"] = {**vocab, "<s": start, "<s>": start + 1}
    spec["model"]["merges"] += [["<", "s"], ["<s", ">"]]
    tokens = zip(("<s>", "<unk>", "</s>", "<tool call>"), range(start + 1, start + 5), strict=True)
    flags = {token["content"]: token for token in spec["added_tokens"]}
    spec["added_tokens"] = [{**flags[content], "id": token_id} for content, token_id in tokens]
    spec["post_processor"] = None
    with pytest.raises(TokenizerFileError, match=f"the text '<s>' becomes the special token {start + 1} even where"):
        read_tokenizer_files(save_spec(tmp_path, spec))
    spec["model"]["merges"].pop()
    read_tokenizer_files(save_spec(tmp_path, spec))

    (tmp_path / "tokenizer.json").unlink()
    content = model_file([*PIECES, ("@", 0.0, CONTROL)])
    with pytest.raises(TokenizerFileError, match=f"the text '@' becomes the special token {len(PIECES)} even where"):
        read_tokenizer_files(save_model(tmp_path, content=content))


def test_ordinary_text_named_as_a_token_stays_text(tmp_path, caplog):
    """As in fine-tunes of Llama 3 that pad with "!"."""
    folder = save_folder(tmp_path / "a", BUILT["llama3"], {**NAMES, "pad_token": "a"})
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    assert "ordinary text, so not special although it is named: a" in caplog.text
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("a", BUILT["llama3"].token_to_id("a"))
    ids = tokenizer.encode("banana")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "banana"
    tokenizer.save_pretrained(tmp_path / "b")
    again = LlamaTokenizer.from_pretrained(tmp_path / "b")
    assert (again.pad_token, again.encode("banana")) == ("a", ids)


def test_T34_empty_names_of_the_first_conversions(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "", "eos_token": "", "unk_token": ""}))
    tokenizer = LlamaTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("")[0] == 1

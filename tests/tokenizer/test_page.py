"""The page's tokenizer, row by row of BEHAVIOURS.md (T: behaviours, E: examples, P: facts), against transformers."""

import copy
import functools
import itertools
import json
import logging
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

import llama_fast
from llama_fast import LlamaForCausalLM
from llama_fast.errors import ConfigError, RequestError, TokenizerFileError, UnsupportedError
from llama_fast.tokenizer import BatchEncoding, LlamaTokenizer, LlamaTokenizerFast
from tests.byte_model import save_byte_model
from tests.tokenizer_samples import BUILT, GENUINE, NAMES, built, byte_level, genuine, save_folder

SENTENCES = ["Hello this is a test", "a", "he ll  no</s>", "", "ä你"]


def with_pair(backend: Tokenizer) -> Tokenizer:
    """With a template for pairs, as real checkpoints have; the samples have one for single texts only."""
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(backend.to_str())
    bos = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", bos)])
    return backend


@functools.cache
def loaded(folder):
    from transformers import PreTrainedTokenizerFast

    # This folder has no config to name them.
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} if folder.name == "llama3" else {}
    ours, theirs = (cls.from_pretrained(folder, **names) for cls in (LlamaTokenizer, PreTrainedTokenizerFast))
    pad_token = ours.convert_ids_to_tokens(2)
    theirs.split_special_tokens = True
    for tokenizer in (ours, theirs):
        tokenizer.pad_token = pad_token
        tokenizer.padding_side = "left"
    return ours, theirs


@pytest.fixture(params=["built_llama2", "built_llama3", *GENUINE])
def both(request, tmp_path):
    """(ours, transformers') of the same files, with a pad token; special tokens in texts stay text in both."""
    name = request.param
    if name.startswith("built_"):
        return loaded(save_folder(tmp_path / "built", with_pair(BUILT[name.removeprefix("built_")]), NAMES))
    return loaded(request.getfixturevalue("shared_data") / name)


@pytest.fixture
def both_to_change(both):
    if len(both[0]) > 100_000:
        pytest.skip("copying Llama 3's takes seconds and shows nothing more")
    return copy.deepcopy(both)


def check_equal(ours: BatchEncoding, theirs) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    for name, column in theirs.items():
        if hasattr(column, "tolist"):
            assert type(ours[name]) is type(column)
            assert ours[name].dtype == column.dtype
            assert ours[name].tolist() == column.tolist(), name
        else:
            assert ours[name] == column, name


ALL_COLUMNS = {
    "return_token_type_ids": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
}
LENGTHS = [
    {},
    {"padding": True},
    {"padding": "longest", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 30},
    {"padding": "max_length", "max_length": 5, "pad_to_multiple_of": 4, "padding_side": "right"},
    {"padding": "do_not_pad", "truncation": True, "max_length": 5, "pad_to_multiple_of": 4},
    {"padding": True, "truncation": True, "max_length": 6},
    {"truncation": "longest_first", "max_length": 7, "padding_side": "right", "padding": True},
    {"truncation": "only_first", "max_length": 30},
    {"truncation": "do_not_truncate", "max_length": 4},
    {"truncation": False, "max_length": 4, "padding": "do_not_pad"},
    {"max_length": 5},
]


def test_T12_call_equals_transformers(both):
    ours, theirs = both
    assert list(ours("a")) == ["input_ids", "attention_mask"]  # no token_type_ids
    for side, columns, lengths, special in itertools.product(
        ("right", "left"), ({}, ALL_COLUMNS), LENGTHS, (False, True)
    ):
        arguments = {**lengths, "add_special_tokens": special}
        ours.truncation_side = theirs.truncation_side = side
        for texts in (SENTENCES, SENTENCES[:1], *SENTENCES):
            check_equal(ours(texts, **arguments, **columns), theirs(texts, **arguments, **columns))
            pairs = texts[::-1] if isinstance(texts, list) else "hello there"
            if arguments.get("truncation") != "only_first":
                check_equal(ours(texts, pairs, **arguments, **columns), theirs(texts, pairs, **arguments, **columns))
        for kind in ("pt", "np"):
            if len({len(row) for row in theirs(SENTENCES, **arguments)["input_ids"]}) == 1:
                check_equal(
                    ours(SENTENCES, return_tensors=kind, **arguments, **columns),
                    theirs(SENTENCES, return_tensors=kind, **arguments, **columns),
                )
            check_equal(
                ours("hello", return_tensors=kind, **arguments), theirs("hello", return_tensors=kind, **arguments)
            )


@given(
    texts=st.tuples(st.text("ab ", max_size=9), st.text("ab ", min_size=1, max_size=9)),
    max_length=st.integers(3, 20),
    strategy=st.sampled_from(["longest_first", "only_first", "only_second"]),
    side=st.sampled_from(["left", "right"]),
)
def test_truncation_of_pairs_equals_transformers(texts, max_length, strategy, side):
    from transformers import PreTrainedTokenizerFast

    backend = with_pair(BUILT["llama3"])
    ours = LlamaTokenizer.from_backend(Tokenizer.from_str(backend.to_str()), NAMES)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    ours.truncation_side = theirs.truncation_side = side
    arguments = {"max_length": max_length, "truncation": strategy, "return_token_type_ids": True}
    try:
        actual = ours(*texts, **arguments)
    except RequestError as error:
        with pytest.raises(Exception, match="Truncation error"):
            theirs(*texts, **arguments)
        assert "cannot be reached" in str(error)  # noqa: PT017
    else:
        check_equal(actual, theirs(*texts, **arguments))


def test_encode_tokenize_and_pad_equal_transformers(both):
    ours, theirs = both
    for text in SENTENCES:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, "hello", add_special_tokens=False) == theirs.encode(
            text, "hello", add_special_tokens=False
        )
        assert ours.tokenize(text) == theirs.tokenize(text, split_special_tokens=True)
        assert ours.tokenize(text, "hello", True) == theirs.tokenize(
            text, "hello", add_special_tokens=True, split_special_tokens=True
        )
        ids = ours.encode(text)
        tokens = theirs.convert_ids_to_tokens(ids)
        assert ours.convert_ids_to_tokens(ids) == tokens
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens) == ids
        assert ours.convert_ids_to_tokens(ids, True) == theirs.convert_ids_to_tokens(ids, True)
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)

    rows = [theirs(text, return_special_tokens_mask=True) for text in SENTENCES]
    for arguments in (
        {},
        {"pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40, "padding_side": "right"},
    ):
        check_equal(ours.pad([dict(row) for row in rows], **arguments), theirs.pad(rows, **arguments))
        check_equal(ours.pad(rows[0], **arguments), theirs.pad(rows[0], **arguments))
        lists = {"input_ids": [row["input_ids"] for row in rows]}
        for kind in ("pt", "np"):
            check_equal(
                ours.pad(lists, return_tensors=kind, **arguments),
                theirs.pad(dict(lists), return_tensors=kind, **arguments),
            )
    check_equal(ours.pad(lists, return_attention_mask=False), theirs.pad(dict(lists), return_attention_mask=False))
    tensors = [{"input_ids": torch.tensor(row["input_ids"])} for row in rows]
    assert ours.pad(tensors, return_tensors="pt").input_ids.tolist() == ours.pad(lists)["input_ids"]


def test_batch_encoding_is_dict_and_attributes(tmp_path):
    ours = LlamaTokenizer.from_pretrained(save_byte_model(tmp_path), pad_token="</s>")
    encoding = ours(["hello", "a"], padding=True, return_tensors="pt")
    assert isinstance(encoding, BatchEncoding)
    assert encoding.input_ids is encoding["input_ids"]
    assert encoding.input_ids.dtype == torch.int64
    assert set(encoding) == set(dict(**encoding)) == {"input_ids", "attention_mask"}
    assert encoding.to("cpu") is encoding
    assert encoding.to("meta").input_ids.device.type == "meta"
    assert pickle.loads(pickle.dumps(ours(["a"]))) == copy.deepcopy(ours(["a"])) == ours(["a"])
    with pytest.raises(AttributeError, match="labels"):
        _ = encoding.labels
    with pytest.raises(RequestError, match=r"input_ids has rows of different lengths \(2 to 6\).*padding=True"):
        ours(["hello", "a"], return_tensors="pt")
    with pytest.raises(UnsupportedError, match="return_tensors='tf'"):
        ours("a", return_tensors="tf")

    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model(**ours(["hello", "a"], padding=True, return_tensors="pt")).logits.shape == (2, 6, 258)


def test_E9_generate_from_input_ids_and_batch_decode(tmp_path):
    tokenizer = LlamaTokenizer.from_pretrained(save_byte_model(tmp_path))
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    inputs = tokenizer("Hey, are you conscious? Can you", return_tensors="pt")
    generate_ids = model.generate(inputs.input_ids, max_length=40)
    text = tokenizer.batch_decode(generate_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    assert text.startswith("Hey, are you conscious? Can you")
    assert tokenizer.decode(generate_ids[0], skip_special_tokens=True) == text


def test_batch_decode_equals_transformers(both):
    ours, theirs = both
    ids = ours(SENTENCES, padding=True)["input_ids"]
    for skip in (False, True):
        expected = theirs.batch_decode(ids, skip_special_tokens=skip)
        assert ours.batch_decode(ids, skip_special_tokens=skip) == expected
        assert ours.decode(np.array(ids), skip_special_tokens=skip) == expected
        assert ours.decode(list(torch.tensor(ids)), skip_special_tokens=skip) == expected
        assert ours.batch_decode(ids[0], skip_special_tokens=skip) == expected[:1]
    assert ours.decode([]) == theirs.decode([]) == ""


def test_T2_T13_names_and_sizes_equal_transformers(both):
    ours, theirs = both
    for name in ("special_tokens_map", "all_special_tokens", "all_special_ids", "extra_special_tokens", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (len(ours), ours.get_vocab(), ours.vocab) == (len(theirs), theirs.get_vocab(), theirs.get_vocab())
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert repr(ours.added_tokens_decoder) == repr(theirs.added_tokens_decoder)
    assert ours.is_fast
    assert ours.model_input_names == theirs.model_input_names[:1] + theirs.model_input_names[-1:]
    assert ours.num_special_tokens_to_add(True) == theirs.num_special_tokens_to_add(True)
    assert ours.max_len_single_sentence == theirs.max_len_single_sentence
    assert ours.max_len_sentences_pair == theirs.max_len_sentences_pair


def test_T3_padding_without_a_pad_token():
    tokenizer = built("llama2")
    for padding in (True, "longest"):
        with pytest.raises(RequestError, match=r"Asking to pad.*tokenizer\.pad_token = tokenizer\.eos_token"):
            tokenizer(["a", "he"], padding=padding)
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "hello"], padding=True)["input_ids"][0][:2] == [2, 2]
    tokenizer.pad_token_id = 0
    assert (tokenizer.pad_token, tokenizer.special_tokens_map["pad_token"]) == ("<unk>", "<unk>")
    tokenizer.pad_token_id = None
    assert tokenizer.pad_token is None


def test_new_tokens_are_refused_by_name(tmp_path):
    """Other than in transformers: a new id has no row in the model's embedding."""
    tokenizer = built("llama3")
    for change in (
        lambda: setattr(tokenizer, "pad_token", "[PAD]"),
        lambda: tokenizer.add_tokens("[PAD]"),
        lambda: tokenizer.add_tokens([AddedToken("[PAD]")], special_tokens=True),
        lambda: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
        lambda: tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]"]}),
        lambda: LlamaTokenizer.from_pretrained(save_folder(tmp_path, BUILT["llama3"]), pad_token="[PAD]"),
    ):
        with pytest.raises(UnsupportedError, match=r"'\[PAD\]' is not in the vocabulary.*embedding"):
            change()
    assert len(tokenizer) == len(built("llama3"))
    with pytest.raises(ConfigError, match="pad_token must be a string or an AddedToken; got int"):
        tokenizer.pad_token = 5
    with pytest.raises(ConfigError, match="'eso_token' is not known"):
        tokenizer.add_special_tokens({"eso_token": "a"})
    with pytest.raises(RequestError, match="pad_token_id=100000 is no id"):
        tokenizer.pad_token_id = 100_000


def test_tokens_of_the_vocabulary_can_be_made_special(both_to_change):
    ours, theirs = both_to_change
    token_id = ours.vocab_size - 9
    token = ours.convert_ids_to_tokens(token_id)
    for tokenizer in both_to_change:
        tokenizer.add_special_tokens({"pad_token": token, "extra_special_tokens": [tokenizer.bos_token, token]})
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.pad_token_id == theirs.pad_token_id == token_id
    assert ours.extra_special_tokens_ids == ours.additional_special_tokens_ids == [ours.bos_token_id, token_id]
    ids = [*ours.encode("hello"), token_id]
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode(f"a{token}b", split_special_tokens=False) == theirs.encode(
        f"a{token}b", split_special_tokens=False
    )
    ours.add_special_tokens({"additional_special_tokens": [ours.eos_token]}, replace_extra_special_tokens=False)
    assert ours.extra_special_tokens == [ours.bos_token, token, ours.eos_token]


def test_T4_T8_T9_arguments_without_effect_are_accepted_and_others_refused(tmp_path):
    folder = save_folder(tmp_path, BUILT["llama2"], NAMES)
    neutral = {"sp_model_kwargs": {}, "use_default_system_prompt": False, "spaces_between_special_tokens": False}
    assert LlamaTokenizer.from_pretrained(folder, use_fast=True, **neutral).encode("a") == built("llama2").encode("a")
    for name, value in {
        "sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.1},
        "use_default_system_prompt": True,
        "spaces_between_special_tokens": True,
        "trust_remote_code": True,
        "gguf_file": "a.gguf",
    }.items():
        with pytest.raises(UnsupportedError, match=name):
            LlamaTokenizer.from_pretrained(folder, **{name: value})
    for arguments in ({"padding_side": "up"}, {"truncation_side": 5}, {"model_max_length": "a"}):
        with pytest.raises(RequestError, match=next(iter(arguments))):
            LlamaTokenizer.from_pretrained(folder, **arguments)
    assert LlamaTokenizer.from_pretrained(folder, add_bos_token=None, pad_token=None).encode("a")[0] == 1
    tokenizer = built("llama2")
    for name, value in {
        "text_target": "a",
        "text_pair_target": "a",
        "stride": 1,
        "is_split_into_words": True,
        "return_overflowing_tokens": True,
    }.items():
        with pytest.raises(UnsupportedError, match=name):
            tokenizer("a", **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": []}, "empty list"),
        ({"text": [["a"]]}, r"text\[0\] must be a string; got list"),
        ({"text": "a", "text_pair": 5}, "text_pair must be a string; got int"),
        ({"text": ["a"], "text_pair": "b"}, "one text for each of the 1"),
        ({"text": ["a"], "text_pair": 5}, "one text for each of the 1"),
        ({"text": ["a"], "text_pair": [5]}, r"text_pair\[0\] must be a string; got int"),
        ({"text": ["a", "b"], "text_pair": ["b"]}, "one text for each of the 2"),
        ({"text": ["a", "\udfff"]}, r"text\[1\]\[0\] is the lone surrogate U\+DFFF"),
        ({"text": "a", "padding": "both"}, "padding must be.*'both'"),
        ({"text": "a", "padding": 1}, "padding must be.*got 1"),
        ({"text": "a", "padding": True, "padding_side": "up"}, "padding_side must be.*'up'"),
        ({"text": "a", "padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be.*got 0"),
        ({"text": "a", "truncation": "some"}, "truncation must be.*'some'"),
        ({"text": "a", "max_length": 0}, "max_length must be.*got 0"),
        ({"text": "a", "max_length": True}, "max_length must be.*got True"),
        ({"text": "a", "truncation": "only_second", "max_length": 1}, "max_length=1 cannot be reached"),
        (
            {"text": "a", "truncation": True, "padding": True, "max_length": 5, "pad_to_multiple_of": 4},
            "max_length=5 must be a multiple of pad_to_multiple_of=4",
        ),
        ({"text": "a", "split_special_tokens": True, "parse_special_tokens": True}, "opposites"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(RequestError, match=message):
        built("llama2", pad_token="<unk>")(**arguments)


def test_nothing_is_cut_without_a_word(caplog):
    tokenizer = built("llama2", model_max_length=5)
    assert len(tokenizer("hello hello")["input_ids"]) > 5
    tokenizer("hello hello")
    assert caplog.text.count("more than model_max_length=5; nothing is cut") == 1  # once
    assert tokenizer("hello hello", truncation=True)["input_ids"] == tokenizer.encode("hello hello", verbose=False)[:5]
    caplog.clear()
    for _ in range(2):
        assert len(tokenizer("hello hello", max_length=3)["input_ids"]) == 3
    assert caplog.text.count("cuts texts; pass truncation=True") == 1
    caplog.clear()
    unlimited = built("llama2", pad_token="<unk>")
    assert unlimited("hello", truncation=True) == unlimited("hello", padding="max_length") == unlimited("hello")
    assert caplog.text.count("pass max_length") == 1
    assert not [record for record in caplog.records if record.levelno != logging.WARNING]


def test_T5_T6_T24_T25_bos_and_eos_equal_transformers(both_to_change):
    ours, theirs = both_to_change
    assert (ours.add_bos_token, ours.add_eos_token) == (ours.encode("")[:1] == [ours.bos_token_id], False)
    for add_bos, add_eos in itertools.product((False, True), repeat=2):
        if ours.eos_token is None and add_eos:
            continue
        for tokenizer in both_to_change:
            tokenizer.add_bos_token, tokenizer.add_eos_token = add_bos, add_eos
        for text in SENTENCES:
            check_equal(
                ours(text, "b", return_token_type_ids=True, return_special_tokens_mask=True),
                theirs(text, "b", return_token_type_ids=True, return_special_tokens_mask=True),
            )
            assert ours.encode(text) == theirs.encode(text)
            ids = ours.encode(text, split_special_tokens=False)
            assert (ids[:1] == [ours.bos_token_id]) == add_bos
    # A new bos token counts after update_post_processor.
    for tokenizer in both_to_change:
        tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(2)
    before = ours.encode("a")
    for tokenizer in both_to_change:
        tokenizer.update_post_processor()
    assert ours.encode("a") == theirs.encode("a") == [2, *before[1:]]


def test_T5_T6_T24_arguments_of_from_pretrained(tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = save_folder(tmp_path, with_pair(BUILT["llama3"]), NAMES)
    for arguments in (
        {"add_bos_token": False, "add_eos_token": True},
        {"add_eos_token": True, "add_bos_token": True},
        {"bos_token": "<unk>", "add_bos_token": True, "eos_token": "<unk>"},
    ):
        ours = LlamaTokenizer.from_pretrained(folder, **arguments)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder, **arguments)
        assert ours.encode("hello") == theirs.encode("hello")
        assert (ours.add_bos_token, ours.add_eos_token) == (theirs.add_bos_token, theirs.add_eos_token)
        assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)

    nameless = LlamaTokenizer.from_backend(byte_level())
    assert (nameless.bos_token, nameless.add_bos_token) == (None, True)  # the file's post-processor adds it
    nameless.add_bos_token = False
    for name in ("bos_token", "eos_token"):
        with pytest.raises(ConfigError, match=f"add_{name} is True but there is no {name}"):
            setattr(copy.deepcopy(nameless), f"add_{name}", True)


def test_T20_T21_T22_agree_with_what_a_call_gives(both):
    ours, theirs = both
    for first, second in itertools.product(SENTENCES, [None, *SENTENCES]):
        columns = {"return_token_type_ids": True, "return_special_tokens_mask": True}
        expected = theirs(first, second, **columns)
        texts = [ours.encode(text, add_special_tokens=False) for text in (first, second) if text is not None]
        assert len(texts) == 1 + (second is not None)
        if second == "":
            continue  # transformers takes it for None, in a single text
        assert ours.build_inputs_with_special_tokens(*texts) == expected["input_ids"]
        assert ours.get_special_tokens_mask(*texts) == expected["special_tokens_mask"]
        assert ours.create_token_type_ids_from_sequences(*texts) == expected["token_type_ids"]
    with_specials = ours.build_inputs_with_special_tokens(ours.encode("hello", add_special_tokens=False))
    mask = ours.get_special_tokens_mask(with_specials, already_has_special_tokens=True)
    assert mask == theirs.get_special_tokens_mask(with_specials, already_has_special_tokens=True)
    with pytest.raises(RequestError, match="drop token_ids_1"):
        ours.get_special_tokens_mask([1], [1], already_has_special_tokens=True)


def test_T20_T22_pairs_repeat_the_bos(shared_data):
    tokenizer = genuine(shared_data, "tokenizers/tinyllama")
    assert tokenizer.build_inputs_with_special_tokens([5, 6], [7]) == [1, 5, 6, 1, 7]
    assert tokenizer.create_token_type_ids_from_sequences([5, 6], [7]) == [0, 0, 0, 1, 1]
    assert tokenizer.get_special_tokens_mask([5, 6], [7]) == [1, 0, 0, 1, 0]


def test_T23_save_vocabulary(shared_data, tmp_path):
    tokenizer = LlamaTokenizer.from_pretrained(shared_data / "tokenizers/llama2")
    (path,) = tokenizer.save_vocabulary(tmp_path, "prefix")
    assert path == str(tmp_path / "prefix-tokenizer.model")
    source = (shared_data / "tokenizers/llama2/tokenizer.model").read_bytes()
    assert (tmp_path / "prefix-tokenizer.model").read_bytes() == source
    (path,) = tokenizer.save_vocabulary(tmp_path)
    again = LlamaTokenizer.from_pretrained(tmp_path)
    assert again.save_vocabulary(tmp_path) == (path,)  # onto itself
    assert (tmp_path / "tokenizer.model").read_bytes() == source
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prefix-tokenizer.model", "tokenizer.model"]
    for folder, prefix in ((tmp_path / "nowhere", None), (tmp_path, "../a")):
        with pytest.raises(TokenizerFileError, match="must be a file name, and an existing folder"):
            tokenizer.save_vocabulary(folder, prefix)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(TokenizerFileError, match="could not be copied"):
        again.save_vocabulary(tmp_path, "x")
    with pytest.raises(TokenizerFileError, match=r"has no tokenizer\.model to copy"):
        built("llama3").save_vocabulary(tmp_path)


def encode_hello(tokenizer: LlamaTokenizer) -> list[int]:
    return tokenizer.encode("he</s>", split_special_tokens=False) + tokenizer.encode("he</s>")


def test_T26_copies_and_pickles():
    tokenizer = built("llama2", pad_token="<unk>")
    tokenizer.add_eos_token = True
    expected = encode_hello(tokenizer)
    for other in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert encode_hello(other) == expected
        assert (other.pad_token, other.special_token_ids) == (tokenizer.pad_token, tokenizer.special_token_ids)
        assert repr(other) == repr(tokenizer)
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).encode('he</s>'))"
    ran = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(tokenizer), capture_output=True, check=True)
    assert json.loads(ran.stdout) == tokenizer.encode("he</s>")
    assert tokenizer.unk_token_length == len(tokenizer.tokenize("<unk>")) == 6
    assert "vocab_size=287, len=288" in repr(tokenizer)


def test_E7_T40_one_class(shared_data):
    assert LlamaTokenizerFast is LlamaTokenizer is llama_fast.LlamaTokenizerFast
    tokenizer = LlamaTokenizerFast.from_pretrained(shared_data / "tokenizers/tinyllama")
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]


def test_E8_T10_T30_legacy(shared_data):
    """`split_special_tokens=False` is said here, where transformers parses special tokens by default."""
    folder = shared_data / "tokenizers/llama2"
    for legacy, last in ((True, 869), (False, 29889)):
        tokenizer = LlamaTokenizerFast.from_pretrained(folder, legacy=legacy, from_slow=True)
        expected = [1, 15043, 29871, 1, last]
        assert tokenizer.encode("Hello <s>.", split_special_tokens=False) == expected
        assert tokenizer.encode("Hello <s>.", parse_special_tokens=True) == expected
        assert tokenizer.encode("Hello <s>.") != expected  # text from strangers
        tokenizer.split_special_tokens = False
        assert tokenizer.encode("Hello <s>.") == expected
    tokenizer = LlamaTokenizer(folder / "tokenizer.model", legacy=True)
    assert tokenizer.encode("Hello <s>.", split_special_tokens=False) == [1, 15043, 29871, 1, 869]


def test_T1_T34_vocab_file(shared_data, tmp_path):
    path = shared_data / "tokenizers/llama2/tokenizer.model"
    tokenizer = LlamaTokenizer(path, add_eos_token=True, pad_token="</s>", chat_template="{{ messages[0].content }}")
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243, 2]
    assert (tokenizer.vocab_file, tokenizer.pad_token_id) == (str(path), 2)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    renamed = LlamaTokenizer(path, bos_token="<bos>", add_bos_token=False)
    assert (renamed.bos_token_id, renamed.convert_ids_to_tokens(1)) == (1, "<bos>")
    assert renamed.encode("Hello") == [15043]
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.model"):
        LlamaTokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(TokenizerFileError, match="nowhere"):
        LlamaTokenizer(tmp_path / "nowhere")


def test_T35_T41_settings_of_the_config_are_read_and_saved(tmp_path):
    assert built("llama2").padding_side == "left"
    config = {
        **NAMES,
        "padding_side": "right",
        "truncation_side": "left",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "additional_special_tokens": ["<unk>", {"content": "</s>"}],
        "split_special_tokens": False,  # does not count
    }
    first = LlamaTokenizer.from_backend(Tokenizer.from_str(BUILT["llama2"].to_str()), config)
    first.save_pretrained(tmp_path)
    second = LlamaTokenizer.from_pretrained(tmp_path, truncation_side="right", model_max_length=9)
    for tokenizer, side in ((first, "left"), (second, "right")):
        assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", side)
        assert list(tokenizer("a")) == ["input_ids", "token_type_ids", "attention_mask"]
        assert tokenizer.extra_special_tokens == ["<unk>", "</s>"]
        assert tokenizer.split_special_tokens
    assert second.model_max_length == 9
    second.pad_token = second.eos_token
    second.bos_token = None
    second.save_pretrained(tmp_path / "again")
    third = LlamaTokenizer.from_pretrained(tmp_path / "again")
    assert (third.pad_token, third.bos_token, third.model_max_length) == ("</s>", None, 9)
    assert third.name_or_path == str(tmp_path / "again")


@pytest.mark.parametrize(
    "config",
    [
        {"padding_side": "up"},
        {"truncation_side": 5},
        {"model_input_names": "input_ids"},
        {"model_input_names": [5]},
        {"extra_special_tokens": "<s>"},
        {"extra_special_tokens": [5]},
    ],
)
def test_settings_of_a_wrong_type(config):
    (name,) = config
    with pytest.raises(TokenizerFileError, match=name):
        built("llama2", **config)


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    tokenizer = built("llama2")
    tokenizer.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    tokenizer.padding_side = "right"
    with pytest.raises(TokenizerFileError, match="disk full"):
        tokenizer.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_P6_T37_first_word_has_no_space(shared_data):
    """ "Banana" is not given back with the space that its first token has."""
    tokenizer = genuine(shared_data, "tokenizers/tinyllama")
    ids = tokenizer.encode("Banana", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
    assert tokenizer.decode(ids) == "Banana"
    assert tokenizer.decode([*ids, *ids]) == "Banana Banana"


@pytest.mark.parametrize("name", ["genz-70b-gptq", "wizard-mega-13b-gptq"])
def test_T41_real_configs(shared_data, tmp_path, name):
    from transformers import AutoTokenizer

    shutil.copy(shared_data / "tokenizers/tinyllama/tokenizer.json", tmp_path)  # Llama 2's, as theirs
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(shared_data / f"configs/{name}.{file}", tmp_path / file)
    LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    for folder in (tmp_path, tmp_path / "saved"):
        ours, theirs = LlamaTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert ours.special_tokens_map == theirs.special_tokens_map
        assert (ours.padding_side, ours.model_max_length) == (theirs.padding_side, theirs.model_max_length)
        assert ours.encode("Hello this is a test") == theirs.encode("Hello this is a test")

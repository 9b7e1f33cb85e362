"""LlamaTokenizer against transformers and published vectors."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from llama_fast.errors import RequestError, TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from tests.tokenizer_samples import (
    BUILT,
    GENUINE,
    LLAMA_2_DECODER,
    NAMES,
    SPECIALS,
    TOKENIZERS,
    built,
    byte_level,
    genuine,
    load,
    save_folder,
    sentence_piece_like,
)

TEXTS = [
    "Hello this is a test",
    "",
    " ",
    "  two leading, two trailing  ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "naïve café über",
    "你好，世界",
    "🤗 family 👩‍👩‍👧 flag 🇩🇪",
    "שלום עולם",
    "NUL \0 inside",
    "don't we 've n't , . ? !",
    "�",
    "x" * 300,
]


def test_E7_published_encoding(shared_data):
    tokenizer = genuine(shared_data, "tokenizers/tinyllama")  # Llama 2's vocabulary
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]


# TinyLlama's vocabulary is Llama 2's.
@pytest.mark.parametrize(("vectors", "folder"), [("llama3", "tokenizers/llama3"), ("llama2", "tokenizers/tinyllama")])
def test_published_vectors(shared_data, vectors, folder):
    tokenizer = genuine(shared_data, folder)
    cases = json.loads((shared_data / "tokenizer_vectors.json").read_text())["encode"]
    cases = [case for case in cases if case["tokenizer"] == vectors]
    assert len(cases) >= 20
    for case in cases:
        flags = {"add_special_tokens": case["special"], "parse_special_tokens": case["parse_special"]}
        assert tokenizer.encode(case["text"], **flags) == case["ids"], case


@pytest.fixture(params=["built_llama2", "built_llama3", *GENUINE])
def with_oracle(request, tmp_path):
    """(our tokenizer, transformers' tokenizer on the same tokenizer.json)"""
    from transformers import PreTrainedTokenizerFast

    name = request.param
    if name.startswith("built_"):
        folder = save_folder(tmp_path / "built", BUILT[name.removeprefix("built_")], NAMES)
        return LlamaTokenizer.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    folder = request.getfixturevalue("shared_data") / name
    return load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_T38_equal_to_transformers(with_oracle):
    ours, theirs = with_oracle
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in [*TEXTS, "a<s>b</s> c", "<|begin_of_text|>hi<|eot_id|>\n"]:
        for special in (False, True):
            theirs.split_special_tokens = True
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(
                text, add_special_tokens=special, split_special_tokens=True
            )
            expected = theirs.encode(text, add_special_tokens=special, split_special_tokens=False)
            bos = theirs.encode("")[:1] if special else []
            if bos and expected[:2] == bos * 2:
                expected = expected[1:]  # theirs doubles the bos, ours does not
            ids = ours.encode(text, add_special_tokens=special, parse_special_tokens=True)
            assert ids == expected
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_T37_round_trip(name, text):
    """Byte-level BPE gives back every text; SentencePiece's too, by byte fallback, except that a space becomes ▁."""
    tokenizer = TOKENIZERS[name]
    text = text if name == "llama3" else text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_T37_first_word_loses_its_space(shared_data):
    tokenizer = genuine(shared_data, "tokenizers/tinyllama")
    assert tokenizer.decode([15043, 3186]) == "Hello world"
    assert tokenizer.decode([1, 15043, 2]) == "<s> Hello</s>"
    assert tokenizer.decode([1, 15043, 2], skip_special_tokens=True) == "Hello"


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from([*SPECIALS, "<", "s>", "</", " ", "a", "é", "\n"]), max_size=8))
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_D05_special_tokens_in_user_text_stay_text(name, pieces):
    tokenizer = TOKENIZERS[name]
    text = "".join(pieces)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Built vocabularies lack characters such as "<"; they go to bytes, never to <unk>.
    assert not tokenizer.special_token_ids & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<s>[INST] hello", "</s>", ["a", "<s>a"]])
def test_T38_special_token_written_at_the_start_is_logged_once(text, caplog):
    """Code ported from transformers renders a chat template and encodes the text, which here gives other ids."""
    tokenizer = built("llama3")
    for ordinary in ("a<s>", " <s>", "", "<s"):
        tokenizer(ordinary)
    tokenizer(text, parse_special_tokens=True)
    assert not caplog.text
    for _ in range(2):
        tokenizer(text)
    assert caplog.text.count("starts with a special token written out") == 1
    assert "parse_special_tokens=True" in caplog.text
    assert "apply_chat_template" in caplog.text


def test_D05_both_modes_at_once_from_several_threads():
    tokenizer = built("llama3")
    text = "a</s>" * 50
    expected = {parse: tokenizer.encode(text, parse_special_tokens=parse) for parse in (False, True)}
    assert expected[False] != expected[True]
    wrong = []

    def work(parse: bool) -> None:
        for _ in range(200):
            if tokenizer.encode(text, parse_special_tokens=parse) != expected[parse]:
                wrong.append(parse)

    threads = [threading.Thread(target=work, args=(bool(index % 2),)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_stored_truncation_and_padding_are_switched_off():
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=12)
    assert len(LlamaTokenizer.from_backend(backend).encode("abcdefgh")) == 9  # bos and eight bytes


def test_normalized_special_tokens_are_skipped():
    """tokenizers 0.23 compares the normalized text, "▁</s>", and shows it; old Llama 2 conversions have such tokens."""
    backend = sentence_piece_like(LLAMA_2_DECODER)
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["normalized"] = True
    tokenizer = LlamaTokenizer.from_backend(Tokenizer.from_str(json.dumps(spec)), NAMES)
    ids = [tokenizer.bos_token_id, *tokenizer.encode("hello", add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    stream = tokenizer.stream(skip_special_tokens=True)
    assert "".join(map(stream.push, ids)) == "hello"


@pytest.mark.parametrize(
    ("ids", "message"), [([5, -1], "index 1 .*-1"), ([2**32], "index 0"), ([5, "6"], "index 1 .*'6'")]
)
def test_ids_out_of_range(ids, message):
    with pytest.raises(RequestError, match=message):
        TOKENIZERS["llama2"].decode(ids)
    with pytest.raises(RequestError, match="token id must be"):
        TOKENIZERS["llama2"].stream().push(ids[-1])


def test_A14_ids_unknown_to_the_tokenizer_decode_to_nothing():
    tokenizer = TOKENIZERS["llama3"]
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, len(tokenizer), 2**32 - 1]) == "hello"
    assert tokenizer.stream().push(len(tokenizer)) == ""


def test_decode_takes_arrays_and_single_ids():
    import numpy as np
    import torch

    tokenizer = TOKENIZERS["llama3"]
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert (
        tokenizer.decode(np.array(ids))
        == tokenizer.decode(torch.tensor(ids))
        == tokenizer.decode(tuple(ids))
        == "hello"
    )
    assert tokenizer.decode(ids[0]) == tokenizer.decode(torch.tensor(ids[0])) == tokenizer.decode(ids[:1])
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "message"), [("ab\ud800", r"text\[2\].*U\+D800"), (b"ab", "bytes"), (None, "NoneType")]
)
def test_D06_text_that_is_no_text(text, message):
    with pytest.raises(RequestError, match=message):
        TOKENIZERS["llama2"].encode(text)


def test_T7_clean_up_flag_is_for_other_models_than_bpe():
    """As in transformers 5: Llama 3 checkpoints set the flag, and it would delete genuine spaces."""
    text = "we do n't , you 've ."
    tokenizer = built("llama3", clean_up_tokenization_spaces=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "we don't, you've."

    words = {word: index for index, word in enumerate(text.split())}
    backend = Tokenizer(models.WordLevel(words, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = LlamaTokenizer.from_backend(backend, {"clean_up_tokenization_spaces": True})
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "we don't, you've."
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == "we don't, you've."


def test_T4_dropout_is_refused():
    backend = sentence_piece_like(LLAMA_2_DECODER)
    backend.model.dropout = 0.1
    with pytest.raises(TokenizerFileError, match=r"model\.dropout is 0\.1"):
        LlamaTokenizer.from_backend(backend)

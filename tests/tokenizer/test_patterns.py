"""Which regular expressions a tokenizer.json may have, and those that are replaced by ones that match the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from llama_fast.errors import TokenizerFileError
from llama_fast.tokenizer import LlamaTokenizer
from llama_fast.tokenizer.patterns import REPLACED, bound_patterns
from tests.regex_samples import HOSTILE, PUBLISHED
from tests.tokenizer_samples import byte_level


def splitting(pattern: str) -> Tokenizer:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    return tokenizer


@pytest.mark.parametrize("name", PUBLISHED.keys() - {"DeepSeek, last spaces", "SentencePiece, both ends"})
def test_published_patterns_stay_as_they_are(name):
    tokenizer = splitting(PUBLISHED[name])
    before = tokenizer.to_str()
    bound_patterns(tokenizer)
    assert tokenizer.to_str() == before


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
def test_D03_other_patterns_are_refused(pattern):
    with pytest.raises(TokenizerFileError, match="pre_tokenizer has the regular expression .* linear"):
        LlamaTokenizer.from_backend(splitting(pattern))


def test_D03_normalizer_and_decoder_are_looked_at():
    for part, value in (
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex("(a+)+$"), "")])),
        ("decoder", decoders.Replace(Regex("(a+)+$"), "")),
    ):
        tokenizer = byte_level()
        setattr(tokenizer, part, value)
        with pytest.raises(TokenizerFileError, match=f"{part} has"):
            bound_patterns(tokenizer)


@pytest.mark.parametrize("pattern", REPLACED)
@given(text=st.text(" \n\r\t\u3000ab", max_size=30))
def test_replacements_match_the_same(pattern, text):
    original, replacement = (pre_tokenizers.Split(Regex(form), "isolated") for form in (pattern, REPLACED[pattern]))
    assert replacement.pre_tokenize_str(text) == original.pre_tokenize_str(text)


def test_replacement_is_put_into_the_tokenizer():
    tokenizer = splitting(r"\s+$")
    tokenizer.normalizer = normalizers.Replace(Regex("^ +| +$"), "")
    bound_patterns(tokenizer)
    spec = json.loads(tokenizer.to_str())
    assert spec["normalizer"]["pattern"]["Regex"] == REPLACED["^ +| +$"]
    assert spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == REPLACED[r"\s+$"]
    assert spec["pre_tokenizer"]["pretokenizers"][1]["type"] == "ByteLevel"
    assert tokenizer.encode("  a  ").tokens == ["<s>", "a"]

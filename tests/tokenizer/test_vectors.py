"""Published encodings, through every tokenizer file there is for them."""

import json

import pytest

from llama_fast.tokenizer import LlamaTokenizer
from llama_fast.tokenizer.files import read_tokenizer_files


def vectors(shared_data, tokenizer):
    cases = json.loads((shared_data / "tokenizer_vectors.json").read_text())["encode"]
    assert {case["tokenizer"] for case in cases} == {"llama2", "llama3"}  # else one is not tested below
    return [case for case in cases if case["tokenizer"] == tokenizer]


def encode(backend, case):
    """`special`: bos is added; `parse_special`: special tokens in the text are parsed."""
    backend.encode_special_tokens = not case["parse_special"]
    bos = [backend.token_to_id("<s>")] if case["special"] else []
    return bos + backend.encode(case["text"], add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("tokenizer", "folder", "legacy", "number"),
    [
        ("llama2", "llama2", True, 27),  # tokenizer.model; what SentencePiece gives is what legacy gives
        ("llama2", "tinyllama", None, 27),  # Llama 2's vocabulary in a tokenizer.json
        ("llama3", "llama3", None, 36),
    ],
)
def test_all_published_vectors(shared_data, tokenizer, folder, legacy, number):
    backend = read_tokenizer_files(shared_data / "tokenizers" / folder, legacy=legacy).backend
    cases = vectors(shared_data, tokenizer)
    assert len(cases) == number
    for case in cases:
        assert encode(backend, case) == case["ids"], case


def test_not_legacy_differs_where_a_text_starts_with_a_space(shared_data):
    """That space takes the place of the prefix, so there is one "▁" less. As in transformers."""
    backend = read_tokenizer_files(shared_data / "tokenizers/llama2", legacy=False).backend
    different = [case["text"] for case in vectors(shared_data, "llama2") if encode(backend, case) != case["ids"]]
    assert different == [case["text"] for case in vectors(shared_data, "llama2") if case["text"].startswith(" ")]


@pytest.mark.parametrize("folder", ["llama2", "tinyllama"])
def test_E7_with_bos(shared_data, folder):
    tokenizer = LlamaTokenizer.from_pretrained(shared_data / "tokenizers" / folder)
    assert tokenizer.encode("Hello this is a test") == [1, 15043, 445, 338, 263, 1243]

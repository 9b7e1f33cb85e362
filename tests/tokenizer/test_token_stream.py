"""TokenStream: what it gives out, joined, is the whole decode, and nothing is ever taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from tokenizers.decoders import DecodeStream

from llama_fast.errors import RequestError
from llama_fast.tokenizer import LlamaTokenizer
from tests.tokenizer_samples import BUILT, GENUINE, LLAMA_2_DECODER, TOKENIZERS, built, genuine, sentence_piece_like


@pytest.fixture(params=[*BUILT, *GENUINE])
def tokenizer(request: pytest.FixtureRequest) -> LlamaTokenizer:
    if request.param in BUILT:
        return TOKENIZERS[request.param]
    return genuine(request.getfixturevalue("shared_data"), request.param)


def id_sequences(tokenizer: LlamaTokenizer) -> st.SearchStrategy[list[int]]:
    """Any ids, and those that decoders treat in a special way often enough: bytes, spaces, specials, unknown."""
    backend = tokenizer._tokenizer
    bytes_ = [backend.token_to_id(f"<0x{byte:02X}>") for byte in (0x41, 0x20, 0x0A, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xFF)]
    pieces = [
        "▁",
        "▁▁",
        "▁▁▁",
        "Ġ",
        "Ġä",
        "ä",
        "½",
        "ł",
        "ð",
        "Ł",
        "ÿ",
        "�",
        "▁a",
        "a",
        "▁'",
        "'",
        "▁,",
        ".",
        "▁n",
        "t",
    ]
    often = [*bytes_, *(backend.token_to_id(piece) for piece in pieces)]
    often = [token_id for token_id in often if token_id is not None]
    often += [*sorted(tokenizer.special_token_ids)[:3], len(tokenizer) - 1, len(tokenizer) + 7]
    return st.lists(st.sampled_from(often) | st.integers(0, len(tokenizer) - 1), max_size=24)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_stream_joins_to_the_whole_decode(tokenizer, skip_special_tokens, clean_up):
    @settings(max_examples=60, deadline=None)
    @given(id_sequences(tokenizer))
    def check(ids):
        whole = tokenizer.decode(ids, skip_special_tokens, clean_up)
        stream = tokenizer.stream(skip_special_tokens, clean_up)
        given_out = ""
        for token_id in ids:
            given_out += stream.push(token_id)
            # So no U+FFFD is ever shown that the final text does not have at that place.
            assert whole.startswith(given_out)
        assert given_out + stream.finish() == whole
        assert stream.finish() == ""

    check()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([0x41, 0x80, 0xA0, 0xBF, 0xC2, 0xE0, 0xE4, 0xED, 0xF0, 0xF4, 0xFF]), max_size=12))
def test_byte_level_stream_replaces_invalid_utf8_as_rust_does(data):
    tokenizer = TOKENIZERS["llama3"]
    alphabet = {byte: char for char, byte in zip(sorted(pre_tokenizers.ByteLevel.alphabet()), _bytes(), strict=True)}
    ids = [tokenizer._tokenizer.token_to_id(alphabet[byte]) for byte in data]
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


def _bytes() -> list[int]:
    """GPT-2's table: the printable bytes, then the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*printable, *(byte for byte in range(256) if byte not in printable)]


@pytest.mark.parametrize("name", ["llama2", "metaspace", "llama3", "no_decoder"])
def test_stream_gives_text_early(name):
    """Only an unfinished character, or a byte run that may still turn invalid, is held back."""
    tokenizer = TOKENIZERS[name]
    stream = tokenizer.stream()
    ids = tokenizer.encode("hello , hello", add_special_tokens=False)
    texts = [stream.push(token_id) for token_id in ids]
    assert stream.finish() == ""
    assert all(texts[1:])


def test_D07_character_split_over_tokens_is_never_shown_broken():
    for name in ("llama2", "llama3"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("a🤗a", add_special_tokens=False)
        stream = tokenizer.stream()
        texts = [stream.push(token_id) for token_id in ids]
        assert len(ids) >= 6
        assert "".join(texts) == "a🤗a"
        assert "�" not in "".join(texts)


def test_stream_shows_an_incomplete_character_at_the_end():
    for name in ("llama2", "llama3"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode("a🤗", add_special_tokens=False)[:-1]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) == "a"
        assert "a" + stream.finish() == tokenizer.decode(ids)
        assert "�" in tokenizer.decode(ids)


def test_control_decode_stream_of_tokenizers_does_not_satisfy_this():
    """Why TokenStream exists; when this fails, the library's own stream may serve."""
    backend = BUILT["llama2"]
    ids = [backend.token_to_id(token) for token in ("<0x41>", "<0xFF>", "▁a")]
    assert backend.decode(ids) == "�� a"
    stream = DecodeStream(skip_special_tokens=True)
    assert stream.step(backend, ids[0]) == "A"
    with pytest.raises(Exception, match="Invalid prefix"):
        [stream.step(backend, token_id) for token_id in ids[1:]]


def test_stream_work_does_not_grow_with_the_text(monkeypatch):
    """Counts the tokens handed to the library's decoder, instead of timing."""
    tokenizer = built("llama2")
    stream = tokenizer.stream()
    counted = 0

    class Counting:
        def __init__(self, stages):
            self.stages = stages

        def decode(self, tokens):
            nonlocal counted
            counted += len(tokens)
            return self.stages.decode(tokens)

    monkeypatch.setattr(stream._text, "_stages", Counting(stream._text._stages))
    ids = tokenizer.encode("hello 🤗 ", add_special_tokens=False) * 500
    for token_id in ids:
        stream.push(token_id)
    assert counted <= 2 * len(ids)


def test_unknown_decoder_streams_at_the_end_and_says_so(caplog):
    tokenizer = LlamaTokenizer.from_backend(sentence_piece_like([decoders.CTC(pad_token="logged once per decoder")]))
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    for _ in range(2):
        stream = tokenizer.stream()
        assert not any(map(stream.push, ids))
        assert stream.finish() == tokenizer.decode(ids)
    assert caplog.text.count("logged once per decoder") == 1


def test_D02_panic_of_an_unknown_decoder():
    tokenizer = LlamaTokenizer.from_backend(sentence_piece_like([*LLAMA_2_DECODER[:3], decoders.Strip(" ", 1, 1)]))
    stream = tokenizer.stream()
    with pytest.raises(RequestError, match="could not be decoded"):
        tokenizer.decode([])
    with pytest.raises(RequestError, match="could not be decoded"):
        stream.finish()


def test_push_after_finish_is_refused():
    stream = TOKENIZERS["llama2"].stream()
    stream.finish()
    with pytest.raises(RequestError, match="push after finish"):
        stream.push(5)

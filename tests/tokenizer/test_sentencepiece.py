"""tokenizer.model: what its fields mean, and which files are refused."""

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from llama_fast.errors import TokenizerFileError
from llama_fast.tokenizer.sentencepiece_conversion import convert_sentencepiece
from tests.sentencepiece_samples import (
    BYTES,
    CONTROL,
    NORMAL,
    NORMALIZER,
    PIECES,
    REFUSED,
    SPECIALS,
    TRAINER,
    USER_DEFINED,
    WHOLE,
    WORDS,
    field,
    message,
    model_file,
    trained,
    varint,
)


def convert(content=None, legacy=False, **arguments):
    return convert_sentencepiece(content or model_file(), "tokenizer.model", legacy=legacy, **arguments)


def theirs(content):
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def test_E7_published_ids(shared_data):
    content = (shared_data / "tokenizers/llama2/tokenizer.model").read_bytes()
    for legacy in (False, True):
        assert convert(content, legacy).encode("Hello this is a test").ids == [15043, 445, 338, 263, 1243]


def test_E8_legacy_and_not(shared_data):
    content = (shared_data / "tokenizers/llama2/tokenizer.model").read_bytes()
    assert convert(content, legacy=True).encode("Hello <s>.").ids == [15043, 29871, 1, 869]
    assert convert(content, legacy=False).encode("Hello <s>.").ids == [15043, 29871, 1, 29889]


def test_T30_T31_prefix():
    def tokens(text, **arguments):
        return convert(**arguments).encode(text).tokens

    assert tokens("he<s>he he", legacy=True) == ["▁he", "<s>", "▁he", "▁he"]
    assert tokens("he<s>he he", legacy=False) == ["▁he", "<s>", "he", "▁he"]
    assert tokens("<s>he", legacy=True) == ["<s>", "▁he"]
    assert tokens("<s>he", legacy=False) == ["<s>", "he"]
    for legacy in (True, False):
        assert tokens("he", legacy=legacy, add_prefix_space=False) == ["he"]
        assert tokens("", legacy=legacy) == []


def test_T11_add_prefix_space_is_otherwise_what_the_file_says():
    unprefixed = model_file(normalizer={**NORMALIZER, 3: False})
    for legacy in (True, False):
        assert convert(unprefixed, legacy).encode("he").tokens == ["he"]
        assert convert(unprefixed, legacy, add_prefix_space=True).encode("he").tokens == ["▁he"]
        assert convert(unprefixed, legacy).decode([262]) == " he" == theirs(unprefixed).decode([262])
        assert convert(legacy=legacy).decode([262]) == "he" == theirs(model_file()).decode([262])


def test_T33_bytes():
    tokenizer = convert()
    assert tokenizer.encode("é").tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode([3 + byte for byte in "né".encode()]) == "né"
    # sentencepiece keeps the "n".
    assert tokenizer.decode([3 + byte for byte in b"n\xc3"]) == "\ufffd\ufffd"
    assert theirs(model_file()).decode([3 + byte for byte in b"n\xc3"]) == "n\ufffd"


def test_unknown_characters_without_bytes_are_one_unk():
    content = model_file([*SPECIALS, *WORDS], {3: 2})
    tokenizer = convert(content, legacy=True)
    assert tokenizer.encode("heéñhe").ids == theirs(content).encode("heéñhe")
    assert tokenizer.encode("heéñhe").tokens == ["▁he", "<unk>", "he"]


def test_T34_first_three_pieces_are_unk_bos_eos():
    names = ["<unknown>", "<|start|>", "<|end|>"]
    pieces = [(name, 0.0, kind) for name, (_, _, kind) in zip(names, SPECIALS, strict=True)]
    content = model_file([*pieces, *BYTES, *WORDS])
    tokenizer = convert(content)
    assert [tokenizer.id_to_token(index) for index in range(3)] == names
    assert tokenizer.encode("<|start|>he<s>").ids[0] == 1
    renamed = convert(content, added_tokens={1: AddedToken("<s>", normalized=False, special=True)})
    assert renamed.encode("<s>he<|start|>").ids[:2] == [1, tokenizer.token_to_id("he")]
    assert renamed.get_vocab_size() == len(PIECES)


def test_control_and_user_defined_pieces_are_added_tokens():
    content = model_file([*SPECIALS, *BYTES, *WORDS, ("<ctl>", 0.0, CONTROL), ("b.b", 0.0, USER_DEFINED)])
    tokenizer = convert(content)
    added = tokenizer.get_added_tokens_decoder()
    assert {index: (token.content, token.special) for index, token in added.items()} == {
        **{index: (name, True) for index, (name, _, _) in enumerate(SPECIALS)},
        len(PIECES): ("<ctl>", True),
        len(PIECES) + 1: ("b.b", False),
    }
    tokenizer.encode_special_tokens = True
    for text in ("heb.bhe b.b.b", "he<ctl>b.b"):
        assert tokenizer.encode(text).ids == theirs(content).encode(text)
    # The documented difference: sentencepiece puts the prefix before a user-defined piece too.
    assert tokenizer.encode("b.bhe").tokens == ["b.b", "he"]
    assert theirs(content).encode("b.bhe", out_type=str) == ["▁", "b.b", "he"]


def test_trained_user_defined_pieces():
    content = trained(user_defined_symbols="<tool>,zz")
    tokenizer = convert(content)
    text = "the ball<tool> was zzzzz"
    assert tokenizer.encode(text).ids == theirs(content).encode(text)


def test_added_tokens_get_their_ids_and_flags():
    pad = AddedToken("[PAD]", normalized=False, special=True)
    word = AddedToken("hello", normalized=False, lstrip=True)
    tokenizer = convert(added_tokens={len(PIECES) + 1: word, len(PIECES): pad})
    assert tokenizer.encode("[PAD]he hello").ids == [len(PIECES), tokenizer.token_to_id("he"), len(PIECES) + 1]
    assert tokenizer.get_added_tokens_decoder()[len(PIECES)].special
    # A piece may become an added token where it is.
    at = [piece for piece, *_ in PIECES].index("llo")
    assert convert(added_tokens={at: AddedToken("llo", normalized=False)}).encode("llo").ids == [at]


@pytest.mark.parametrize(
    ("index", "content"),
    [
        (len(PIECES) + 1, "[PAD]"),  # a hole
        (5, "[PAD]"),  # a byte's id
        (len(PIECES) - 1, "[PAD]"),  # another piece's id
        (len(PIECES), "</s>"),  # has an id
        (1, "he"),  # is a piece
    ],
)
def test_D04_added_token_that_cannot_have_its_id(index, content):
    with pytest.raises(TokenizerFileError, match=rf"tokenizer\.model: the added token .* should have id {index}"):
        convert(added_tokens={index: AddedToken(content)})


def test_pieces_of_equal_score_are_refused_except_runs_of_one_character():
    runs = [("▁" * length, -99.0, NORMAL) for length in range(2, 17)]
    content = model_file([*PIECES, *runs])
    for length in range(100):
        assert convert(content, legacy=True).encode(" " * length).ids == theirs(content).encode(" " * length)
    # Which of two is merged first depends on the text; no list of merges does that.
    content = model_file([*PIECES, ("ob", -50.0, NORMAL), ("bo", -50.0, NORMAL)])
    assert theirs(content).encode("hobo", out_type=str)[2:] == ["ob", "o"]
    assert theirs(content).encode("hbob", out_type=str)[2:] == ["bo", "b"]
    with pytest.raises(TokenizerFileError, match="'bo' and 'ob' have the same score"):
        convert(content)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    content, message_part = REFUSED[name]
    with pytest.raises(TokenizerFileError, match=message_part) as error:
        convert_sentencepiece(content, "tokenizer.model", legacy=False)
    assert str(error.value).startswith("tokenizer.model: ")


def test_why_text_normalization_is_refused():
    """The same map, in `tokenizers` and in sentencepiece."""
    content = trained(normalization_rule_name="nmt_nfkc")
    with pytest.raises(TokenizerFileError, match="precompiled_charsmap is 240007 bytes"):
        convert(content)
    start = content.index(b"nmt_nfkc") + len(b"nmt_nfkc") + 4  # behind tag and size, which take 1 and 3 bytes
    normalize = normalizers.Precompiled(content[start : start + 240007]).normalize_str
    for text, equal in (("ﬁ ½ Ａ", True), ("a\r\nb", False)):
        assert (theirs(content).normalize(text) == "▁" + normalize(text).replace(" ", "▁")) == equal


def test_cut_anywhere_is_refused():
    """What is left of a file whose end is missing is never taken for a smaller vocabulary."""
    for length in range(len(WHOLE)):
        with pytest.raises(TokenizerFileError):
            convert_sentencepiece(WHOLE[:length], "tokenizer.model", legacy=False)


DAMAGE = st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 9), st.binary(max_size=9))


@settings(max_examples=1000)
@given(
    st.lists(st.one_of(DAMAGE, DAMAGE.map(lambda damage: (-1 - damage[0] % 50, *damage[1:]))), min_size=1, max_size=3)
)
def test_damaged_file_is_refused_or_means_what_sentencepiece_reads(damages):
    """Each damage puts some bytes in place of others; half of them near the end, where the settings are."""
    content = bytearray(WHOLE)
    for at, removed, inserted in damages:
        at %= len(content)
        content[at : at + removed] = inserted
    try:
        ours, reference = convert(bytes(content), legacy=True), theirs(bytes(content))
    except (TokenizerFileError, RuntimeError):  # sentencepiece refuses damage in what is not read here
        return
    if len(ours.get_added_tokens_decoder()) == len(SPECIALS):  # no character became a special token
        for text in ("he hello ab", "  x▁ é\n  ", "hell o.n"):
            assert ours.encode(text).ids == reference.encode(text)


def test_unknown_fields_are_skipped():
    more = field(1000, b"self test") + field(99, 7) + field(98, 1.5) + varint(97 << 3 | 1) + bytes(8)
    trainer = message({**TRAINER, 1: b"input.txt", 4: 273, 44: " ⁇ "}) + more
    assert convert(WHOLE + more + field(2, trainer)).to_str() == convert().to_str()


def test_message_in_parts_is_their_sum():
    parts = model_file(trainer={3: 2}) + field(2, message({35: True}))
    assert convert(parts).to_str() == convert().to_str()

"""StoppableText and Sample: where a text ends, what is handed out when, and why a sample finished."""

import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.engine.request import StoppableText
from llama_fast.engine.sampling import GenerationDefaults
from tests.tiny import make_request
from tests.tokenizer_samples import TOKENIZERS

# Byte-level, SentencePiece with byte fallback, and a decoder whose text comes all at the end.
NAMES = ["llama3", "llama2", "ctc"]
# One to four bytes a character; "�" also stands for bytes that are no character.
ALPHABET = "abl é你🤗�"


def _cut(pieces, stops, min_tokens):
    """The rule, with nothing held back: (text, stop string, tokens used).

    After each token the whole text so far is searched. The leftmost stop string wins, the longest among those that
    start at one place; text of tokens below `min_tokens` is not searched.
    """
    text, search_from = "", 0
    for count, piece in enumerate(pieces, start=1):
        text += piece
        if min(count, len(pieces) - 1) < min_tokens:  # the last piece comes with no token of its own
            search_from = len(text)
            continue
        found = [(text.find(stop, search_from), -len(stop), stop) for stop in stops]
        found = [hit for hit in found if hit[0] >= 0]
        if found:
            start, _, stop = min(found)
            return text[:start], stop, count
    return text, None, len(pieces)


def _run(tokenizer, ids, stops, min_tokens=0):
    """The pieces that StoppableText hands out, and its final state."""
    text = StoppableText(tokenizer.stream(), tuple(stops))
    pieces = []
    for count, token_id in enumerate(ids, start=1):
        pieces.append(text.push(token_id, count >= min_tokens))
        if text.stop_string is not None:
            return pieces, text
    pieces.append(text.finish(len(ids) >= min_tokens))
    return pieces, text


@st.composite
def _streams(draw):
    """A tokenizer, ids that spell text in many scripts mixed with ids at random, and stops that often occur in it."""
    name = draw(st.sampled_from(NAMES))
    tokenizer = TOKENIZERS[name]
    spelled = tokenizer.encode(draw(st.text(ALPHABET, max_size=12)), add_special_tokens=False)
    any_ids = draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=6))
    cut = draw(st.integers(0, len(spelled)))
    ids = spelled[:cut] + any_ids + spelled[cut:]
    whole = tokenizer.decode(ids)
    stops = draw(st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=2))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, max(0, len(whole) - 1)))
        stops.append(whole[start : start + draw(st.integers(1, 5))] or "a")
    return tokenizer, ids, stops


@settings(max_examples=300)
@given(_streams(), st.integers(0, 8))
def test_G10_any_tokens_and_stops_against_searching_the_text_so_far(stream, min_tokens):
    tokenizer, ids, stops = stream
    stepwise = tokenizer.stream()
    expected = _cut([*map(stepwise.push, ids), stepwise.finish()], stops, min_tokens)
    pieces, text = _run(tokenizer, ids, stops, min_tokens)
    assert (text.text, text.stop_string, len(pieces)) == expected
    assert "".join(pieces) == text.text


@settings(max_examples=300)
@given(_streams())
def test_G10_text_against_the_whole_decode(stream):
    """No stream in the oracle: str.find on the decode of all ids."""
    tokenizer, ids, stops = stream
    whole = tokenizer.decode(ids)
    _, text = _run(tokenizer, ids, stops)
    assert whole.startswith(text.text)
    assert not any(stop in text.text for stop in stops)
    if any(stop in whole for stop in stops):
        assert whole.startswith(text.text + text.stop_string)
    else:
        assert (text.text, text.stop_string) == (whole, None)
    for stop in stops:
        assert _run(tokenizer, ids, [stop])[1].text == whole.partition(stop)[0]


def _ids(text, name="llama3"):
    return TOKENIZERS[name].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(
    ("spoken", "stops", "expected"),
    [
        ("bell done", ["ll d"], "be"),  # over token borders
        ("ab你cd", ["b你"], "a"),  # ends in a character of several tokens
        ("a🤗🤗b", ["🤗b"], "a🤗"),  # the first 🤗 might have begun it
        ("ababac", ["abac"], "ab"),  # a false start inside a false start
        ("ab", ["ab"], ""),  # the whole text
        ("abcd", ["cd", "b", "bcd"], "a"),  # the earliest, whatever the order
        ("abcd", ["d", "c"], "ab"),
        ("hello", ["hellos"], "hello"),  # only begun: given back
        ("ab", ["ab", "a"], ""),
    ],
)
def test_G10_stop_strings(name, spoken, stops, expected):
    _, text = _run(TOKENIZERS[name], _ids(spoken, name), stops)
    assert text.text == expected


def test_G10_longest_of_the_stops_that_start_at_one_place():
    """One token brings both."""
    (token_id,) = _ids("he")
    _, text = _run(TOKENIZERS["llama3"], [token_id], ["h", "he"])
    assert (text.text, text.stop_string) == ("", "he")


def test_G10_nothing_is_held_back_longer_than_it_may_begin_a_stop():
    pieces, text = _run(TOKENIZERS["llama3"], _ids("abcbcd!"), ["bcd", "xyz"])
    assert pieces == ["a", "", "", "bc", "", ""]
    assert (text.text, text.stop_string) == ("abc", "bcd")


def test_G10_stop_that_only_the_end_of_the_stream_completes():
    """An unfinished character becomes U+FFFD when nothing follows."""
    ids = _ids("a🤗")[:-1]
    pieces, text = _run(TOKENIZERS["llama3"], ids, ["�"])
    assert pieces == ["a", "", "", "", ""]
    assert (text.text, text.stop_string) == ("a", "�")


# --- Sample -----------------------------------------------------------------------------------------------------------

_MODEL = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=len(TOKENIZERS["llama3"])))
_EOS = TOKENIZERS["llama3"].eos_token_id


def _sample(**params):
    defaults = GenerationDefaults(eos_token_id=_EOS)
    request = make_request(_MODEL, _ids("hi"), tokenizer=TOKENIZERS["llama3"], defaults=defaults, **params)
    return request.samples[0]


def _feed(sample, ids):
    """Append ids until the sample ends; returns the texts handed out."""
    texts = []
    for token_id in ids:
        sample.append(token_id)
        texts.append(sample.news()[0])
        if sample.finish_reason is not None:
            break
    return texts


@pytest.mark.parametrize(
    ("ids", "params", "expected"),
    [
        ([_EOS], {"max_tokens": 9}, ("", 1, "stop", _EOS)),
        ([*_ids("ab"), _EOS], {"max_tokens": 9}, ("ab", 3, "stop", _EOS)),
        ([*_ids("ab"), _EOS], {"max_tokens": 3}, ("ab", 3, "stop", _EOS)),  # eos as the last token allowed
        (_ids("abc"), {"max_tokens": 3}, ("abc", 3, "length", None)),
        (_ids("abc"), {"max_tokens": 3, "stop": "c"}, ("ab", 3, "stop", "c")),  # stop with the last token allowed
        (_ids("abc"), {"max_tokens": 3, "stop": "cd"}, ("abc", 3, "length", None)),  # held back, then given out
        (_ids("abcd"), {"max_tokens": 9, "stop_token_ids": _ids("c")}, ("ab", 3, "stop", _ids("c")[0])),
        (
            [*_ids("a"), _EOS, *_ids("bc")],
            {"max_tokens": 9, "ignore_eos": True, "stop_token_ids": _ids("c")},
            ("ab", 4, "stop", _ids("c")[0]),
        ),
        ([_EOS, *_ids("ab")], {"max_tokens": 3, "min_tokens": 2}, ("ab", 3, "length", None)),
        ([*_ids("a"), _EOS], {"max_tokens": 3, "min_tokens": 2}, ("a", 2, "stop", _EOS)),
        # "ab" is complete, but began below min_tokens; the second one counts.
        (_ids("abab"), {"max_tokens": 9, "min_tokens": 2, "stop": "ab"}, ("ab", 4, "stop", "ab")),
        (_ids("abb"), {"max_tokens": 9, "min_tokens": 3, "stop": "b"}, ("ab", 3, "stop", "b")),
        (_ids("a🤗")[:-1], {"max_tokens": 4, "stop": "�"}, ("a", 4, "stop", "�")),
    ],
)
def test_why_and_where_a_sample_ends(ids, params, expected):
    sample = _sample(**params)
    texts = _feed(sample, ids)
    output = sample.output()
    assert (output.text, len(output.token_ids), output.finish_reason, output.stop_reason) == expected
    assert "".join(texts) == output.text
    assert output.token_ids == ids[: len(texts)]


def test_special_tokens_in_the_text():
    ids = [*_ids("a"), _EOS, *_ids("b")]
    for skip, text in ((True, "ab"), (False, "a</s>b")):
        sample = _sample(max_tokens=3, ignore_eos=True, skip_special_tokens=skip)
        _feed(sample, ids)
        assert sample.output().text == text


def test_abort_gives_out_what_was_held_back():
    sample = _sample(max_tokens=9, stop="bcd")
    assert _feed(sample, _ids("abc")) == ["a", "", ""]
    sample.finish("abort")
    assert (sample.output().text, sample.output().finish_reason) == ("abc", "abort")


@pytest.mark.parametrize(("prompt", "answer"), [("hello", " all"), ("hello", "hello"), ("he\n", " ll"), ("é", "é")])
@pytest.mark.parametrize("name", ["llama3", "llama2", "no_strip", "metaspace", "replace", "no_decoder"])
def test_text_goes_on_where_the_prompt_ends(name, prompt, answer):
    """It is what the whole decode has behind the prompt's, whatever the decoder does at the front of a text."""
    tokenizer = TOKENIZERS[name]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids + ids)
    assert whole.startswith(before)
    sample = make_request(_MODEL, prompt_ids, tokenizer=tokenizer, max_tokens=len(ids)).samples[0]
    texts = _feed(sample, ids)
    assert "".join(texts) == sample.output().text == whole.removeprefix(before)

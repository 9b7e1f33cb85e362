"""Perplexity equals transformers' loss over the same windows; every token is scored once."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM as HFModel

from llama_fast import LLM, LlamaForCausalLM, LlamaTokenizer
from llama_fast.engine.perplexity import MAX_DEFAULT_CONTEXT, _windows, load_for_perplexity, perplexity
from llama_fast.errors import NonFiniteLogitsError, RequestError
from tests.byte_model import save_byte_model

TEXT = "Grüße, 世界! Once upon a time there was a little girl. " * 3


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def folder(request, tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("model"), adds_bos=request.param)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_batch=3, max_seq_len=200)


@torch.no_grad()
def their_losses(folder, token_ids, context, stride, bos):
    """Transformers' loss of every token, in windows of at most `context` tokens that start every `stride` tokens.

    token_ids: the text's, without bos. bos: the id that starts every window, or None: a window starts with the token
    before its own.
    """
    model = HFModel.from_pretrained(folder, dtype=torch.float32)
    losses = {} if bos is not None else {0: None}
    begin = 0 if bos is not None else 1
    while len(losses) < len(token_ids):
        own = range(begin, min(begin + context - 1, len(token_ids)))
        window = [token_ids[begin - 1] if bos is None else bos, *(token_ids[i] for i in own)]
        logits = model(torch.tensor([window])).logits[0, :-1]
        values = torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        for i, value in zip(own, values.tolist(), strict=True):
            losses.setdefault(i, value)  # what an earlier window scored stays
        begin += stride
    return [value for value in losses.values() if value is not None]


@pytest.mark.parametrize(("context", "stride"), [(200, None), (64, None), (64, 32), (64, 1), (17, 16), (2, None)])
def test_equals_transformers(folder, llm, context, stride):
    token_ids = llm.tokenizer.encode(TEXT, add_special_tokens=False)
    bos = llm.tokenizer.bos_token_id if llm.tokenizer.encode("") else None
    losses = their_losses(folder, token_ids, context, stride or context - 1, bos)
    result = perplexity(llm, TEXT, context=context, stride=stride)
    assert result.num_tokens == len(losses) == len(token_ids) - (bos is None)
    assert result.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert result.negative_log_likelihood == pytest.approx(math.fsum(losses), rel=1e-5)
    assert result.num_bytes == len(TEXT.encode())
    assert result.bits_per_byte == pytest.approx(math.fsum(losses) / math.log(2) / result.num_bytes, rel=1e-5)
    assert (result.context, result.stride) == (context, stride or context - 1)


def test_real_model_equals_transformers(shared_data):
    folder = shared_data / "stories260K"
    text = (shared_data / "text" / "tinystories_2MB.txt").read_text(encoding="utf-8")[:2000]
    llm = load_for_perplexity(folder, 256)
    token_ids = llm.tokenizer.encode(text, add_special_tokens=False)
    losses = their_losses(folder, token_ids, 256, 128, llm.tokenizer.bos_token_id)
    result = perplexity(llm, text, stride=128)
    assert result.perplexity == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)
    assert result.perplexity < 10  # it was trained on such stories
    assert result.num_windows > 3


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert perplexity(LLM(tmp_path, max_batch=1), TEXT).perplexity == pytest.approx(258, rel=1e-6)


def test_is_the_same_in_any_batch(folder, llm):
    alone = LLM(folder, max_batch=1, max_seq_len=64)
    assert perplexity(llm, TEXT, context=64, stride=20) == perplexity(alone, TEXT, stride=20)


def test_a_smaller_stride_is_another_result(llm):
    assert perplexity(llm, TEXT, context=64).perplexity != perplexity(llm, TEXT, context=64, stride=32).perplexity


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(2, 12), st.data(), st.booleans())
def test_windows_score_every_token_once(num_tokens, context, data, repeat_first):
    stride = data.draw(st.integers(1, context - 1))
    token_ids = list(range(100, 100 + num_tokens))
    windows = list(_windows(token_ids, context, stride, repeat_first=repeat_first))
    scored = [token_id for window in windows for token_id in window.token_ids[window.first_scored :]]
    assert scored == token_ids[1:]
    for number, window in enumerate(windows):
        first, *rest = window.token_ids
        assert len(window.token_ids) <= context
        assert rest == list(range(rest[0], rest[0] + len(rest)))
        assert rest[0] == 101 + number * stride
        assert first == (100 if repeat_first else rest[0] - 1)
        assert 1 <= window.first_scored < len(window.token_ids)


def test_default_context_is_the_models_up_to_a_limit(folder):
    assert load_for_perplexity(folder).engine.max_seq_len == MAX_DEFAULT_CONTEXT == 2048
    llm = load_for_perplexity(folder, 100, max_batch=2)
    assert (llm.engine.max_seq_len, llm.engine.max_batch) == (100, 2)
    assert perplexity(llm, TEXT).context == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context=1 must be 2 to 200"),
        ({"context": 201}, "context=201 must be 2 to 200"),
        ({"stride": 0}, "stride=0 must be 1 to context - 1 = 199"),
        ({"context": 64, "stride": 64}, "stride=64 must be 1 to context - 1 = 63"),
    ],
)
def test_windows_out_of_range(llm, options, message):
    with pytest.raises(RequestError, match=message):
        perplexity(llm, TEXT, **options)


def test_texts_that_are_too_short(llm):
    with pytest.raises(RequestError, match="the text has 0 tokens"):
        perplexity(llm, "")
    if llm.tokenizer.encode(""):
        assert perplexity(llm, "a").num_tokens == 1
    else:
        with pytest.raises(RequestError, match="the text has 1 tokens; perplexity needs at least 2"):
            perplexity(llm, "a")


@pytest.mark.parametrize("last", [False, True])
def test_logits_that_are_no_numbers(folder, tmp_path, last):
    """NaN at the last token ends the request; NaN at an earlier one only shows in its log probability."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight[ord("z") - 33] = torch.nan  # byte-level ids: "!" is 0
    model.save_pretrained(tmp_path)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    llm = LLM(tmp_path, max_batch=1)
    assert llm.tokenizer.encode("z", add_special_tokens=False) == [ord("z") - 33]
    assert math.isfinite(perplexity(llm, "abcd").perplexity)
    with pytest.raises(NonFiniteLogitsError, match="float32"):
        perplexity(llm, "abcz" if last else "abzd")


def test_progress_is_shown_when_asked_for(llm, capsys):
    perplexity(llm, TEXT, context=64)
    assert capsys.readouterr().err == ""
    perplexity(llm, TEXT, context=64, show_progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_perplexity_beyond_every_float_is_an_error(folder):
    """JSON has no infinity, and a model that bad is broken."""
    llm = LLM(folder)
    llm.model.model.norm.weight.mul_(1e5)
    with pytest.raises(NonFiniteLogitsError, match="nats per token"):
        perplexity(llm, "abcd abcd")


def test_a_text_longer_than_the_tokenizers_limit_is_no_warning(tmp_path, caplog):
    llm = LLM(save_byte_model(tmp_path))
    llm.tokenizer.model_max_length = 16
    perplexity(llm, "a" * 40, context=16)
    assert "model_max_length" not in caplog.text
    llm.tokenizer.encode("a" * 40)
    assert "more than model_max_length=16" in caplog.text

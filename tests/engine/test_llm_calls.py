"""What LLM offers beside texts: chats, embeddings, priorities, salts, deadlines, callbacks, abort, close."""

import json
import math
import threading

import pytest
import torch

from llama_fast import LLM, SamplingParams
from llama_fast.api.modeling import LlamaForCausalLM
from llama_fast.errors import RequestError, RequestFailedError, RequestTimeoutError
from tests.byte_model import save_byte_model

ENGINE = {"device": "cpu", "max_batch": 4, "max_seq_len": 96, "page_size": 8, "split_size": 32, "prefill_chunk": 13}
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = ["abc", "a longer text than that", "x" * 40]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yes"}, {"role": "user", "content": "why?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_byte_model(path)
    config = path / "tokenizer_config.json"
    content = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps({**content, "chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **ENGINE)


def _samples(outputs):
    return [sample for output in outputs for sample in output.outputs]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_its_template_s_prompt(llm):
    ids = llm.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    (output,) = llm.generate(CHAT, GREEDY)
    assert output.prompt_token_ids == ids
    assert output.prompt is None
    assert output.outputs == llm.generate(ids, GREEDY)[0].outputs


def test_chats_texts_and_ids_may_be_mixed(llm):
    outputs = llm.generate([CHAT, "abc", [1, 2, 3], CHAT[:1]], GREEDY)
    assert [output.prompt for output in outputs] == [None, "abc", None, None]
    assert _samples(outputs) == [
        s for p in (CHAT, "abc", [1, 2, 3], CHAT[:1]) for s in _samples(llm.generate(p, GREEDY))
    ]


@pytest.mark.parametrize(
    "chat", [[{"content": "no role"}], [{"role": "user"}, "text"], [{"role": "user", "content": 7}]]
)
def test_what_is_no_chat_is_refused(llm, chat):
    with pytest.raises(RequestError, match="prompt 1: "):
        llm.generate([CHAT, chat], GREEDY)


# --- embeddings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(folder, llm):
    """Ids of the prompts and their logits by the page's forward on the reference backend."""
    model = LlamaForCausalLM.from_pretrained(folder, backend="reference", dtype=llm.model.dtype)
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    return [(one, model(torch.tensor([one])).logits[0]) for one in ids]


@pytest.mark.parametrize("prefill_chunk", [5, 13, 512])
def test_encode_gives_the_states_that_the_head_sees(folder, llm, states, prefill_chunk):
    """The LM head of a state is the page's logits at its position."""
    other = LLM(folder, **{**ENGINE, "prefill_chunk": prefill_chunk})
    head = llm.model.lm_head.weight.double()
    for vectors, (ids, logits) in zip(other.encode(PROMPTS, "all"), states, strict=True):
        assert vectors.shape == (len(ids), llm.model.config.hidden_size)
        assert vectors.dtype == torch.float32 and vectors.device.type == "cpu"
        torch.testing.assert_close((vectors.double() @ head.T).float(), logits.float(), atol=1e-4, rtol=1e-4)


def test_encode_pools(llm):
    every = llm.encode(PROMPTS, "all")
    assert all(torch.equal(one, rows[-1]) for one, rows in zip(llm.encode(PROMPTS), every, strict=True))
    assert all(torch.equal(one, rows[0]) for one, rows in zip(llm.encode(PROMPTS, "first"), every, strict=True))
    assert all(torch.equal(one, rows.mean(0)) for one, rows in zip(llm.encode(PROMPTS, "mean"), every, strict=True))
    for one, unit in zip(llm.encode(PROMPTS), llm.encode(PROMPTS, normalize=True), strict=True):
        torch.testing.assert_close(unit, one / one.norm())


@pytest.mark.parametrize("pooling", ["last", "first", "mean", "all"])
def test_H06_encode_has_the_same_bits_alone_together_and_again(folder, pooling):
    """Again: their prefixes are in the cache, and only "last" may use them."""
    llm = LLM(folder, **ENGINE)
    alone = [LLM(folder, **{**ENGINE, "prefix_caching": False}).encode(prompt, pooling)[0] for prompt in PROMPTS]
    for _ in range(2):
        together = llm.encode(PROMPTS, pooling)
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert llm.stats().shared_tokens == (56 if pooling == "last" else 0)


def test_encode_and_generate_share_pages(folder):
    llm = LLM(folder, **ENGINE)
    expected = _samples(llm.generate(PROMPTS[2], GREEDY))
    vector = llm.encode(PROMPTS[2])[0]
    assert llm.stats().shared_tokens > 0
    other = LLM(folder, **ENGINE)
    assert torch.equal(other.encode(PROMPTS[2])[0], vector)
    assert _samples(other.generate(PROMPTS[2], GREEDY)) == expected


@pytest.mark.parametrize("pooling", ["median", None, 3])
def test_unknown_pooling_is_refused(llm, pooling):
    with pytest.raises(RequestError, match="pooling=.* must be one of last, first, mean, all"):
        llm.encode("a", pooling)


def test_a_prompt_of_the_whole_context_can_be_encoded(llm):
    assert llm.encode([1] * 96, "all")[0].shape[0] == 96
    with pytest.raises(RequestError, match="97"):
        llm.encode([1] * 97)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"priority": 1.5}, "priority must be int"),
        ({"priority": [1, 2]}, "one for each of 1 prompts"),
        ({"priority": True}, "priority=True must be an integer"),
        ({"priority": 2**63}, "priority=9223372036854775808 must be"),
        ({"cache_salt": 3}, "cache_salt must be a text"),
        ({"timeout": -1}, "timeout=-1 must be seconds"),
        ({"timeout": math.nan}, "timeout=nan"),
        ({"timeout": math.inf}, "timeout=inf"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"on_token": 3}, "on_token must be callable"),
    ],
)
def test_invalid_options_are_refused(llm, options, told):
    with pytest.raises(RequestError, match=told):
        llm.generate("a", GREEDY, **options)


def test_priorities_decide_who_runs_first(folder):
    llm = LLM(folder, **{**ENGINE, "max_batch": 1})
    order = []
    llm.generate(["a", "b", "c"], GREEDY, priority=[2, 0, 1], on_token=lambda chunk: order.append(chunk.request_index))
    assert list(dict.fromkeys(order)) == [1, 2, 0]


def test_metrics_add_up(llm):
    (output,) = llm.generate(PROMPTS[1], GREEDY)
    times = output.metrics
    assert times.arrival <= times.started <= times.first_token <= times.last_token <= times.finished
    assert times.queue_time + times.prefill_time == pytest.approx(times.time_to_first_token)
    assert output.inter_token_time == pytest.approx(times.decode_time / 7)
    (single,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=1))
    assert single.inter_token_time is None


def test_K09_a_timeout_gives_what_there_is(llm):
    (output,) = llm.generate("a", GREEDY, timeout=0.0)
    assert isinstance(output.error, RequestTimeoutError)
    assert output.outputs[0].finish_reason == "error"
    assert _samples(llm.generate("a", GREEDY, timeout=1e6)) == _samples(llm.generate("a", GREEDY))


def test_K08_chunks_of_a_callback_join_to_the_text_and_a_failing_one_ends_its_request(llm):
    texts = {}

    def on_token(chunk):
        texts[chunk.request_index] = texts.get(chunk.request_index, "") + chunk.text
        if chunk.request_index == 1 and len(texts[1]) > 3:
            raise ValueError("enough")

    outputs = llm.generate(["abc", "xyz", "123"], GREEDY, on_token=on_token)
    plain = llm.generate(["abc", "xyz", "123"], GREEDY)
    assert isinstance(outputs[1].error, RequestFailedError)
    assert plain[1].outputs[0].text.startswith(texts[1])
    for index in (0, 2):
        assert outputs[index].outputs == plain[index].outputs
        assert texts[index] == plain[index].outputs[0].text


# --- abort, threads, close --------------------------------------------------------------------------------------------


def test_K02_abort_ends_one_request_and_tells_whether_it_did(llm):
    told = []

    def on_token(chunk):
        if chunk.request_index == 1:
            told.append(llm.abort(1))

    outputs = llm.generate(["abc", "xyz"], GREEDY, on_token=on_token)
    assert told == [True]
    assert (outputs[1].outputs[0].finish_reason, len(outputs[1].outputs[0].token_ids)) == ("abort", 1)
    assert outputs[0].outputs == llm.generate("abc", GREEDY)[0].outputs
    assert llm.abort(0) is False  # nothing runs


def test_K02_abort_between_chunks_of_a_stream(llm):
    got = []
    for chunk in llm.stream(["abc", "xyz"], GREEDY):
        got.append(chunk)
        if len(got) == 1:
            assert llm.abort(0) is True
            assert llm.abort(7) is False
    assert [chunk.finish_reason for chunk in got if chunk.request_index == 0][-1] == "abort"
    joined = "".join(chunk.text for chunk in got if chunk.request_index == 1)
    assert joined == llm.generate("xyz", GREEDY)[0].outputs[0].text


def test_K03_a_second_thread_gets_a_clear_error_and_the_first_its_answer(llm):
    errors = []

    def other():
        try:
            llm.generate("xyz", GREEDY)
        except RequestError as error:
            errors.append(str(error))

    def on_token(chunk):
        if not errors:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    (output,) = llm.generate("abc", GREEDY, on_token=on_token)
    assert errors == ["this engine is generating already; finish or close that stream first"]
    assert output.outputs == llm.generate("abc", GREEDY)[0].outputs


def test_K03_a_closed_llm_says_so(folder):
    with LLM(folder, **ENGINE) as llm:
        stream = llm.stream("abc", GREEDY)
        next(stream)
        with pytest.raises(RequestError, match="is generating"):
            llm.close()
        assert len([*stream]) == 7  # it goes on
    llm.close()
    for call in (llm.generate, llm.stream, llm.encode):
        with pytest.raises(RequestError, match="this LLM is closed; make a new one"):
            call("abc")


def test_stats_count(folder):
    llm = LLM(folder, **ENGINE)
    llm.generate(PROMPTS[2], GREEDY)
    llm.generate(PROMPTS[2], GREEDY)
    stats = llm.stats()
    assert (stats.waiting, stats.running, stats.preempted) == (0, 0, 0)
    assert stats.pages == stats.free_pages == 4 * 96 // 8
    assert stats.prompt_tokens == 2 * 41 and stats.shared_tokens == 40
    assert stats.shared_pages >= 5

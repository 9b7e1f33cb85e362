"""LLM on a folder: prompts in every form, texts, streams, defaults of the files, refusals, Ctrl-C."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers

from llama_fast.api.modeling import LlamaForCausalLM
from llama_fast.config import LlamaConfig
from llama_fast.engine.llm import LLM
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import (
    BackendError,
    ContextLengthError,
    GenerationInterrupted,
    NonFiniteLogitsError,
    RequestError,
    RequestFailedError,
)
from llama_fast.tokenizer import LlamaTokenizer
from tests.tiny import OPS, fail_at, randomize
from tests.tokenizer_samples import BUILT, NAMES, save_folder

ENGINE = {"max_batch": 8, "page_size": 8, "split_size": 32}
CONTEXT = 128
GREEDY = SamplingParams(max_tokens=12)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.5, seed=3)
# Prompts of different lengths; the middle one needs several tokens for one character.
PROMPTS = ["a", "hello 🤗 你", "he is b" * 4]
# What the spelling model says after "<s>": no byte twice, as it knows only what follows a token.
SPELLED = "Now:🤗 é!"


def _build(folder, config_changes=None, **tokenizer_changes):
    """A byte-level tokenizer (every byte a token, so anything can be said) and a model with its vocabulary."""
    backend = BUILT["llama3"]
    save_folder(folder, backend, {**NAMES, **tokenizer_changes})
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=48,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        bos_token_id=backend.token_to_id("<s>"),
        eos_token_id=backend.token_to_id("</s>"),
        **(config_changes or {}),
    )
    torch.manual_seed(0)
    return randomize(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    _build(path).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **ENGINE)


@pytest.fixture(scope="module")
def speller(tmp_path_factory):
    """Says SPELLED after the bos token, then eos: the layers add nothing, the head maps a token to the next one."""
    path = tmp_path_factory.mktemp("spelling")
    tokenizer = LlamaTokenizer.from_backend(BUILT["llama3"], NAMES)
    ids = [*tokenizer.encode(SPELLED), tokenizer.eos_token_id]
    assert len(set(ids)) == len(ids)
    model = _build(path, {"rms_norm_eps": 1e-12})
    model.lm_head.weight.zero_()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    for token_id, following in itertools.pairwise(ids):
        embedding = model.model.embed_tokens.weight[token_id]
        model.lm_head.weight[following] = embedding / embedding.norm()
    model.save_pretrained(path)
    return LLM(path, **ENGINE)


def _only(outputs):
    """The one sample of the one output."""
    ((sample,),) = [output.outputs for output in outputs]
    return sample


def _streamed(llm, prompts, params):
    """By (prompt, sample): the joined text, the ids, the finish reason of the last chunk."""
    results = {}
    for chunk in llm.stream(prompts, params):
        text, ids, reason = results.get((chunk.request_index, chunk.index), ("", [], None))
        assert reason is None, "a chunk after the last one"
        key = (chunk.request_index, chunk.index)
        results[key] = (text + chunk.text, ids + chunk.token_ids, chunk.finish_reason)
    return results


def _whole(outputs):
    """What `_streamed` must give."""
    return {
        (index, sample.index): (sample.text, sample.token_ids, sample.finish_reason)
        for index, output in enumerate(outputs)
        for sample in output.outputs
    }


def _run_counter(monkeypatch):
    runs = []
    embed = OPS.embed
    monkeypatch.setattr(OPS, "embed", lambda *args: runs.append(args[0].tolist()) or embed(*args))
    return runs


# --- prompts and outputs ----------------------------------------------------------------------------------------------


def test_greedy_texts_are_those_of_transformers(llm, folder):
    """transformers loads the same folder; a full forward for each token, without its cache."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = llm.tokenizer.encode(prompt)
        assert (output.prompt, output.prompt_token_ids) == (prompt, ids)
        for _ in range(GREEDY.max_tokens):
            with torch.no_grad():
                row = theirs(torch.tensor([ids])).logits[0, -1].float()
            best, second = row.topk(2).values.tolist()
            assert best - second > 1e-4, "too close to call: change the prompt"
            ids.append(int(row.argmax()))
        (sample,) = output.outputs
        assert sample.token_ids == ids[len(output.prompt_token_ids) :]
        assert sample.text == llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert (sample.finish_reason, sample.logprobs, output.prompt_logprobs, output.error) == ("length",) + (
            None,
        ) * 3


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_in_every_form(llm, params):
    """A text is its ids; outputs come in the order of the prompts, each as if alone."""
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = [_only(llm.generate(prompt, params)) for prompt in PROMPTS]
    assert len({tuple(sample.token_ids) for sample in alone}) == len(PROMPTS)
    for form in (PROMPTS, tuple(PROMPTS), ids, [PROMPTS[0], ids[1], tuple(ids[2])]):
        outputs = llm.generate(form, params)
        assert [output.outputs for output in outputs] == [[sample] for sample in alone]
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.prompt for output in outputs] == [prompt if isinstance(prompt, str) else None for prompt in form]
    for one in (ids[1], tuple(ids[1]), torch.tensor(ids[1]), np.array(ids[1]), [np.int64(i) for i in ids[1]]):
        assert _only(llm.generate(one, params)) == alone[1]
        assert _only(llm.generate([one], params)) == alone[1]
    backwards = llm.generate(PROMPTS[::-1], params)
    assert [output.outputs for output in backwards] == [[sample] for sample in alone[::-1]]


def test_parameters_for_each_prompt(llm):
    each = [GREEDY, SAMPLED, SamplingParams(max_tokens=3)]
    outputs = llm.generate(PROMPTS, each)
    for prompt, params, output in zip(PROMPTS, each, outputs, strict=True):
        assert output.outputs == llm.generate(prompt, params)[0].outputs
    for wrong in (each[:2], [*each, GREEDY], [], [*each[:2], {"max_tokens": 3}]):
        with pytest.raises(RequestError, match="sampling_params.* 3 prompts"):
            llm.generate(PROMPTS, wrong)


def test_no_prompts_no_outputs(llm):
    assert llm.generate([]) == llm.generate([], []) == []
    assert list(llm.stream([])) == []


def test_empty_text_is_the_bos_token_if_the_tokenizer_adds_one(llm, folder, tmp_path):
    (output,) = llm.generate("", GREEDY)
    assert output.prompt_token_ids == [llm.tokenizer.bos_token_id]
    assert output.outputs == llm.generate([llm.tokenizer.bos_token_id], GREEDY)[0].outputs

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    without_bos = LLM(tmp_path, **ENGINE)
    for prompts in ("", ["a", ""]):
        with pytest.raises(RequestError, match="the prompt has no tokens; give at least one"):
            without_bos.generate(prompts, GREEDY)
    assert _only(without_bos.generate("a", GREEDY)).token_ids


def test_several_samples(llm):
    outputs = llm.generate(PROMPTS[:2], SamplingParams(max_tokens=8, temperature=1.5, seed=1, n=3, logprobs=1))
    for output in outputs:
        assert [sample.index for sample in output.outputs] == [0, 1, 2]
        assert len({sample.text for sample in output.outputs}) == 3
        for sample in output.outputs:
            assert len(sample.logprobs) == len(sample.token_ids) == 8


def test_logprobs_and_prompt_logprobs_are_attached(llm, folder):
    """Raw log-softmax of transformers at each position; the engine's tests have the details."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    (output,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=0))
    (sample,) = output.outputs
    ids = output.prompt_token_ids + sample.token_ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    entries = output.prompt_logprobs + sample.logprobs
    assert entries[0] is None
    for position, (entry, token_id) in enumerate(zip(entries[1:], ids[1:], strict=True)):
        assert entry[token_id].logprob == pytest.approx(expected[position, token_id].item(), abs=1e-4)
    assert all(len(entry) == 1 for entry in output.prompt_logprobs[1:])
    assert all(len(entry) == 2 for entry in sample.logprobs)  # greedy: the chosen token is the first of them


def test_metrics(llm):
    for output in llm.generate(PROMPTS, GREEDY):
        metrics = output.metrics
        assert metrics.arrival <= metrics.started < metrics.first_token < metrics.finished
        assert metrics.time_to_first_token > 0


# --- what the files say -----------------------------------------------------------------------------------------------


def _with_defaults(folder, tmp_path, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    return LLM(tmp_path, **ENGINE)


def test_G2_generation_config_lies_beneath_the_arguments(llm, folder, tmp_path):
    file = {"do_sample": True, "temperature": 1.5, "top_k": 20, "max_new_tokens": 5}
    other = _with_defaults(folder, tmp_path, file)
    explicit = SamplingParams(temperature=1.5, top_k=20, max_tokens=5, seed=1)
    assert other.generate("a", SamplingParams(seed=1))[0].outputs == llm.generate("a", explicit)[0].outputs
    assert _only(other.generate("a", SamplingParams(temperature=0, max_tokens=12))) == _only(llm.generate("a", GREEDY))


@pytest.mark.parametrize("form", ["one", "list"])
def test_G13_eos_of_config_and_of_generation_config(llm, folder, tmp_path, form):
    """A token that greedy chooses later on; config.json counts as well, where the other file names none."""
    plain = _only(llm.generate("a", GREEDY)).token_ids
    end = next(place for place in range(2, len(plain)) if plain[place] not in plain[:place])
    eos = plain[end] if form == "one" else [llm.tokenizer.eos_token_id, plain[end]]
    for name in ("config", "generation_config"):
        path = tmp_path / name
        shutil.copytree(folder, path)
        content = json.loads((path / f"{name}.json").read_text())
        (path / f"{name}.json").write_text(json.dumps({**content, "eos_token_id": eos}))
        other = LLM(path, **ENGINE)
        sample = _only(other.generate("a", GREEDY))
        assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (plain[: end + 1], "stop", plain[end])
        assert sample.text == llm.tokenizer.decode(plain[:end], skip_special_tokens=True)  # without the eos token
        assert _only(other.generate("a", SamplingParams(max_tokens=12, ignore_eos=True))).token_ids == plain


# --- texts and stop strings -------------------------------------------------------------------------------------------


def test_spelled_text_ends_with_eos(speller):
    """Also the oracle of the tests below: the text is known, characters of up to 4 tokens in it."""
    sample = _only(speller.generate("", SamplingParams()))
    assert (sample.text, sample.finish_reason) == (SPELLED, "stop")
    assert sample.token_ids == [*speller.tokenizer.encode(SPELLED)[1:], speller.tokenizer.eos_token_id]
    assert len(sample.token_ids) > len(SPELLED)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("🤗", "Now:"),
        (":🤗 é", "Now"),
        (["é!", "w:🤗"], "No"),  # the earliest
        (["w:🤗X", "🤗 é"], "Now:"),  # one that only begins before the other
        (SPELLED, ""),
        (["N", "Now"], ""),
        ("é!?", SPELLED),  # begun at the end, not completed
        ("�", SPELLED),  # an unfinished character is not a broken one
    ],
)
def test_G10_stop_strings_over_tokens_and_characters(speller, stop, text):
    params = SamplingParams(stop=stop)
    sample = _only(speller.generate("", params))
    assert (sample.text, sample.finish_reason) == (text, "stop")
    if text == SPELLED:
        assert sample.stop_reason == speller.tokenizer.eos_token_id
    else:
        stops = [stop] if isinstance(stop, str) else stop
        assert sample.stop_reason in stops
        assert SPELLED.startswith(text + sample.stop_reason)
        # It stopped with the token that completed the stop string.
        assert speller.tokenizer.decode(sample.token_ids, skip_special_tokens=True).endswith(sample.stop_reason)
    assert _streamed(speller, "", params) == _whole(speller.generate("", params))


def test_G10_min_tokens_and_stop_strings(speller):
    """ "w" comes as the third token; below min_tokens it does not count, and does not come again."""
    for min_tokens, text in ((3, "No"), (4, SPELLED)):
        assert _only(speller.generate("", SamplingParams(stop="w", min_tokens=min_tokens))).text == text


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_streamed_text_never_shows_a_broken_character(speller, max_tokens):
    """A character is shown when it is whole; U+FFFD only for one that the end cut off."""
    params = SamplingParams(max_tokens=max_tokens)
    shown = ""
    for chunk in speller.stream("", params):
        shown += chunk.text
        assert SPELLED.startswith(shown) or chunk.finish_reason == "length"
    assert shown == _only(speller.generate("", params)).text
    assert shown == speller.tokenizer.decode(
        speller.tokenizer.encode(SPELLED)[1 : max_tokens + 1], skip_special_tokens=True
    )


@pytest.mark.parametrize("seed", range(6))
def test_G10_stops_taken_from_a_random_text(llm, seed):
    """Stops cut out of what is generated without them, over any token border."""
    params = {"max_tokens": 24, "temperature": 1.5, "seed": seed}
    plain = _only(llm.generate(PROMPTS[1], SamplingParams(**params)))
    whole = plain.text
    for start, length in ((0, 1), (3, 4), (len(whole) - 5, 5), (seed, 2), (0, len(whole))):
        stop = whole[start : start + length]
        with_stop = SamplingParams(**params, stop=stop)
        outputs = llm.generate(PROMPTS[1], with_stop)
        sample = _only(outputs)
        assert (sample.text, sample.stop_reason) == (whole[: whole.find(stop)], stop)
        assert sample.token_ids == plain.token_ids[: len(sample.token_ids)]
        assert stop not in sample.text
        assert _streamed(llm, PROMPTS[1], with_stop) == _whole(outputs)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, SamplingParams(max_tokens=9, temperature=2.0, n=3, seed=1)])
def test_stream_joins_to_what_generate_returns(llm, params):
    outputs = llm.generate(PROMPTS, params)
    assert _streamed(llm, PROMPTS, params) == _whole(outputs)
    for output in outputs:
        for sample in output.outputs:
            assert llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True) == sample.text


def test_special_tokens_in_the_text(speller):
    params = {"stop_token_ids": [], "ignore_eos": True, "max_tokens": 3}
    bos = speller.tokenizer.bos_token_id
    for skip, text in ((True, ""), (False, "<s><s><s>")):
        sample = _only(
            speller.generate("", SamplingParams(**params, logit_bias={bos: 100.0}, skip_special_tokens=skip))
        )
        assert (sample.token_ids, sample.text) == ([bos] * 3, text)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([1, 264], RequestError, r"prompt_token_ids\[1\]=264 .*0 to 263"),
        ([1, -1], RequestError, r"prompt_token_ids\[1\]=-1 .*0 to 263"),
        ([1, 2**40], RequestError, r"prompt_token_ids\[1\]=1099511627776 "),
        ([1, 2.5], RequestError, r"prompt_token_ids\[1\]="),
        ([1, [2]], RequestError, r"prompt_token_ids\[1\]="),
        ([], RequestError, "the prompt has no tokens"),
        (None, RequestError, "prompt"),
        (2.5, RequestError, "prompt"),
        ([1] * (CONTEXT - 1), ContextLengthError, "127 prompt tokens .* max_tokens=2 exceed the context of 128"),
        ("a\ud800", RequestError, "lone surrogate"),
    ],
)
def test_G08_G09_one_bad_prompt_and_nothing_runs(llm, monkeypatch, bad, error, message):
    runs = _run_counter(monkeypatch)
    params = SamplingParams(max_tokens=2)
    for call in (llm.generate, lambda *args: list(llm.stream(*args))):
        with pytest.raises(error, match=message):
            call(["a", bad, "b"], params)
    assert not runs
    assert llm.engine.scheduler.allocator.num_free == llm.engine.cache.num_pages
    assert _only(llm.generate([1] * (CONTEXT - 2), params)).finish_reason == "length"  # the exact fit


@pytest.mark.parametrize("prompts", [None, 5, 2.5, {"prompt": "a"}], ids=str)
def test_prompts_of_another_type(llm, prompts):
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, GREEDY)


def test_parameters_that_cannot_run_here(llm, monkeypatch):
    runs = _run_counter(monkeypatch)
    for params, message in (
        (SamplingParams(logit_bias={264: 1.0}), "logit_bias names token 264"),
        (SamplingParams(n=9, temperature=1.0, max_tokens=1), "n=9 exceeds max_batch=8"),
        (SamplingParams(n=2), "n=2 with greedy"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(["a", "b"], [GREEDY, params])
    assert not runs


def test_unknown_backend(folder):
    with pytest.raises(BackendError, match="backend='fast' is unknown; use one of"):
        LLM(folder, backend="fast")


def test_K03_open_stream_refuses_another_call_and_goes_on(llm):
    expected = _whole(llm.generate("a", GREEDY))
    stream = llm.stream("a", GREEDY)
    first = next(stream)
    for call in (llm.generate, lambda *args: next(llm.stream(*args))):
        with pytest.raises(RequestError, match="generating already; finish or close that stream"):
            call("b", GREEDY)
    rest = [first, *stream]
    assert "".join(chunk.text for chunk in rest) == expected[0, 0][0]


# --- interruptions ----------------------------------------------------------------------------------------------------

SHORT_LONG = [SamplingParams(max_tokens=3), SAMPLED, SamplingParams(max_tokens=10, temperature=1.0, seed=2, n=2)]


@pytest.mark.parametrize("streaming", [False, True], ids=["generate", "stream"])
@pytest.mark.parametrize(
    ("op_name", "call", "still_running"),
    [("embed", 1, 4), ("attention", 4, 4), ("attention", 12, 3), ("linear_residual", 22, 3), ("sample", 11, 1)],
)
def test_K04_ctrl_c_keeps_what_was_generated(llm, monkeypatch, op_name, call, still_running, streaming):
    """In the middle of a step; a step has 2 attentions, 4 residuals and gives each sample a token."""
    before = llm.generate(PROMPTS, SHORT_LONG)
    with monkeypatch.context() as patch:
        fail_at(patch, op_name, call, KeyboardInterrupt)
        with pytest.raises(GenerationInterrupted) as caught:
            list(llm.stream(PROMPTS, SHORT_LONG)) if streaming else llm.generate(PROMPTS, SHORT_LONG)
    assert isinstance(caught.value, KeyboardInterrupt)
    num_aborted = 0
    for output, whole in zip(caught.value.outputs, before, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (whole.prompt, whole.prompt_token_ids)
        for sample, other in zip(output.outputs, whole.outputs, strict=True):
            if sample.finish_reason == "abort":
                num_aborted += 1
                assert len(sample.token_ids) < len(other.token_ids)
                assert sample.token_ids == other.token_ids[: len(sample.token_ids)]
                assert sample.text == llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            else:
                assert sample == other
    assert num_aborted == still_running
    assert [output.outputs for output in llm.generate(PROMPTS, SHORT_LONG)] == [output.outputs for output in before]
    assert llm.engine.scheduler.allocator.num_free == llm.engine.cache.num_pages


def test_K04_ctrl_c_between_two_chunks(llm):
    """Where the caller's own code is interrupted, it can still ask the stream for the outputs."""
    whole = _only(llm.generate("a", GREEDY))
    stream = llm.stream("a", GREEDY)
    shown = [next(stream), next(stream)]
    with pytest.raises(GenerationInterrupted) as caught:
        stream.throw(KeyboardInterrupt())
    sample = _only(caught.value.outputs)
    assert (sample.token_ids, sample.finish_reason) == (whole.token_ids[:2], "abort")
    assert sample.text.startswith("".join(chunk.text for chunk in shown))
    assert _only(llm.generate("a", GREEDY)) == whole


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
def test_K01_closing_a_stream_early(llm, num_chunks):
    before = llm.generate(PROMPTS, SHORT_LONG)
    stream = llm.stream(PROMPTS, SHORT_LONG)
    for _ in range(num_chunks):
        next(stream)
    stream.close()
    assert [output.outputs for output in llm.generate(PROMPTS, SHORT_LONG)] == [output.outputs for output in before]
    assert llm.engine.scheduler.allocator.num_free == llm.engine.cache.num_pages


def test_error_in_a_step_leaves_the_engine_usable(llm, monkeypatch):
    """Once it is nobody's fault and the step is run again; from then on it ends what runs."""
    before = _only(llm.generate("a", GREEDY))
    with monkeypatch.context() as patch:
        fail_at(patch, "attention", 5, RuntimeError)
        assert _only(llm.generate("a", GREEDY)) == before
        patch.setattr(OPS, "attention", lambda *_: 1 / 0)
        (output,) = llm.generate("a", GREEDY)
        assert isinstance(output.error, RequestFailedError)
    assert _only(llm.generate("a", GREEDY)) == before


def test_K07_NaN_ends_one_request_and_no_text_is_given_twice(folder):
    """ "b" has NaN in its embedding; the first request says it, the second never does."""
    llm = LLM(folder, **ENGINE)
    (bad,) = llm.tokenizer.encode("b", add_special_tokens=False)
    llm.model.model.embed_tokens.weight[bad] = math.nan
    params = [
        SamplingParams(max_tokens=5, logit_bias={bad: 100.0}),
        SamplingParams(max_tokens=5, logit_bias={bad: -100.0}),
    ]
    outputs = llm.generate(["a", "hello"], params)
    (broken,), (healthy,) = (output.outputs for output in outputs)
    assert (broken.token_ids, broken.text, broken.finish_reason) == ([bad], "b", "error")
    assert isinstance(outputs[0].error, NonFiniteLogitsError)
    assert outputs[1].error is None
    assert healthy == _only(llm.generate("hello", params[1]))
    assert _streamed(llm, ["a", "hello"], params) == _whole(outputs)

"""G: the arguments of a generation request."""

import itertools
import math
from pathlib import Path

import numpy as np
import torch

from llama_fast import LlamaForCausalLM, LlamaTokenizer
from llama_fast.engine.sampling import SamplingParams
from llama_fast.errors import ContextLengthError, RequestError, UnsupportedError
from tests.bad_inputs.engine_checks import (
    EOS,
    MAX_BATCH,
    MAX_SEQ_LEN,
    SPARE,
    VOCAB_SIZE,
    Serving,
    build,
    engine_entry,
    legal,
    tokens,
)
from tests.bad_inputs.harness import check
from tests.byte_model import save_byte_model

NAN, INF = math.nan, math.inf
HUGE = (2**63, 2**64, 10**5000)
NOT_INTEGERS = (True, 1.5, NAN, INF, "5", "", [], [5], {}, b"5", object())
NOT_NUMBERS = (True, NAN, INF, -INF, "0.5", "nan", [], [0.5], {}, 1j, object(), 10**400)
WIDE = [[[[[["x" * 15] * 6] * 6] * 6] * 6] * 6] * 6  # no list is long
SPELLED = "Now:🤗 é!"  # no byte twice


def _save_speller(folder: Path) -> None:
    """A model that says SPELLED, then eos: its layers add nothing, its head maps a token to the next one."""
    save_byte_model(folder)
    ids = [*LlamaTokenizer.from_pretrained(folder).encode(SPELLED), EOS]
    model = LlamaForCausalLM.from_pretrained(folder, device="cpu")
    model.lm_head.weight.zero_()
    model.model.norm.weight.fill_(1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for token_id, following in itertools.pairwise(ids):
        embedding = model.model.embed_tokens.weight[token_id]
        model.lm_head.weight[following] = embedding / embedding.norm()
    model.save_pretrained(folder)


SPELLER = build(_save_speller)


@engine_entry
def G01_max_tokens(engine: Serving) -> None:
    for value in (-1, 2**31, *HUGE, *NOT_INTEGERS):
        engine.refused(RequestError, "max_tokens=", max_tokens=value)
        engine.refused(RequestError, "min_tokens=", min_tokens=value)
    engine.refused(RequestError, "min_tokens=4 exceeds max_tokens=3", min_tokens=4, max_tokens=3)


@engine_entry
def G01_max_tokens_0_only_scores_the_prompt(_: Serving) -> None:
    (sample,) = legal(max_tokens=0, prompt_logprobs=1)
    check((sample.token_ids, sample.text, sample.finish_reason) == ([], "", "length"), f"{sample}")


@engine_entry
def G01_missing_max_tokens_goes_to_the_end_of_the_context(_: Serving) -> None:
    (sample,) = legal([1, 2, 3], ignore_eos=True)
    check((len(sample.token_ids), sample.finish_reason) == (MAX_SEQ_LEN - 3, "length"), f"{sample}")


@engine_entry
def G02_temperature(engine: Serving) -> None:
    for value in (-1, -1e-9, 1e9, 10001, *NOT_NUMBERS):
        engine.refused(RequestError, "temperature=", temperature=value)


@engine_entry
def G02_tiny_temperature_is_greedy_exactly(_: Serving) -> None:
    (greedy,) = legal(max_tokens=12, temperature=0)
    for value in (1e-45, 5e-324, 1e-6, 9.9e-6, -0.0):
        (sample,) = legal(max_tokens=12, temperature=value, seed=3)
        check(sample.token_ids == greedy.token_ids, f"temperature={value}: {sample.token_ids}")
    for value in (1e-5, 1e4):  # the ends of the legal range
        legal(max_tokens=3, temperature=value, seed=3)


@engine_entry
def G03_top_k_top_p_min_p(engine: Serving) -> None:
    for value in (0, -1, 1.01, 1e-7, *NOT_NUMBERS):
        engine.refused(RequestError, "top_p=", temperature=1.0, top_p=value)
    for value in (-2, -(2**63), *HUGE, *NOT_INTEGERS):
        engine.refused(RequestError, "top_k=", temperature=1.0, top_k=value)
    for value in (-0.1, 1.01, *NOT_NUMBERS):
        engine.refused(RequestError, "min_p=", temperature=1.0, min_p=value)


@engine_entry
def G03_top_k_above_the_vocabulary_is_off(_: Serving) -> None:
    (off,) = legal(max_tokens=8, temperature=1.5, seed=1)
    for value in (0, -1, VOCAB_SIZE, VOCAB_SIZE + 1, 2**63 - 1):
        (sample,) = legal(max_tokens=8, temperature=1.5, seed=1, top_k=value)
        check(sample.token_ids == off.token_ids, f"top_k={value}: {sample.token_ids}")
    (other,) = legal(max_tokens=8, temperature=1.5, seed=1, top_k=2)
    check(other.token_ids != off.token_ids, "top_k=2 has no effect")


@engine_entry
def G04_n_and_best_of(engine: Serving) -> None:
    for value in (0, -1, 1025, 2**31, *HUGE, *NOT_INTEGERS):
        engine.refused(RequestError, "n=", temperature=1.0, n=value)
    engine.refused(RequestError, f"n={MAX_BATCH + 1} exceeds max_batch", temperature=1.0, n=MAX_BATCH + 1)
    engine.refused(RequestError, "n=2 with greedy", n=2)
    for value in (0, 1, 10**9):
        engine.refused_json(UnsupportedError, {"best_of": value}, "best_of")


@engine_entry
def G04_logprobs(engine: Serving) -> None:
    for value in (-1, 129, VOCAB_SIZE, 10**6, *HUGE, *NOT_INTEGERS):
        engine.refused(RequestError, "logprobs=", logprobs=value)
        engine.refused(RequestError, "prompt_logprobs=", prompt_logprobs=value)
    (sample,) = legal(max_tokens=1, logprobs=128, prompt_logprobs=128)
    check(len(sample.logprobs or ()) == 1 and 128 <= len(sample.logprobs[0]) <= 129, "not 128 log probabilities")


@engine_entry
def G04_stop_strings(engine: Serving) -> None:
    for value in ("", [""], ["a"] * 17, ["a"] * 10**5, ["a" * 1025], "a" * 10**6, 5, [5], [None], {"a": 1}, b"a"):
        engine.refused(RequestError, "stop", stop=value)
    for value in ("5", ["5"], [-1], [2**31], [1.5], [True], [[1]], list(range(1025)), {"1": 1}, [VOCAB_SIZE]):
        engine.refused(RequestError, "stop_token_ids", stop_token_ids=value)
    legal(max_tokens=3, stop=["zz" * 512] * 16, stop_token_ids=list(range(VOCAB_SIZE - 1)))


@engine_entry
def G05_logit_bias(engine: Serving) -> None:
    for value in (NAN, INF, -INF, 100.1, -101, "1", True, None, [1.0], 10**400):
        engine.refused(RequestError, "logit_bias[7]", logit_bias={7: value})
    for key in (VOCAB_SIZE, 2**31 - 1, 2**31, -1, 1.5, True, None, "x", "", "-1", "01", "1.0", "9" * 5000, "٣"):
        engine.refused(RequestError, "logit_bias", logit_bias={key: 1.0})
    for value in (dict.fromkeys(range(16385), 0.0), dict.fromkeys(range(10**6), 1.0), [], [[7, 1.0]], "7", 7):
        engine.refused(RequestError, "logit_bias", logit_bias=value)
    engine.refused_json(RequestError, {"logit_bias": {str(VOCAB_SIZE): 1.0}}, f"names token {VOCAB_SIZE}")


@engine_entry
def G05_every_token_forbidden(engine: Serving) -> None:
    """Only min_tokens forbids (-inf, not a bias): with every id a stop id nothing could be drawn."""
    every = list(range(VOCAB_SIZE))
    needle = f"forbids every token: all {VOCAB_SIZE} are stop ids"
    for params in ({}, {"temperature": 1.0}, {"logit_bias": {7: 100.0}}, {"ignore_eos": True}):
        engine.refused(RequestError, needle, min_tokens=1, stop_token_ids=every, **params)
    for temperature in (0.0, 1.5):
        (sample,) = legal(min_tokens=3, max_tokens=5, stop_token_ids=every[:-3] + every[-2:], temperature=temperature)
        check(sample.token_ids[:3] == [VOCAB_SIZE - 3] * 3, f"{sample.token_ids}")


@engine_entry
def G05_the_same_bias_on_every_token_is_a_legal_shift(_: Serving) -> None:
    for bias in (-100.0, 100.0):
        for temperature in (0.0, 1.0):
            everywhere = dict.fromkeys(range(VOCAB_SIZE), bias)
            legal(max_tokens=4, ignore_eos=True, temperature=temperature, logit_bias=everywhere)


@engine_entry
def G06_penalties(engine: Serving) -> None:
    for value in (0, 0.0, -1, 0.009, 100.1, 1e30, *NOT_NUMBERS):
        engine.refused(RequestError, "repetition_penalty=", repetition_penalty=value)
    for name in ("frequency_penalty", "presence_penalty"):
        for value in (-2.01, 2.01, 1e30, *NOT_NUMBERS):
            engine.refused(RequestError, f"{name}=", **{name: value})


# Each feature with two legal values.
FEATURES = {
    "temperature": (0.3, 50.0),
    "top_k": (0, 3),
    "top_p": (1.0, 0.3),
    "min_p": (0.0, 0.9),
    "repetition_penalty": (1.0, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "logit_bias": ({}, {7: 100.0, 8: -100.0}),
    "seed": (0, 2**64 - 1),
    "stop": ("zz", ["a", "\ufffd\ufffd"]),
    "stop_token_ids": ([], [9, EOS]),
    "ignore_eos": (False, True),
    "logprobs": (None, 128),
    "prompt_logprobs": (None, 128),
    "min_tokens": (0, 3),
    "max_tokens": (4, 5),
    "n": (1, 2),
    "skip_special_tokens": (True, False),
}


def _pairwise() -> list[dict[str, object]]:
    """Eight requests in which every two features meet in all four combinations of their values.

    A feature has its second value in row 0 and in three more rows, no two features in the same three.
    """
    subsets = itertools.combinations(range(1, 8), 3)
    rows = {name: {0, *subset} for name, subset in zip(FEATURES, subsets)}  # noqa: B905
    return [{name: values[row in rows[name]] for name, values in FEATURES.items()} for row in range(8)]


@engine_entry
def G06_legal_values_of_all_features_pairwise(_: Serving) -> None:
    rows = _pairwise()
    for first, second in itertools.combinations(FEATURES, 2):
        met = {(row[first] is FEATURES[first][1], row[second] is FEATURES[second][1]) for row in rows}
        check(len(met) == 4, f"{first} and {second} do not meet in all combinations")
    params = [SamplingParams(**row) for row in rows]  # type: ignore[arg-type]
    together = SPARE.generate(["abc"] * len(params), params, use_tqdm=False)
    for row, output in zip(rows, together, strict=True):
        alone = legal(**row)
        check(tokens([output]) == [sample.token_ids for sample in alone], f"{row}: alone and together differ")
        for sample in alone:
            check(len(sample.token_ids) >= row["min_tokens"], f"{row}: {sample}")
            reported = [value.logprob for position in sample.logprobs or () for value in position.values()]
            check(not any(map(math.isnan, reported)), f"{row}: NaN log probabilities")


@engine_entry
def G07_seed(engine: Serving) -> None:
    for value in (-1, 2**64, *HUGE[1:], *NOT_INTEGERS):
        engine.refused(RequestError, "seed=", seed=value)
    for seed in (0, 2**63, 2**64 - 1):
        params = SamplingParams(seed=seed, temperature=2.0, max_tokens=8, ignore_eos=True)
        first, second, third = tokens(SPARE.generate(["abc"] * 3, params, use_tqdm=False))
        (alone,) = legal(seed=seed, temperature=2.0, max_tokens=8, ignore_eos=True)
        check(first == second == third == alone.token_ids, f"seed={seed}: {first} {second} {third} {alone.token_ids}")
    (other,) = legal(seed=1, temperature=2.0, max_tokens=8, ignore_eos=True)
    check(other.token_ids != alone.token_ids, "the seed has no effect")


@engine_entry
def G08_prompt_as_ids(engine: Serving) -> None:
    for value in (-1, VOCAB_SIZE, 2**31, *HUGE, *NOT_INTEGERS, None, "text", [1, [2]]):
        engine.refused(RequestError, "prompt 0: prompt_token_ids[2]=", prompt=[1, 2, value])
        engine.refused(RequestError, "prompt 1: prompt_token_ids[0]=", prompt=[[1, 2], [value]])
    engine.refused(RequestError, "prompt 1: the prompt has no tokens", prompt=[[1, 2], []])
    engine.refused(RequestError, "prompt 0: prompt_token_ids[0]=[", prompt=[[[1, 2]]])
    for prompt in ([1.5, 2], [None], [object()], np.array([1.5]), torch.tensor([0.5])):
        engine.refused(RequestError, "prompt 0 must be a text, a list of token ids or", prompt=prompt)
    engine.refused(RequestError, "prompt 1 must be a text, a list of token ids or", prompt=["abc", 5])
    for prompt in (5, None, {"a": 1}, {1, 2}, b"abc", object()):
        engine.refused(RequestError, "prompts must be a text", prompt=prompt)
    for prompt in (np.array([1, 2]), torch.tensor([1, 2]), (1, 2), [np.int64(1), 2]):
        check(legal(prompt, max_tokens=4) == legal([1, 2], max_tokens=4), f"{prompt!r} is not [1, 2]")


@engine_entry
def G09_context_length(engine: Serving) -> None:
    for prompt_len in (1, MAX_SEQ_LEN - 1, MAX_SEQ_LEN):
        room = MAX_SEQ_LEN - prompt_len
        (sample,) = legal([1] * prompt_len, max_tokens=room, ignore_eos=True)
        check((len(sample.token_ids), sample.finish_reason) == (room, "length"), f"{prompt_len}: {sample}")
        error = engine.refused(
            ContextLengthError, f"{prompt_len} prompt tokens", prompt=[1] * prompt_len, max_tokens=room + 1
        )
        check(error.code == "context_length_exceeded", error.code)  # type: ignore[attr-defined]
        check(error.http_status == 400, f"{error.http_status}")
    for prompt_len in (MAX_SEQ_LEN, MAX_SEQ_LEN + 1, 10**6):
        engine.refused(ContextLengthError, f"{prompt_len} prompt tokens", prompt=[1] * prompt_len)
    engine.refused(ContextLengthError, "prompt tokens", prompt=[1] * (MAX_SEQ_LEN + 1), max_tokens=0)


@engine_entry
def G10_stop_strings_end_the_text(_: Serving) -> None:
    cases = {
        "w:": "No",  # two tokens
        "o": "N",
        "🤗": "Now:",  # four tokens, none of them a character
        ":🤗 é": "Now",
        "!": "Now:🤗 é",  # the last token before eos
        SPELLED: "",  # the whole text
        SPELLED[0]: "",
    }
    for stop, text in cases.items():
        for stops in (stop, ["never", stop], [stop, stop + "?"]):
            (sample,) = legal("", SPELLER, max_tokens=30, stop=stops)
            told = (sample.text, sample.finish_reason, sample.stop_reason)
            check(told == (text, "stop", stop), f"stop={stops!r}: {told}")
        joined = "".join(chunk.text for chunk in SPELLER.stream("", SamplingParams(max_tokens=30, stop=stop)))
        check(joined == text, f"stop={stop!r}: streamed {joined!r}")
    (sample,) = legal("", SPELLER, max_tokens=30, stop=["?", SPELLED + "!"])
    check((sample.text, sample.finish_reason, sample.stop_reason) == (SPELLED, "stop", EOS), f"{sample}")


@engine_entry
def G10_eos_is_the_first_token(_: Serving) -> None:
    (sample,) = legal(SPELLED, SPELLER, max_tokens=5, stop="x")
    told = (sample.text, sample.token_ids, sample.finish_reason, sample.stop_reason)
    check(told == ("", [EOS], "stop", EOS), f"{told}")


@engine_entry
def G10_the_text_ends_within_a_character(_: Serving) -> None:
    """max_tokens cuts the emoji after two of its four bytes: one replacement character, as the whole decode gives."""
    (sample,) = legal("", SPELLER, max_tokens=6, stop="🤗")
    check((sample.text, sample.finish_reason) == ("Now:\ufffd", "length"), f"{sample}")


@engine_entry
def G11_constrained_decoding_is_refused(engine: Serving) -> None:
    """Never ignored and never compiled: the values would keep a compiler busy for hours."""
    evil = "(a+)+" * 1000
    nested: object = {}
    for _ in range(500):
        nested = {"properties": {"a": nested}}
    fields = {
        "guided_regex": evil,
        "guided_json": nested,
        "guided_choice": ["a", "b"],
        "guided_grammar": evil,
        "structured_outputs": {"regex": evil},
        "structural_tag": {},
        "response_format": {"type": "json_schema", "json_schema": nested},
        "json_schema": nested,
        "regex": evil,
        "grammar": evil,
        "ebnf": evil,
        "logits_processors": ["os.system"],
        "allowed_token_ids": [1],
        "bad_words": ["a"],
        "tools": [{"type": "function"}],
        "use_beam_search": True,
    }
    for name, value in fields.items():
        error = engine.refused_json(UnsupportedError, {"max_tokens": 3, name: value}, name, "not supported")
        check(error.http_status == 400, f"{error.http_status}")
        SamplingParams.from_dict({"max_tokens": 3, name: None})  # null is unset


@engine_entry
def G12_unknown_fields(engine: Serving) -> None:
    for name in (
        "max_token",
        "Temperature",
        "",
        "n ",
        "__class__",
        "__init__",
        "from_dict",
        "é",
        "\x1b[2J",
        "x" * 10**6,
    ):
        engine.refused_json(RequestError, {name: 1}, "unknown fields")
    engine.refused_json(RequestError, dict.fromkeys(map(str, range(10**5)), 1), "unknown fields", "and 99990 more")
    engine.refused_json(RequestError, {5: 1}, "unknown fields: 5")
    for content in ([], [["n", 1]], "n=1", 5, True):
        engine.refused_json(RequestError, content, "must be an object")


@engine_entry
def G12_wrong_json_types(engine: Serving) -> None:
    """Nothing is converted: "5" is not 5, 5.0 is not 5, 1 is not true. Null is unset."""
    for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
        for value in ("5", 5.0, True, [5], {"value": 5}, WIDE):
            engine.refused_json(RequestError, {name: value}, f"{name}=")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        for value in ("1", True, [1], {"value": 1}):
            engine.refused_json(RequestError, {name: value}, f"{name}=")
    for name in ("ignore_eos", "skip_special_tokens"):
        for value in ("true", 1, 0, [], {}):
            engine.refused_json(RequestError, {name: value}, f"{name}=")
    unset = SamplingParams.from_dict(dict.fromkeys(vars(SamplingParams()), None))
    check(unset == SamplingParams(), f"null is not unset: {unset}")
    known = SamplingParams.from_dict({"logit_bias": {"7": 5}, "temperature": 1, "stop": ["a"]})
    check(known == SamplingParams(logit_bias={7: 5.0}, temperature=1.0, stop=("a",)), f"{known}")


@engine_entry
def G12_sampling_params_of_another_kind(engine: Serving) -> None:
    for params in ({"n": 1}, 5, "x", [SamplingParams()] * 2, [None]):
        engine.refused_call(
            RequestError, lambda params=params: engine.llm.generate("abc", params), "must be SamplingParams"
        )

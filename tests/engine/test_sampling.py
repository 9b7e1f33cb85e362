"""SamplingParams and how they resolve over generation_config.json."""

import dataclasses
import functools
import math
import operator
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.engine.sampling import GenerationDefaults, ResolvedSampling, SamplingParams
from llama_fast.errors import ContextLengthError, RequestError

CHAT_FILE = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 6], "pad_token_id": 0}


def resolve(
    params: SamplingParams, file: dict | None = None, config_eos: int | list[int] | None = 2, **sizes: int
) -> ResolvedSampling:
    sizes = {"prompt_len": 10, "max_seq_len": 100, "vocab_size": 32} | sizes
    return params.resolve(GenerationDefaults.from_dict(file or {}), config_eos, **sizes)


def assert_refused(field: str, value: object, accepted: str) -> None:
    """The message says what came and what is accepted."""
    with pytest.raises(RequestError, match=rf"^{field}.*{re.escape(accepted)}"):
        SamplingParams(**{field.partition(r"\[")[0].partition(" ")[0]: value})


@pytest.mark.parametrize("value", [-1, True, 1.5, 2**63, "5", math.nan, [1], 10**400])
@pytest.mark.parametrize("field", ["max_tokens", "min_tokens"])
def test_G01_token_budgets_out_of_range(field, value):
    assert_refused(field, value, "use an integer from 0 to 2147483647")


def test_G01_zero_scores_the_prompt_and_unset_runs_to_the_end():
    assert resolve(SamplingParams(max_tokens=0)).max_tokens == 0
    assert resolve(SamplingParams(max_tokens=0), prompt_len=100).max_tokens == 0
    assert resolve(SamplingParams()).max_tokens == 90


def test_G01_min_tokens_above_max_tokens():
    assert resolve(SamplingParams(min_tokens=3, max_tokens=3)).min_tokens == 3
    with pytest.raises(RequestError, match="min_tokens=4 exceeds max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(RequestError, match="min_tokens=91 exceeds the 90 new tokens"):
        resolve(SamplingParams(min_tokens=91))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf, 1e9, "1.0", True, 10**400, 1j, [1.0]])
def test_G02_temperature_out_of_range(value):
    assert_refused("temperature", value, "use a number from 0 to 10000; 0 is greedy")


@pytest.mark.parametrize("value", [0, 0.0, 1e-45, 9.9e-6])
def test_G02_tiny_temperature_is_greedy(value):
    resolved = resolve(SamplingParams(temperature=value, top_k=3, top_p=0.5, min_p=0.1))
    assert (resolved.temperature, resolved.top_k, resolved.top_p, resolved.min_p) == (0.0, 0, 1.0, 0.0)
    assert resolve(SamplingParams(temperature=1e-5)).temperature == 1e-5


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.0001, math.nan, math.inf, "0.9", True])
def test_G03_top_p_out_of_range(value):
    assert_refused("top_p", value, "use a number from 1e-06 to 1")


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, "0.1", False])
def test_G03_min_p_out_of_range(value):
    assert_refused("min_p", value, "use a number from 0 to 1")


@pytest.mark.parametrize("value", [-2, 2**63, 1.0, "40", True])
def test_G03_top_k_out_of_range(value):
    assert_refused("top_k", value, "use an integer from -1")


@pytest.mark.parametrize("value", [-1, 0, 32, 33, 2**62])
def test_G03_top_k_from_the_vocabulary_on_is_off(value):
    assert resolve(SamplingParams(top_k=value), vocab_size=32).top_k == 0
    assert resolve(SamplingParams(top_k=31), vocab_size=32).top_k == 31


@pytest.mark.parametrize("value", [0, -1, 1025, 2**40, True, 1.0, None])
def test_G04_n_out_of_range(value):
    assert_refused("n", value, "use an integer from 1 to 1024")


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 129, 128256, True, 5.0])
def test_G04_logprobs_over_the_cap(field, value):
    assert_refused(field, value, "use an integer from 0 to 128")
    assert getattr(SamplingParams(**{field: 128}), field) == 128


@pytest.mark.parametrize("value", [["x"] * 100_000, 5, b"x", {"x"}, {"x": 1}])
def test_G04_stop_is_not_a_short_list_of_strings(value):
    assert_refused("stop", value, "use a string or a list of at most 16")


@pytest.mark.parametrize("item", ["", "x" * 1025, 5, None, b"x"])
def test_G04_stop_holds_a_bad_string(item):
    assert_refused(r"stop\[1\]", ["ok", item], "use a string of 1 to 1024 characters")


def test_G04_stop_accepts_one_string_or_many():
    assert resolve(SamplingParams(stop="\n\n")).stop == ("\n\n",)
    assert resolve(SamplingParams(stop=["a", "b"])).stop == ("a", "b")
    assert resolve(SamplingParams(stop=[])).stop == resolve(SamplingParams()).stop == ()


def test_G04_message_for_a_huge_value_is_short():
    with pytest.raises(RequestError) as error:
        SamplingParams(stop=["x" * 1000] * 100_000)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("bias", [math.nan, math.inf, -math.inf, 100.5, "1", None, True])
def test_G05_logit_bias_value(bias):
    assert_refused(r"logit_bias\[3\]", {3: bias}, "use a number from -100 to 100")


@pytest.mark.parametrize("token_id", [-1, 2**31, "3", 1.0, True])
def test_G05_logit_bias_key(token_id):
    assert_refused("logit_bias token id", {token_id: 1.0}, "use an integer from 0")


@pytest.mark.parametrize("value", [dict.fromkeys(range(10**6), 1.0), [(1, 2.0)], "x"])
def test_G05_logit_bias_is_not_a_small_mapping(value):
    assert_refused("logit_bias", value, "of at most 16384 entries")


@pytest.mark.parametrize("field", [{"logit_bias": {32: 1.0}}, {"stop_token_ids": [3, 32]}])
def test_G05_ids_outside_the_vocabulary(field):
    params = SamplingParams(**field)
    params.check_vocab(33)
    with pytest.raises(RequestError, match=f"{next(iter(field))} names token 32; ids go from 0 to 31"):
        params.check_vocab(32)
    with pytest.raises(RequestError, match="ids go from 0 to 31"):
        resolve(params, vocab_size=32)


def test_G05_no_request_forbids_every_token():
    everything = SamplingParams(min_tokens=1, stop_token_ids=[0, 1], ignore_eos=True)
    with pytest.raises(RequestError, match="forbids every token: all 2 are stop ids"):
        resolve(everything, vocab_size=2)
    assert resolve(everything, vocab_size=3).stop_token_ids == {0, 1}


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, 1e9, "1.1", True])
def test_G06_repetition_penalty_out_of_range(value):
    assert_refused("repetition_penalty", value, "use a number from 0.01 to 100; 1 switches it off")


@pytest.mark.parametrize("field", ["frequency_penalty", "presence_penalty"])
@pytest.mark.parametrize("value", [-2.1, 2.1, math.nan, math.inf, "0", True, None])
def test_G06_frequency_and_presence_out_of_range(field, value):
    assert_refused(field, value, "use a number from -2 to 2")


@pytest.mark.parametrize("value", [-1, 2**64, 0.5, True, "1"])
def test_G07_seed_out_of_range(value):
    assert_refused("seed", value, f"use an integer from 0 to {2**64 - 1}")


@pytest.mark.parametrize("value", [0, 2**63, 2**64 - 1])
def test_G07_seed_over_the_whole_range(value):
    assert resolve(SamplingParams(seed=value, temperature=1.0)).seed == value


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(10, 90), (99, 1), (100, 0)])
def test_G09_exact_fit_works_and_one_more_does_not(prompt_len, max_tokens):
    assert resolve(SamplingParams(max_tokens=max_tokens), prompt_len=prompt_len).max_tokens == max_tokens
    with pytest.raises(ContextLengthError, match=f"{prompt_len} prompt tokens .* exceed the context of 100"):
        resolve(SamplingParams(max_tokens=max_tokens + 1), prompt_len=prompt_len)


@pytest.mark.parametrize("file", [{}, {"max_new_tokens": 5}, {"max_length": 200}])
def test_G09_full_context_leaves_nothing_to_generate(file):
    with pytest.raises(ContextLengthError, match="100 prompt tokens leave no room"):
        resolve(SamplingParams(), file, prompt_len=100)


@pytest.mark.parametrize("value", [list(range(1025)), {2}, 1.0, "</s>"])
def test_stop_token_ids_is_not_a_short_list(value):
    assert_refused("stop_token_ids", value, "use a list of at most 1024 token ids")


@pytest.mark.parametrize("item", [-1, 2**31, True, 1.0, "</s>", None])
def test_stop_token_ids_holds_a_bad_id(item):
    assert_refused(r"stop_token_ids\[1\]", [3, item], "use an integer from 0 to 2147483647")


@pytest.mark.parametrize("field", ["ignore_eos", "skip_special_tokens"])
@pytest.mark.parametrize("value", [0, 1, "yes", None])
def test_switches_are_bools(field, value):
    assert_refused(field, value, "use True or False")


def test_numpy_numbers_become_plain_ones_and_lists_are_copied():
    bias, stop = {np.int64(3): np.float32(0.5)}, ["a"]
    params = SamplingParams(n=np.int32(2), temperature=np.float32(0.5), logit_bias=bias, stop=stop)
    bias[4], stop[0] = 1.0, "b"
    assert (params.n, params.temperature, params.logit_bias, params.stop) == (2, 0.5, {3: 0.5}, ("a",))
    assert [type(v) for v in (params.n, params.temperature, *params.logit_bias)] == [int, float, int]


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3),
    st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.one_of(st.integers(-5, 5), st.text(max_size=2)), st.floats(), max_size=3),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), ANYTHING, max_size=4))
def test_any_value_is_accepted_or_refused_by_name(fields):
    try:
        params = SamplingParams(**fields)
    except RequestError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert dataclasses.replace(params) == params
    assert not refusal or any(name in refusal for name in fields)


def test_checking_parameters_needs_no_torch():
    code = "import sys, llama_fast; llama_fast.SamplingParams(temperature=1); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("params", "file", "temperature", "top_p", "top_k"),
    [
        ({}, {}, 0.0, 1.0, 0),
        ({}, CHAT_FILE, 0.6, 0.9, 0),
        ({}, {"do_sample": True}, 1.0, 1.0, 0),
        ({}, {"do_sample": True, "top_k": 20}, 1.0, 1.0, 20),
        ({}, {"temperature": 0.9, "top_p": 0.6}, 0.0, 1.0, 0),
        ({}, {"do_sample": False, "temperature": 0.9, "top_k": 20}, 0.0, 1.0, 0),
        ({"top_k": 5}, {}, 1.0, 1.0, 5),
        ({"top_p": 0.5}, {}, 1.0, 0.5, 0),
        ({"min_p": 0.1}, {}, 1.0, 1.0, 0),
        ({"top_k": 5}, {"temperature": 0.9, "top_p": 0.6}, 0.9, 0.6, 5),
        ({"temperature": 0.3}, CHAT_FILE, 0.3, 0.9, 0),
        ({"temperature": 0.3, "top_p": 1.0}, CHAT_FILE, 0.3, 1.0, 0),
        ({"temperature": 0}, CHAT_FILE, 0.0, 1.0, 0),
        ({"temperature": 0.7}, {}, 0.7, 1.0, 0),
    ],
)
def test_G2_explicit_over_file_over_builtin(params, file, temperature, top_p, top_k):
    resolved = resolve(SamplingParams(**params), file)
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (temperature, top_p, top_k)


def test_G2_repetition_penalty_of_the_file_counts_for_greedy_too():
    file = {"repetition_penalty": 1.3}
    assert resolve(SamplingParams(), file).repetition_penalty == 1.3
    assert resolve(SamplingParams(repetition_penalty=1.0), file).repetition_penalty == 1.0
    assert resolve(SamplingParams()).repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({}, 90),
        ({"max_new_tokens": 7}, 7),
        ({"max_new_tokens": 700}, 90),
        ({"max_length": 30}, 20),
        ({"max_length": 4096}, 90),
        ({"max_length": 30, "max_new_tokens": 40}, 40),  # G1: max_new_tokens wins
    ],
)
def test_G1_budget_of_the_file(file, expected):
    assert resolve(SamplingParams(), file).max_tokens == expected
    assert resolve(SamplingParams(max_tokens=3), file).max_tokens == 3


def test_G1_prompt_longer_than_max_length_of_the_file():
    with pytest.raises(ContextLengthError, match="max_length=10"):
        resolve(SamplingParams(), {"max_length": 10})


@pytest.mark.parametrize(
    ("params", "file", "config_eos", "expected"),
    [
        ({}, {}, None, set()),
        ({}, {}, 2, {2}),
        ({}, {}, [2, 3], {2, 3}),
        ({}, {"eos_token_id": 5}, 2, {5}),
        ({}, {"eos_token_id": [5, 6]}, 2, {5, 6}),
        ({}, {"eos_token_id": []}, 2, set()),
        ({"stop_token_ids": [9]}, {"eos_token_id": 5}, 2, {5, 9}),
        ({"stop_token_ids": [9], "ignore_eos": True}, {"eos_token_id": 5}, 2, {9}),
        ({"ignore_eos": True}, {}, 2, set()),
        ({}, {"eos_token_id": [5, 32000]}, 2, {5}),  # an eos without an embedding
    ],
)
def test_G13_stop_ids(params, file, config_eos, expected):
    assert resolve(SamplingParams(**params), file, config_eos).stop_token_ids == expected


def test_G21_several_greedy_samples():
    with pytest.raises(RequestError, match="n=2 with greedy decoding"):
        resolve(SamplingParams(n=2))
    with pytest.raises(RequestError, match="set temperature"):
        resolve(SamplingParams(n=2, temperature=1e-6), CHAT_FILE)
    assert resolve(SamplingParams(n=2), CHAT_FILE).n == 2


def test_G12_unset_seed_comes_from_torchs_generator():
    params = SamplingParams(temperature=1.0)
    torch.manual_seed(0)
    first = [resolve(params).seed for _ in range(64)]
    torch.manual_seed(0)
    assert first == [resolve(params).seed for _ in range(64)]
    assert len(set(first)) == 64
    # All 64 bits are drawn: each is set somewhere and clear somewhere.
    ever_set, always_set = functools.reduce(operator.or_, first), functools.reduce(operator.and_, first)
    assert (ever_set, always_set) == (2**64 - 1, 0)


def test_G12_greedy_and_seeded_requests_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    resolve(SamplingParams())
    resolve(SamplingParams(temperature=1.0, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    resolve(SamplingParams(temperature=1.0))
    assert not torch.equal(torch.get_rng_state(), state)

"""The kernels are on the path: whole models through `LLM.generate`, tokens as the reference's, calls counted."""

import types
from collections import Counter

import pytest

from llama_fast import LLM, SamplingParams, demo
from llama_fast.ops import gpu, reference, reference_attention, reference_sample

SPLIT = PAGE = 32
NEW_TOKENS = 5
NUM_TOP = 20
GRAPH_OPS = ("norm_qkv_rope_cache", "attention", "linear_residual", "norm_gate_up_act")


def _count_calls(monkeypatch, modules):
    """A Counter of (module, function) over every function that the modules define or export."""
    calls = Counter()

    def counted(module, name, function):
        def call(*args, **kwargs):
            calls[module, name] += 1
            return function(*args, **kwargs)

        return call

    for module in modules:
        label = module.__name__.rpartition(".")[2]
        for name, function in list(vars(module).items()):
            if isinstance(function, types.FunctionType):
                monkeypatch.setattr(module, name, counted(label, name, function))
    return calls


def _llm(folder, backend, device):
    sizes = {"page_size": PAGE, "split_size": SPLIT, "max_seq_len": 128, "max_batch": 3, "prefix_caching": False}
    return LLM(folder, backend=backend, device=device, **sizes)


def _prompts(llm):
    """Three prompts of different lengths; with the new tokens each crosses slot 32 or 64."""
    text = "Once upon a time there was a little girl who had a red ball and a small dog. " * 8
    token_ids = llm.tokenizer.encode(text)
    return [token_ids[:62], token_ids[5:35], token_ids[:63]]


def _assert_same_but_for_ties(outputs, expected):
    """Equal tokens up to a first difference that the two backends' own disagreement about that step explains."""
    compared = 0
    for ours, theirs in zip(outputs, expected, strict=True):
        ours, theirs = ours.outputs[0], theirs.outputs[0]
        for step, (token, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            if token == other:
                compared += 1
                continue
            mine, reference_logprobs = ours.logprobs[step], theirs.logprobs[step]
            common = mine.keys() & reference_logprobs.keys()
            noise = max(abs(mine[t].logprob - reference_logprobs[t].logprob) for t in common)
            gap = reference_logprobs[other].logprob - reference_logprobs[token].logprob
            assert gap <= 2 * noise, f"step {step}: {token} instead of {other}, {gap} behind, noise {noise}"
            break  # other tokens from here on
    return compared


@pytest.mark.parametrize("model", ["demo", "stories260K-wide128"])
def test_whole_models_run_on_the_kernels_alone(model, device, request, monkeypatch):
    folder = demo.PATH if model == "demo" else request.getfixturevalue("shared_data") / model
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=NUM_TOP)
    plain = _llm(folder, "reference", device)
    prompts = _prompts(plain)
    expected = plain.generate(prompts, params)

    ours = _llm(folder, "gpu", device)
    assert ours.engine.ops is gpu
    calls = _count_calls(monkeypatch, [gpu, reference, reference_attention, reference_sample])
    outputs = ours.generate(prompts, params)
    assert _assert_same_but_for_ties(outputs, expected) >= 2 * NEW_TOKENS

    assert {module for module, _ in calls} == {"gpu"}, "a run on the GPU called the reference"
    layers = ours.model.config.num_hidden_layers
    # One step of prompts, then one of generated tokens for all but the last new token.
    runs = NEW_TOKENS
    assert calls["gpu", "embed"] == runs
    for name in GRAPH_OPS:
        assert calls["gpu", name] == runs * layers * (2 if name == "linear_residual" else 1), name
    assert sum(calls["gpu", name] for name in GRAPH_OPS) == 5 * runs * layers
    assert calls["gpu", "norm_lm_head"] == calls["gpu", "sample"] == runs


def test_negative_control_a_reference_op_on_the_path_is_noticed(device, monkeypatch):
    llm = _llm(demo.PATH, "gpu", device)
    monkeypatch.setattr(gpu, "silu_mul", reference.silu_mul)
    monkeypatch.setattr(gpu, "norm_lm_head", lambda x, norm, head: reference.norm_lm_head(x, norm, head))
    calls = _count_calls(monkeypatch, [reference])
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    assert calls["reference", "norm_lm_head"] == 1


def test_sampling_with_a_seed_draws_the_same_tokens(device):
    params = SamplingParams(max_tokens=4, temperature=0.9, top_p=0.9, top_k=40, seed=3, repetition_penalty=1.1)
    prompts = [[1, 5, 9, 200], [7, 7, 7]]
    plain = _llm(demo.PATH, "reference", device).generate(prompts, params)
    ours = _llm(demo.PATH, "gpu", device).generate(prompts, params)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in plain]

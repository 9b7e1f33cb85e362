"""GPTQ against its definition, and calibrated models against plainly rounded ones."""

from pathlib import Path

import pytest
import torch

from llama_fast import Int4Config, demo
from llama_fast.errors import ConfigError
from llama_fast.model.calibration import calibrate, gptq
from llama_fast.model.divergence import divergences, windows_of
from llama_fast.model.int4_rounding import round_weight
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import load_model
from llama_fast.model.quantization import Layout
from llama_fast.ops import reference
from llama_fast.ops.int4 import Int4Linear

DEMO = Path(demo.__path__[0])


def correlated(count, width, rank):
    """Inputs as networks have them: few directions, some features far larger than others."""
    x = torch.randn(count, rank) @ torch.randn(rank, width) + 0.1 * torch.randn(count, width)
    return x * torch.rand(width).mul(3).exp()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("outs", "ins", "group_size"), [(24, 128, 32), (7, 320, 64), (16, 384, 128)])
def test_outputs_are_nearer_than_those_of_plain_rounding(symmetric, outs, ins, group_size):
    x, weight = correlated(2000, ins, 20), torch.randn(outs, ins)
    layout = Layout(group_size, symmetric)
    got = gptq(weight, x.T @ x, layout, torch.float32)
    plain, _ = round_weight(weight, group_size, symmetric, torch.float32)
    importance = x.square().mean(0)
    weighed, _ = round_weight(weight, group_size, symmetric, torch.float32, importance)
    assert got.values.max() <= 15 and (got.zeros is None) == symmetric

    def error(rounded):
        return (x @ (rounded.dequantized() - weight).T).square().sum().item()

    assert error(got) < 0.7 * error(weighed) < 0.7 * error(plain)


def test_against_the_definition():
    """Column after column in fp64, with the inverse made anew for the columns that are left."""
    ins, outs, group_size = 64, 5, 32
    x, weight = correlated(500, ins, 10).double(), torch.randn(outs, ins).double()
    gram = (x.T @ x).float()
    got = gptq(weight.float(), gram, Layout(group_size, True), torch.float32)
    scale = got.scales.double().repeat_interleave(group_size, 1)
    gram = gram.double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(ins)
    left, rest = gram.diagonal().argsort(descending=True).tolist(), weight.clone()
    values = torch.zeros(outs, ins)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        q = (rest[:, column] / scale[:, column]).round().clamp(-8, 7)
        values[:, column] = q + 8
        error = (rest[:, column] - q * scale[:, column]) / inverse[0, 0]
        rest[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    # A tie may round the other way in fp32, and moves what comes after it.
    assert (got.values == values).double().mean() > 0.97


@pytest.mark.parametrize("gram", ["zero", "nan", "rank one"])
def test_inputs_that_tell_little(gram):
    x = torch.randn(1, 64)
    matrix = {"zero": torch.zeros(64, 64), "nan": torch.full((64, 64), torch.nan), "rank one": x.T @ x}[gram]
    weight = torch.randn(6, 64)
    got = gptq(weight, matrix, Layout(32, True), torch.bfloat16)
    assert got.scales.isfinite().all() and (got.scales > 0).all()
    assert (got.dequantized() - weight).abs().max() < 3


@pytest.fixture(scope="module")
def text():
    """Stories that the demo model itself tells: the repository holds no text."""
    from llama_fast import LLM, SamplingParams

    llm = LLM(DEMO, max_seq_len=128, max_batch=24)
    params = SamplingParams(temperature=1.0, max_tokens=100, seed=3, n=24, ignore_eos=True)
    (output,) = llm.generate("Once upon a time", params)
    ids = [[*output.prompt_token_ids, *sample.token_ids] for sample in output.outputs]
    return ids[:8], ids[20:]


@pytest.mark.parametrize("config", [Int4Config(), Int4Config(32, symmetric=False, lm_head="int4")])
def test_kl_is_lower_than_that_of_plain_rounding(text, config):
    calibrates, compares = text
    original = load_model(LlamaLM, DEMO, dtype=None, device="cpu")
    plain = load_model(LlamaLM, DEMO, dtype=None, device="cpu", quantization=config)
    model = load_model(LlamaLM, DEMO, dtype=None, device="cpu")
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    calibrate(model, config.scheme(), reference, calibrates)
    for each in (original, plain, model):
        each.prepare(reference)
    models = [(each, reference) for each in (original, plain, model)]
    same, rounded, calibrated = divergences(models[0], models, compares)
    assert same.kl == 0 and same.same_top == 1.0
    assert calibrated.kl < 0.75 * rounded.kl
    assert type(model.lm_head) is (Int4Linear if config.lm_head == "int4" else type(original.lm_head))
    assert all(isinstance(layer.mlp.down_proj, Int4Linear) for layer in model.model.layers)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_perplexity_is_that_of_the_perplexity_command(text):
    """Divergence and engine agree on what a text costs."""
    import math

    from llama_fast import LLM, SamplingParams

    window = text[1][0]
    model = load_model(LlamaLM, DEMO, dtype=None, device="cpu")
    model.prepare(reference)
    (found,) = divergences((model, reference), [(model, reference)], [window])
    llm = LLM(DEMO, max_seq_len=128, backend="reference")
    (output,) = llm.generate([window], SamplingParams(max_tokens=0, prompt_logprobs=0))
    scored = zip(window[1:], output.prompt_logprobs[1:], strict=True)
    mean = -sum(logprobs[token].logprob for token, logprobs in scored) / (len(window) - 1)
    assert found.num_tokens == len(window) - 1
    assert math.isclose(found.perplexity, math.exp(mean), rel_tol=1e-4)


def test_windows():
    assert windows_of(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert windows_of(range(7), 3, [9]) == [[9, 0, 1], [9, 2, 3], [9, 4, 5], [9, 6]]
    assert windows_of([], 3) == []


def test_a_group_that_does_not_fit_is_refused(text):
    from llama_fast.model.quantization import Int4Scheme, layout

    model = load_model(LlamaLM, DEMO, dtype=None, device="cpu")
    odd = Int4Scheme("here", lambda name, ins: layout("here", name, ins, 96, True), None)
    with pytest.raises(ConfigError, match="has 640 inputs, no multiple of group_size=96"):
        calibrate(model, odd, reference, text[0][:1])

"""The native kernels are on the path: whole models through `LLM.generate`, tokens as the reference's, calls counted."""

import copy
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from llama_fast import LLM, LlamaConfig, LlamaForCausalLM, SamplingParams, demo
from llama_fast.engine.engine import Engine
from llama_fast.engine.prompts import SCORED_ROWS
from llama_fast.ops import cpu, reference, reference_attention, reference_sample, select_backend
from llama_fast.ops.activations import ACTIVATIONS
from llama_fast.ops.rows import needs_grad
from tests.kernels.test_on_path import GRAPH_OPS, _assert_same_but_for_ties, _count_calls, _prompts
from tests.ops.cpu_cases import gate_up_of
from tests.tiny import RecordingEngine, make_model, make_request, op_by_op

pytestmark = pytest.mark.usefixtures("instruction_set", "uninitialised_memory_is_nan")

NEW_TOKENS = 17
NUM_TOP = 20
# Of reference modules only these may be called: what a batch may hold is checked in one place.
CHECKS = {("reference_sample", "check_logits"), ("reference_sample", "check_sampling")}


class CountedModule:
    """`llama_fast._C` whose functions are counted."""

    def __init__(self, module):
        self._module, self.calls = module, Counter()

    def __getattr__(self, name):
        value = getattr(self._module, name)
        if isinstance(value, type):
            return value

        def call(*args):
            self.calls[name] += 1
            return value(*args)

        return call


@pytest.fixture
def native_calls(monkeypatch):
    counted = CountedModule(cpu._C)
    monkeypatch.setattr(cpu, "_C", counted)
    return counted.calls


def _llm(folder, backend, **sizes):
    sizes = {"page_size": 32, "split_size": 32, "max_seq_len": 128, "max_batch": 3, **sizes}
    return LLM(folder, backend=backend, device="cpu", **sizes)


@pytest.mark.parametrize("layers_at_once", [True, False])
@pytest.mark.parametrize("model", ["demo", "stories260K-wide128"])
def test_whole_models_run_on_the_native_kernels_alone(model, layers_at_once, request, monkeypatch, native_calls):
    folder = demo.PATH if model == "demo" else request.getfixturevalue("shared_data") / model
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=NUM_TOP, prompt_logprobs=1
    )
    plain = _llm(folder, "reference")
    prompts = _prompts(plain)
    expected = plain.generate(prompts, params)

    ours = _llm(folder, "cpu")
    assert ours.engine.ops is cpu
    calls = _count_calls(monkeypatch, [cpu, reference, reference_attention, reference_sample])
    if not layers_at_once:
        op_by_op(monkeypatch, cpu)
    outputs = ours.generate(prompts, params)
    assert _assert_same_but_for_ties(outputs, expected) >= 2 * NEW_TOKENS

    assert {call for call in calls if call[0] != "cpu"} <= CHECKS, "a run on the CPU called the reference"
    layers = ours.model.config.num_hidden_layers
    # One step of prompts, then one of generated tokens for all but the last new token.
    runs = NEW_TOKENS
    assert calls["cpu", "embed"] == runs
    for name in GRAPH_OPS:
        each = 2 if name == "linear_residual" else 1
        assert calls["cpu", name] == (0 if layers_at_once else runs * layers * each), name
    # The prompts are scored as well, some rows at a time; a last token predicts none of its prompt.
    scored = sum(-(-(len(prompt) - 1) // SCORED_ROWS) for prompt in prompts)
    assert calls["cpu", "norm_lm_head"] == calls["cpu", "log_probs"] == runs + scored
    assert calls["cpu", "sample"] == runs
    for name in ("linear", "rms_norm", "rope_and_cache", "silu_mul"):
        assert calls["cpu", name] == 0, f"{name} should be part of an op of the graph"

    # All layers are one native call, or each of their ops is.
    heads = runs + scored
    expected_calls = {"linear": heads, "sample": runs, "advance": runs, "log_probs": heads, "run_layers": runs}
    if not layers_at_once:
        del expected_calls["run_layers"]
        expected_calls |= {"norm_qkv_rope_cache": runs * layers, "attention": runs * layers}
        expected_calls["linear"] += 3 * runs * layers
    assert native_calls == expected_calls


@pytest.mark.parametrize("name", ["norm_lm_head", "attention", "sample"])
def test_negative_control_a_reference_op_on_the_path_is_noticed(monkeypatch, name):
    llm = _llm(demo.PATH, "cpu")
    plain = getattr(reference, name)
    op_by_op(monkeypatch, cpu)
    monkeypatch.setattr(cpu, name, lambda *args: plain(*args))
    calls = _count_calls(monkeypatch, [reference, reference_attention, reference_sample])
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1))
    assert not set(calls) <= CHECKS


def test_sampling_with_a_seed_draws_the_same_tokens():
    params = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, top_k=40, seed=3, repetition_penalty=1.1, n=2)
    prompts = [[1, 5, 9, 200], [7, 7, 7]]
    # In fp32, where hardly any two choices are as near as the backends' errors.
    ours, plain = (
        _llm(demo.PATH, backend, dtype="float32").generate(prompts, params) for backend in ("cpu", "reference")
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert [sample.token_ids for sample in mine.outputs] == [sample.token_ids for sample in theirs.outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_odd_sizes_has_the_logits_of_the_reference(dtype):
    """33 intermediate, 97 tokens, biases; within twice the reference's own error in that dtype, plus one ulp."""
    changes = {"attention_bias": True, "mlp_bias": True, "head_dim": 18, "hidden_act": "gelu_new"}
    model, exact_model = make_model(dtype, **changes), make_model(torch.float64, **changes)
    exact_model.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    prompt = [index * 31 % 97 for index in range(70)]

    def logits(model, backend):
        engine = Engine(model, backend=backend, max_batch=2, max_seq_len=80, page_size=8, split_size=32)
        request = make_request(model, prompt, max_tokens=1, temperature=0.0, prompt_logprobs=97)
        for _ in engine.run([request]):
            pass
        rows = [[position[token].logprob for token in range(97)] for position in request.prompt_logprobs if position]
        return torch.tensor(rows, dtype=torch.float64)

    exact, plain, ours = logits(exact_model, "reference"), logits(model, "reference"), logits(model, "cpu")
    assert ours.numel() >= 4096
    worst = (plain - exact).abs().max()
    assert (ours - exact).abs().max() <= 2 * worst + torch.finfo(dtype).eps * exact.abs().max()


# --- which backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_auto_is_the_native_backend_on_the_cpu(dtype):
    assert select_backend("auto", torch.device("cpu"), dtype) is cpu
    assert select_backend("cpu", torch.device("cpu"), dtype) is cpu


def test_auto_serves_an_llm_with_the_native_kernels(native_calls):
    llm = LLM(demo.PATH, device="cpu", max_seq_len=64, max_batch=1)
    assert llm.engine.ops is cpu
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert native_calls["run_layers"] == 2


def test_a_float64_model_runs_on_the_reference(native_calls):
    model = make_model(torch.float64)
    engine = Engine(model, max_batch=1, max_seq_len=32)
    assert engine.ops is reference
    for _ in engine.run([make_request(model, [1, 2, 3], max_tokens=2)]):
        pass
    assert not native_calls


def _causal_lm():
    fields = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 33, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**fields, num_attention_heads=6, num_key_value_heads=2, head_dim=16))


def test_a_model_with_gradients_runs_on_the_reference(native_calls):
    model, input_ids = _causal_lm(), torch.arange(12).view(2, 6)
    assert needs_grad(*model.parameters())
    model(input_ids, labels=input_ids).loss.backward()
    assert not native_calls
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        logits = model(input_ids).logits
    assert native_calls["run_layers"] == 1
    torch.testing.assert_close(logits, model(input_ids).logits.detach(), rtol=1e-4, atol=1e-4)


def test_a_step_of_an_optimizer_is_seen():
    """The kernels read the parameters where they lie, and are given new addresses where those change."""
    model, input_ids = _causal_lm(), torch.arange(12).view(2, 6)

    def logits():
        with torch.no_grad():
            return model(input_ids).logits

    before = logits()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1)
    changed = logits()
    assert not torch.equal(changed, before)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(logits(), changed)
    model.to(torch.bfloat16).to(torch.float32)
    torch.testing.assert_close(logits(), changed, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_parameters(copied):
    model, input_ids = _causal_lm(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids).logits
        other = copied(model)
        for parameter in model.parameters():
            parameter.zero_()
        del model
        assert torch.equal(other(input_ids).logits, expected)


def test_known_functions_are_known_by_their_names(native_calls):
    for name, function in ACTIVATIONS.items():
        gate_up = gate_up_of(torch.randn(8, 4), activation=function)
        assert cpu.ACTIVATION_NUMBERS[gate_up.activation] == cpu.ACTIVATION_NUMBERS[name]
    cpu.norm_gate_up_act(torch.randn(2, 4), SimpleNamespace(weight=torch.ones(4), eps=1e-5), gate_up, None)
    assert native_calls == {"linear": 1}


def _shifted_relu(x):
    return torch.relu(x) + 0.5


def test_an_activation_may_be_a_function(native_calls):
    model = make_model(torch.float32, hidden_act=_shifted_relu)
    results = []
    for backend in ("cpu", "reference"):
        engine = Engine(model, backend=backend, max_batch=1, max_seq_len=64)
        request = make_request(model, [5, 6, 7, 8], max_tokens=6, temperature=0.0)
        for _ in engine.run([request]):
            pass
        results.append(request.samples[0].token_ids)
    assert results[0] == results[1]
    assert native_calls["linear"] == 6 * (3 * 2 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 18}])
def test_layers_at_once_have_the_bits_of_their_ops(dtype, changes, monkeypatch):
    model = make_model(dtype, **changes)
    results = []
    for at_once in (True, False):
        if not at_once:
            op_by_op(monkeypatch, cpu)
        engine = RecordingEngine(model, backend="cpu", max_batch=4, max_seq_len=128, page_size=8, split_size=32)
        prompts = [[index * 31 % 97 for index in range(length)] for length in (1, 40, 70)]
        results.append(engine.generate([make_request(model, p, i, max_tokens=6) for i, p in enumerate(prompts)]))
    for key, (tokens, logits) in results[0].items():
        assert tokens == results[1][key][0]
        assert torch.equal(logits, results[1][key][1])

"""`generate` keeps one engine, survives Ctrl-C, and hands hub arguments on."""

import pytest
import torch

from llama_fast import LLM, LlamaConfig, LlamaForCausalLM, demo
from llama_fast.engine.engine import Engine
from llama_fast.errors import BackendError, GenerationInterrupted, RequestError, UnsupportedError

FIELDS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
IDS = torch.tensor([[3, 14, 15], [92, 65, 35]])
GREEDY = {"do_sample": False, "eos_token_id": -1}


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**FIELDS, initializer_range=0.3)).requires_grad_(False)


def test_one_engine_until_a_call_needs_more(model):
    model.generate(IDS, max_new_tokens=20, **GREEDY)
    first = model._engine
    model.generate(IDS, max_new_tokens=20, **GREEDY)
    model.generate(IDS[:1], max_new_tokens=30, **GREEDY)  # a conversation grows: there is room for it
    assert model._engine is first
    model.generate(IDS, max_new_tokens=200, **GREEDY)
    second = model._engine
    assert second is not first
    assert second.max_seq_len >= 203
    model.generate(IDS.repeat(9, 1), max_new_tokens=2, **GREEDY)
    third = model._engine
    assert third is not second
    assert (third.max_batch, third.max_seq_len) == (18, second.max_seq_len)
    model.generate(IDS, max_new_tokens=200, **GREEDY)
    assert model._engine is third


def test_K04_interrupted_generate_keeps_what_there_is(model, monkeypatch):
    whole = model.generate(IDS, max_new_tokens=6, **GREEDY)
    step, calls = Engine.step, []

    def interrupted(engine):
        calls.append(engine)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        with pytest.raises(GenerationInterrupted) as caught:
            model.generate(IDS, max_new_tokens=6, **GREEDY)
    assert torch.equal(caught.value.outputs, whole[:, : IDS.shape[1] + 3])
    assert torch.equal(model.generate(IDS, max_new_tokens=6, **GREEDY), whole)


def test_sampling_arguments_without_sampling_are_not_ignored_in_silence(model):
    with pytest.warns(UserWarning, match="no effect without do_sample=True: temperature, top_p"):
        model.generate(IDS, max_new_tokens=1, temperature=1.5, top_p=0.9)
    with pytest.raises(RequestError, match="do_sample"):
        model.generate(IDS, max_new_tokens=1, do_sample="no")
    with pytest.raises(RequestError, match="pad_token_id=97 is not an id of the vocabulary, 0 to 96"):
        model.generate(IDS, max_new_tokens=1, pad_token_id=97)


def test_F1_revision_and_its_company_reach_the_hub(monkeypatch):
    asked = []

    def snapshot_download(repo_id, **arguments):
        asked.append((repo_id, arguments))
        return str(demo.PATH)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    where = {"revision": "v1", "cache_dir": "/somewhere", "token": "t", "local_files_only": True}
    LlamaForCausalLM.from_pretrained("owner/name", **where)
    LLM("owner/name", max_seq_len=64, **where)
    assert len(asked) == 2
    for repo_id, arguments in asked:
        assert repo_id == "owner/name"
        assert {name: str(arguments[name]) for name in where} == {name: str(value) for name, value in where.items()}


@pytest.mark.parametrize("name", ["device_map", "attn_implementation"])
def test_arguments_of_the_page_that_are_not_there_yet_are_named(name):
    with pytest.raises(UnsupportedError, match=rf"from_pretrained\({name}=...\)"):
        LlamaForCausalLM.from_pretrained(demo.PATH, **{name: "x"})


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "tpu", "cuda:77", [0]])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(BackendError, match="device="):
        LlamaForCausalLM.from_pretrained(demo.PATH, device=device)


def test_labels_need_every_position_in_order(model):
    with pytest.raises(RequestError, match="logits_to_keep"):
        model(IDS, labels=IDS, logits_to_keep=torch.tensor([2, 1, 0]))
    with pytest.raises(RequestError, match="position_ids must be integers from 0"):
        model(IDS, position_ids=torch.tensor([[-1, 0, 1]]))

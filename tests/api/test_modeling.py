"""LlamaForCausalLM as a PyTorch module: callables, copies, moves, training mode."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama

from llama_fast import LlamaConfig, LlamaForCausalLM
from llama_fast.errors import RequestError, UnsupportedError

FIELDS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS)).requires_grad_(False)


def test_C7_hidden_act_may_be_a_function(model):
    by_name = LlamaForCausalLM(LlamaConfig(**FIELDS, hidden_act="gelu"))
    by_function = LlamaForCausalLM(LlamaConfig(**FIELDS, hidden_act=F.gelu))
    for other in (by_name, by_function):
        other.requires_grad_(False).load_state_dict(model.state_dict())
    assert torch.equal(by_function(IDS).logits, by_name(IDS).logits)
    assert not torch.equal(by_function(IDS).logits, model(IDS).logits)


def test_C9_random_weights_have_the_range_of_the_page():
    model = LlamaForCausalLM(LlamaConfig(**{**FIELDS, "hidden_size": 256, "pad_token_id": 5}, mlp_bias=True))
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert not model.model.layers[0].mlp.up_proj.bias.any()
    assert not model.model.embed_tokens.weight[5].any()
    assert (model.model.norm.weight == 1).all()


def test_a_copy_and_a_pickle_after_generate_answer_the_same(model):
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
        with torch.no_grad():
            other.model.norm.weight.mul_(-1)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)


def test_cast_then_generate_equals_a_model_made_in_that_dtype(model):
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    fresh = LlamaForCausalLM(LlamaConfig(**FIELDS)).requires_grad_(False).to(torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model.to(torch.bfloat16)(IDS).logits, fresh(IDS).logits)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=4, do_sample=False), fresh.generate(IDS, max_new_tokens=4, do_sample=False)
    )


def test_autocast_changes_nothing(model):
    expected = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(IDS).logits, expected)
        loss = model.requires_grad_(True)(IDS, labels=IDS).loss
    loss.backward()
    assert model.model.norm.weight.grad.isfinite().all()


def test_float_masks_and_dropout_are_refused_by_name(model):
    with pytest.raises(RequestError, match="additive masks"):
        model(IDS, attention_mask=torch.tensor([[0.0, 0, 0, 0, 0, -3e38]] * 2))
    with pytest.raises(RequestError, match="outside the vocabulary, 0 to 96"):
        model(IDS + 10)
    with pytest.raises(UnsupportedError, match="forward\\(output_attentions=...\\)"):
        model(IDS, output_attentions=True)
    model.config.attention_dropout = 0.1
    model.eval()(IDS)
    with pytest.raises(UnsupportedError, match="attention_dropout=0.1"):
        model.train()(IDS)


def test_a_mask_with_an_empty_row_gives_zeros_there_and_the_same_elsewhere(model):
    mask = torch.ones_like(IDS)
    mask[0] = 0
    logits = model(IDS, attention_mask=mask).logits
    assert not logits[0].any()
    assert torch.equal(logits[1], model(IDS[1:]).logits[0])


def test_C16_parameters_have_the_names_and_sharing_of_the_page():
    config = {**FIELDS, "tie_word_embeddings": True}
    ours, theirs = LlamaForCausalLM(LlamaConfig(**config)), HFLlama(HFConfig(**config))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))

"""A09: any even head_dim runs on the reference backend and gives transformers' logits."""

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFLlama

from llama_fast import LlamaConfig, LlamaForCausalLM
from llama_fast.errors import ConfigError

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("head_dim", [2, 6, 80, 96, 512])
def test_A09_logits_equal_those_of_transformers(tmp_path, head_dim):
    theirs = HFLlama(HFConfig(**SHAPE, head_dim=head_dim)).eval()
    theirs.save_pretrained(tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    assert ours.config.head_dim == head_dim
    input_ids = torch.randint(SHAPE["vocab_size"], (2, 70))
    with torch.no_grad():
        expected = theirs(input_ids).logits
        torch.testing.assert_close(ours(input_ids).logits, expected, rtol=0, atol=1e-4)
        longer_heads = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=head_dim + 2))(input_ids).logits
    assert (longer_heads - expected).abs().max() > 0.1  # the tolerance tells models apart


@pytest.mark.parametrize("head_dim", [1, 7, 511])
def test_A09_odd_ones_are_refused(head_dim):
    with pytest.raises(ConfigError, match=f"head_dim={head_dim} .* even"):
        LlamaConfig(**SHAPE, head_dim=head_dim)

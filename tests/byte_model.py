"""A tiny random checkpoint whose tokens are the 256 bytes, bos and eos: most of what it writes is no valid UTF-8."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from llama_fast import LlamaConfig, LlamaForCausalLM, LlamaTokenizer


def save_byte_model(folder, *, adds_bos=True):
    """Write model and tokenizer to `folder`; `adds_bos`: whether the tokenizer puts bos before a text."""
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocab, "<s>": 256, "</s>": 257}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    LlamaTokenizer.from_backend(backend, {"bos_token": "<s>", "eos_token": "</s>"}).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

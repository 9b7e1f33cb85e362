"""Checkpoint folders for tests, written by transformers and safetensors or byte by byte."""

import json
import struct

import torch
import transformers
from safetensors.torch import save_file

from llama_fast.config import LlamaConfig
from llama_fast.model.llama import LlamaLM

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def transformers_lm(dtype=torch.float32, **overrides):
    """A random transformers model: the writer of the checkpoints."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **overrides)).to(dtype)


def meta(module_class=LlamaLM, **overrides):
    """Our module without memory, as `from_pretrained` makes it."""
    with torch.device("meta"):
        return module_class(LlamaConfig(**SHAPE, **overrides))


def write(folder, tensors, name=SINGLE):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def write_shards(folder, shards, **changes):
    """Shards {file: {name: tensor}} and their index; `changes` replace entries of the index's weight_map."""
    for file, tensors in shards.items():
        write(folder, tensors, file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return folder


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    assert [name for name in expected if not same_bits(state[name], expected[name])] == []


def raw_file(path, header, data):
    """A safetensors file with a header of any bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)

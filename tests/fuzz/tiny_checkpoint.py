"""The checkpoint that the targets of weights damage: one layer, 10 KB, and a module that takes its tensors."""

import tempfile
from pathlib import Path

import torch

from llama_fast.config import LlamaConfig
from llama_fast.model.checkpoint import save_weights
from llama_fast.model.llama import LlamaLM
from tests.tiny import randomize

_CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def meta_model() -> LlamaLM:
    """The model without its weights."""
    with torch.device("meta"):
        return LlamaLM(_CONFIG)


def checkpoint_files(max_shard_size: int) -> dict[str, bytes]:
    """File name -> content of the saved model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = save_weights(randomize(LlamaLM(_CONFIG)), Path(folder), max_shard_size=max_shard_size)
        return {path.name: path.read_bytes() for path in paths}

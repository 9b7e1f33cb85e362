"""Checkpoints with the shape of a known model and random weights: what a bench reads and computes is the same."""

from pathlib import Path
from typing import Any

import torch

_LLAMA_3_2_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
# A vocabulary that leaves the layers, not the LM head, most of the time; RoPE without scaling, which GGUF says in one
# number. 1.04 billion parameters.
_LLAMA_1B_32K = {
    **_LLAMA_3_2_1B,
    "vocab_size": 32000,
    "head_dim": 64,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
_TINY = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-1b-32k": _LLAMA_1B_32K,
    "tiny": {**_LLAMA_3_2_1B, **_TINY},
}


def write_checkpoint(folder: Path, shape: str, seed: int) -> None:
    """A bf16 checkpoint of a named shape: weights ~ N(0, initializer_range), norms 1."""
    # Imported here: bench_load measures memory above imported torch alone.
    from llama_fast.config import LlamaConfig
    from llama_fast.model.checkpoint import save_weights
    from llama_fast.model.llama import LlamaLM

    config = LlamaConfig(**SHAPES[shape], dtype="bfloat16")
    torch.manual_seed(seed)
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaLM(config)
    finally:
        torch.set_default_dtype(default_dtype)
    config.save_pretrained(folder)
    save_weights(model, folder)

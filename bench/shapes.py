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
_LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
_LLAMA_3_1_70B = {
    **_LLAMA_3_1_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
_TINY = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-1b-32k": _LLAMA_1B_32K,
    "llama-3.1-8b": _LLAMA_3_1_8B,
    "llama-3.1-70b": _LLAMA_3_1_70B,
    "tiny": {**_LLAMA_3_2_1B, **_TINY},
}


def build_model(
    config: Any, device: torch.device, dtype: torch.dtype, seed: int, model_class: type[Any] | None = None
) -> Any:
    """A model with random weights from `seed`, made where it will run: no file, and no copy on the CPU.

    Args:
        config: a LlamaConfig.
        model_class: LlamaLM (the default) or a subclass.
    """
    from llama_fast.model.llama import LlamaLM, RMSNorm

    with torch.device("meta"):
        model = (model_class or LlamaLM)(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:  # `to_empty` gives each name a tensor of its own
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(seed)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, RMSNorm):  # whose ones did not outlive the meta device
            torch.nn.init.ones_(module.weight)
    config.dtype = dtype
    return model.requires_grad_(False).eval()


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

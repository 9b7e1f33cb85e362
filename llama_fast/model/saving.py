"""A model written as a checkpoint: weights, config.json and, for int4 weights, a canary."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError
from llama_fast.model.canary import KEY, Canary, make_canary
from llama_fast.model.checkpoint_save import save_weights
from llama_fast.model.int4_modules import quantization_config
from llama_fast.model.llama import LlamaLM
from llama_fast.ops.int4 import Int4Linear

_CANARY_TOKENS = 32


def save_model(
    model: LlamaLM, folder: Path, *, max_shard_size: int | str = "5GB", canary: Canary | None = None
) -> None:
    """Write weights and config.json; int4 projections as compressed-tensors' "pack-quantized" files.

    Args:
        canary: goes into the header of the weights' first file.

    Raises:
        ConfigError: the configuration cannot be written, or `max_shard_size` is no size; nothing is written then.
        UnsupportedError: int4 zeros that the format cannot hold.
        CheckpointIOError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointIOError(f"{folder}: no folder can be made there: {error.strerror}") from error
    config = saved_config(model)
    config.validate()
    config.to_json_string()  # raises before the weights are written, if at all
    metadata = {} if canary is None else {KEY: canary.to_json()}
    save_weights(model, folder, max_shard_size=max_shard_size, metadata=metadata)
    config.save_pretrained(folder)


def saved_config(model: LlamaLM) -> LlamaConfig:
    """The configuration of what is written, which a rounded head and int4 weights change."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = ["LlamaForCausalLM"]  # not a subclass's name, which no reader knows
    quantized = quantization_config(model)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    if quantized is not None:
        config.quantization_config = quantized  # type: ignore[attr-defined]
        if isinstance(model.lm_head, Int4Linear):
            config.tie_word_embeddings = False
    return config


def default_canary(model: LlamaLM, ops: ModuleType) -> Canary | None:
    """A canary of int4 weights whose original is not at hand, on token ids from all over the vocabulary."""
    if quantization_config(model) is None:
        return None
    model.prepare(ops)
    return make_canary(model, ops, spread_ids(model.config.vocab_size))


def spread_ids(vocab_size: int) -> list[int]:
    """Token ids from all over the vocabulary."""
    return [index * 7919 % vocab_size for index in range(1, _CANARY_TOKENS + 1)]

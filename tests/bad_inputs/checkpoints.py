"""A tiny checkpoint, whole or in shards, and files with any header."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save

from llama_fast.config import LlamaConfig
from llama_fast.model.checkpoint import load_weights
from llama_fast.model.llama import LlamaLM

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
HEAD, NORM, UP = "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LOADS = ("mmap", "copy")


def module() -> LlamaLM:
    with torch.device("meta"):
        return LlamaLM(CONFIG)


def _random_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in module().state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


STATE = _random_state()


def load(folder: Path, how: str = "mmap", **options: object) -> LlamaLM:
    model = module()
    load_weights(model, folder, load=how, **options)
    return model


def is_the_checkpoint(model: torch.nn.Module) -> bool:
    state = model.state_dict()
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


def write(folder: Path, tensors: dict[str, torch.Tensor] = STATE, name: str = SINGLE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(save(tensors, metadata={"format": "pt"}))
    return folder / name


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **changes: object) -> None:
    """Shards {file: {name: tensor}} and their index; `changes` replace entries of its weight_map."""
    for name, tensors in shards.items():
        write(folder, tensors, name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    write_index(folder, {"metadata": {}, "weight_map": weight_map | changes})


def write_index(folder: Path, index: object) -> None:
    (folder / INDEX).write_text(json.dumps(index))


def two_shards() -> dict[str, dict[str, torch.Tensor]]:
    body = {name: tensor for name, tensor in STATE.items() if name != HEAD}
    return {"a.safetensors": body, "b.safetensors": {HEAD: STATE[HEAD]}}


def raw(folder: Path, header: object, data: bytes = b"", header_bytes: int | None = None) -> Path:
    """model.safetensors with a header of any bytes, or any JSON, and any size before it."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if header_bytes is None else header_bytes
    (folder / SINGLE).write_bytes(struct.pack("<Q", size) + content + data)
    return folder / SINGLE


def entry(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}

"""Quantized checkpoints: recognised by what their files say and refused by name, since no format is read yet.

Where a format writes it   config.json's `quantization_config`, or `compression_config` of old compressed-tensors;
                           AutoGPTQ, AutoAWQ and ModelOpt once wrote a file of their own beside a plain config.json.
Where that is silent       tensors that only quantized formats store are a mismatch (checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointIOError, ConfigError, UnsupportedError, brief
from llama_fast.files import read_json_object

_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_INT4_METHODS = ("gptq", "awq", "compressed-tensors", "torchao")  # have a 4-bit form that is planned


def refuse_quantized(config: LlamaConfig, folder: Path) -> None:
    """Raise unless the files of `folder` say nothing of quantized weights; `config` is that of its config.json.

    Raises:
        UnsupportedError: the weights are quantized; naming the file, the method, its bits and group size.
        ConfigError: the file's quantization settings are malformed.
        CheckpointIOError: a side file cannot be read.
    """
    path = Path(folder) / "config.json"
    for field in ("quantization_config", "compression_config"):
        if (content := getattr(config, field, None)) is not None:
            if hasattr(content, "to_dict"):
                content = content.to_dict()
            if not isinstance(content, Mapping):
                raise ConfigError(f"{path}: {field}={brief(content)}; use an object with quant_method, or null")
            raise _refusal(f"{path}: {field}", _method(f"{path}: {field}", content), content)
    for name, method in _SIDE_FILES.items():
        path = Path(folder) / name
        if path.exists():
            content = read_json_object(path, ConfigError, io_error=CheckpointIOError)
            raise _refusal(f"{path}", _method(f"{path}", {"quant_method": method, **content}), content)


def _method(where: str, content: Mapping[str, Any]) -> str:
    method = content.get("quant_method")
    if method is None and ("load_in_4bit" in content or "load_in_8bit" in content):
        method = "bitsandbytes"  # whose old files leave it out
    if method is None and {"bits", "group_size"} <= content.keys():
        method = "mlx"  # which never writes it
    if not isinstance(method, str):
        raise ConfigError(
            f"{where} has quant_method={brief(method)}; use a name such as 'gptq', or remove the object if the weights "
            "are not quantized"
        )
    return method


def _refusal(where: str, method: str, content: Mapping[str, Any]) -> UnsupportedError:
    bits, group_size = _bits(content), _first(content, "group_size", "q_group_size")
    if not isinstance(bits, int | float | None):  # EXL2's are averages, as 4.65
        raise ConfigError(f"{where} has bits={brief(bits)}; use a number")
    said = f"quant_method={brief(method)}"
    said += "" if bits is None else f", bits={brief(bits)}"
    said += "" if group_size is None else f", group_size={brief(group_size)}"
    later = " yet" if bits == 4 and method in _INT4_METHODS else ""
    return UnsupportedError(
        f"{where} has {said}: quantized weights are not supported{later}; use the model's float16, bfloat16 or "
        "float32 weights"
    )


def _bits(content: Mapping[str, Any]) -> Any:
    if content.get("load_in_8bit") or content.get("load_in_4bit"):
        return 4 if content.get("load_in_4bit") else 8
    if "int4" in json.dumps(content.get("quant_type")).lower():  # torchao says it in a class's name
        return 4
    return _first(content, "bits", "w_bit", "num_bits", "nbits", "weight_bits")


def _first(content: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of `names` in `content` or in an object within it, which formats nest differently."""
    for name in names:
        if content.get(name) is not None:
            return content[name]
    inner = (_first(value, *names) for value in content.values() if isinstance(value, Mapping))
    return next((value for value in inner if value is not None), None)

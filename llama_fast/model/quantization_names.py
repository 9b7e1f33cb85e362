"""Which method quantized a checkpoint, and to how many bits: each tool writes that in its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_fast.errors import ConfigError, brief


def method_of(where: str, content: Mapping[str, Any]) -> str:
    """The method's name.

    Raises:
        ConfigError: none is given, and nothing else tells.
    """
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


def bits_of(where: str, content: Mapping[str, Any]) -> int | float | None:
    """Bits of a weight; None where nothing tells.

    Raises:
        ConfigError: they are no number.
    """
    bits = _bits(content)
    if not isinstance(bits, int | float | None) or isinstance(bits, bool):  # EXL2's are averages, as 4.65
        raise ConfigError(f"{where} has bits={brief(bits)}; use a number")
    return bits


def _bits(content: Mapping[str, Any]) -> Any:
    if content.get("load_in_8bit") or content.get("load_in_4bit"):
        return 4 if content.get("load_in_4bit") else 8
    if "int4" in json.dumps(content.get("quant_type")).lower():  # torchao says it in a class's name
        return 4
    return first_of(content, "bits", "w_bit", "num_bits", "nbits", "weight_bits")


def first_of(content: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of `names` in `content` or in an object within it, which formats nest differently."""
    for name in names:
        if content.get(name) is not None:
            return content[name]
    inner = (first_of(value, *names) for value in content.values() if isinstance(value, Mapping))
    return next((value for value in inner if value is not None), None)

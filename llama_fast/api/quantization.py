"""TorchAoConfig as on the page's quantization section, and what from_pretrained makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from llama_fast.errors import ConfigError, UnsupportedError, brief
from llama_fast.model.quantization import Int4Config

_INT4 = ("int4_weight_only", "Int4WeightOnlyConfig")


class TorchAoConfig:
    """The page's way to ask for int4 weights: `TorchAoConfig("int4_weight_only", group_size=128)`.

    As torchao's, the weights are asymmetric; their zeros are integers here.

    Args:
        quant_type: "int4_weight_only".
        modules_to_not_convert: projections that stay as they are; the head always does unless
            `include_input_output_embeddings` asks for it.
        include_input_output_embeddings: round the head; the embedding stays as it is.
        group_size: 128, 64 or 32.

    Raises:
        UnsupportedError: another type, or an option that is not supported.
        ConfigError: a group size that is none of these.
    """

    def __init__(
        self,
        quant_type: str = "int4_weight_only",
        modules_to_not_convert: Sequence[str] | None = None,
        include_input_output_embeddings: bool = False,
        *,
        group_size: int = 128,
        **options: Any,
    ) -> None:
        if quant_type not in _INT4:
            raise UnsupportedError(f"TorchAoConfig(quant_type={brief(quant_type)}): supported is 'int4_weight_only'")
        # How torchao lays weights out, which has no meaning here.
        unknown = options.keys() - {"inner_k_tiles", "layout", "untie_embedding_weights"}
        if unknown:
            raise UnsupportedError(f"TorchAoConfig({min(unknown)}=...) is not supported; leave it out")
        self.quant_type = quant_type
        self.modules_to_not_convert = modules_to_not_convert
        self.include_input_output_embeddings = include_input_output_embeddings
        self.group_size = group_size
        self.int4_config()  # refuses what is wrong

    def int4_config(self) -> Int4Config:
        """The same in this library's terms."""
        skip = self.modules_to_not_convert or []
        if isinstance(skip, str) or not isinstance(skip, Iterable):
            raise ConfigError(f"modules_to_not_convert={brief(skip)}; use a list of names")
        head = "int4" if self.include_input_output_embeddings else "keep"
        return Int4Config(self.group_size, symmetric=False, skip=["lm_head", *skip], lm_head=head)


def one_quantization(quantization: str | Int4Config | None, config: object) -> str | Int4Config | None:
    """What the two arguments of from_pretrained ask for together.

    Raises:
        ConfigError: both are given, or `config` is no quantization.
        UnsupportedError: another method than int4.
    """
    if config is None:
        return quantization
    if quantization is not None:
        raise ConfigError("quantization and quantization_config are one thing; give one of them")
    if isinstance(config, Int4Config):
        return config
    if isinstance(config, TorchAoConfig):
        return config.int4_config()
    if hasattr(config, "to_dict"):  # transformers' own
        return _of_dict(config.to_dict())
    if isinstance(config, dict):
        return _of_dict(config)
    raise ConfigError(f"quantization_config={brief(config)}; use an Int4Config or a TorchAoConfig")


def _of_dict(content: dict[str, Any]) -> Int4Config:
    """TorchAoConfig.to_dict() of transformers: the type is a name with kwargs, or torchao's own object."""
    method = getattr(content.get("quant_method"), "value", content.get("quant_method"))
    kind, options = content.get("quant_type"), content.get("quant_type_kwargs") or {}
    if isinstance(kind, dict):
        inner = kind.get("default", kind)
        kind, options = (inner.get("_type"), inner.get("_data") or {}) if isinstance(inner, dict) else (inner, {})
    if not isinstance(options, dict):
        raise ConfigError(f"quantization_config has quant_type_kwargs={brief(options)}; use an object")
    if method != "torchao" or kind not in _INT4:
        told = json.dumps({"quant_method": str(method), "quant_type": str(kind)})
        raise UnsupportedError(
            f"quantization_config is {told}: supported for weights that are not quantized yet is torchao's "
            "int4_weight_only; or use llama_fast.Int4Config"
        )
    return TorchAoConfig(
        modules_to_not_convert=content.get("modules_to_not_convert"),
        include_input_output_embeddings=bool(content.get("include_input_output_embeddings")),
        group_size=options.get("group_size", 128),
    ).int4_config()

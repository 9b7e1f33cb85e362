"""config.json: read strictly, written as transformers v4 spells it, which v5 reads too."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_fast.config_checks import ACTIVATIONS, check_identity
from llama_fast.config_rope import longrope_attention_factor
from llama_fast.errors import CheckpointIOError, ConfigError, brief, shown
from llama_fast.files import read_json_object, written_whole

if TYPE_CHECKING:
    from llama_fast.config import LlamaConfig

logger = logging.getLogger(__name__)

# A file that lacks one of these means another model than LlamaConfig's defaults would make of it.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Fields that name code to run, or ask to run it.
CODE_FIELDS = ("auto_map", "custom_code", "custom_pipelines", "trust_remote_code")
# What every transformers configuration has, and what is left out of config.json when it has this value.
_COMMON_DEFAULTS: dict[str, Any] = {
    "architectures": None,
    "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "torch_dtype": None,
}


def read_config_file(path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the config.json `path`, a Llama's; `overrides` are fields that it may lack.

    Raises:
        ConfigError: it is not strict JSON, another model's, or lacks a field.
    """
    content = read_json_object(path, ConfigError)
    try:
        check_identity(content.get("model_type"), content.get("architectures"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if "max_position_embeddings" not in content and "max_sequence_length" in content:  # its name in March 2023
        content["max_position_embeddings"] = content["max_sequence_length"]
    missing = [name for name in REQUIRED if content.get(name) is None and overrides.get(name) is None]
    if missing:
        raise ConfigError(
            f"{path}: lacks {', '.join(missing)}; add it to the file, or pass it as a keyword argument: "
            f"LlamaConfig.from_pretrained(folder, {missing[0]}=...)"
        )
    if code := [name for name in CODE_FIELDS if content.get(name)]:
        logger.warning("%s: %s has no effect: no code of a checkpoint is ever run", path, ", ".join(code))
    return content


def write_config_file(config: LlamaConfig, folder: str | os.PathLike[str]) -> None:
    """Write `folder`/config.json, whole or not at all; makes the folder if need be.

    Raises:
        ConfigError: a field has no JSON form.
        CheckpointIOError: the file cannot be written.
    """
    path, text = Path(folder) / "config.json", config_text(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointIOError(f"{path}: cannot be written: {error.strerror or error}") from error


def config_content(config: LlamaConfig) -> dict[str, Any]:
    """All fields as they are written: v4 spelling, dtype as a string."""
    out = copy.deepcopy(config.plain_fields())
    out["model_type"] = config.model_type
    out["torch_dtype"] = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    out["output_attentions"] = config.output_attentions
    out["rope_theta"] = config.rope_theta
    out["rope_scaling"] = copy.deepcopy(config.rope_scaling)
    if "partial_rotary_factor" in config.rope_parameters:
        out["partial_rotary_factor"] = config.partial_rotary_factor
    if config.rope_parameters["rope_type"] == "longrope":
        out.update(_longrope_for_v4(config, out["rope_scaling"]))
    if hasattr(quantization := out.get("quantization_config"), "to_dict"):
        out["quantization_config"] = quantization.to_dict()  # type: ignore[union-attr]
    return out


def _longrope_for_v4(config: LlamaConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    """Fields that make transformers v4 rotate as v5 does with `scaling`, and that v5 reads the same.

    v4 reads the original length at the top level only, and then replaces an explicit factor by the ratio of the
    lengths; an explicit attention_factor is what both would use.
    """
    original = config.original_max_position_embeddings or config.max_position_embeddings
    if scaling.get("factor") not in (None, config.max_position_embeddings / original):
        scaling["attention_factor"] = longrope_attention_factor(scaling, config.max_position_embeddings)
    scaling["original_max_position_embeddings"] = original
    return {"original_max_position_embeddings": original, "rope_scaling": scaling}


def without_defaults(config: LlamaConfig) -> dict[str, Any]:
    """`config_content` without the fields that every transformers configuration has and that keep their default."""
    defaults = {**_COMMON_DEFAULTS, "_name_or_path": config._name_or_path}
    return {k: v for k, v in config_content(config).items() if k not in defaults or v != defaults[k]}


def config_text(config: LlamaConfig) -> str:
    """The text of config.json.

    Raises:
        ConfigError: a value has no JSON form (a function as hidden_act, NaN).
    """
    content = without_defaults(config)
    if callable(config.hidden_act):
        raise ConfigError(
            f"hidden_act={brief(config.hidden_act)} cannot be written; use one of {', '.join(ACTIVATIONS)}"
        )
    for name, value in content.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{shown(name)}={brief(value)} cannot be written as JSON: {error}") from error
    return json.dumps(content, indent=2, sort_keys=True) + "\n"

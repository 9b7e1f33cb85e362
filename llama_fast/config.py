"""LlamaConfig: what config.json says about a Llama model, read from transformers v4 and v5 files alike.

v4 files hold `rope_theta`, `rope_scaling` and `torch_dtype`, v5 files `rope_parameters` and `dtype`. Both are read, and
both can be asked for: `rope_parameters` is what is stored, `rope_theta` and `rope_scaling` are views of it. What is
written is v4's spelling, because transformers v5 reads it too while v4 does not read v5's.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from llama_fast.config_checks import (
    ACTIVATIONS,
    as_dtype,
    brief,
    check_bool,
    check_fields,
    check_identity,
    check_size,
)
from llama_fast.config_file import (
    config_content,
    config_text,
    read_config_file,
    without_defaults,
    write_config_file,
)
from llama_fast.config_rope import DEFAULT_ROPE_THETA, RopeViews, as_rope_dict, check_rope, merge_rope, warn_rope
from llama_fast.errors import ConfigError, shown
from llama_fast.hub import find_folder

__all__ = ["ACTIVATIONS", "LlamaConfig"]

logger = logging.getLogger(__name__)

_PRIVATE = ("_attn_implementation", "_dtype", "_output_attentions", "_rope_parameters")


class LlamaConfig(RopeViews):
    """Configuration of a Llama model: the fields, defaults and argument order of the transformers page.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the shape.
        num_key_value_heads: None for num_attention_heads (MHA); 1 is MQA, a divisor is GQA.
        hidden_act: one of `ACTIVATIONS`, or an elementwise function of a tensor.
        max_position_embeddings: trained context length. `forward` takes longer input; rope types may depend on it.
        initializer_range: standard deviation of random weights.
        rms_norm_eps: in (0, 0.01].
        use_cache: default of `forward`.
        pad_token_id, bos_token_id: an id below vocab_size, or None; a pad_token_id of -1, in old files, is None too.
        eos_token_id: an id, a list of ids, or None. Those of generation_config.json count before these three.
        pretraining_tp: accepted, no effect (as in transformers 4.56, where the documentation says otherwise).
        tie_word_embeddings: the LM head is the embedding.
        rope_theta, rope_scaling: RoPE base and scaling dict; see `llama_fast.model.rope`.
        attention_bias: bias on q, k, v and o. mlp_bias: bias on gate, up and down.
        attention_dropout: for training.
        head_dim: None for hidden_size // num_attention_heads; any even number is allowed.
        **kwargs: v5's `rope_parameters` and `dtype` (or `torch_dtype`), `partial_rotary_factor`,
            `original_max_position_embeddings`, the fields all transformers configurations have (`architectures`,
            `num_labels`, `id2label`, `problem_type`, `return_dict`, ...), and anything else: kept as an attribute
            and written back, unless it asks for arithmetic that a Llama does not have (`sliding_window`, ...).

    Raises:
        ConfigError: a field has a wrong value, two fields contradict each other, or `model_type` or `architectures` is
            given and not a Llama's.
    """

    model_type: ClassVar[str] = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        /,  # a file may have a key of that name
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str | Callable[[torch.Tensor], torch.Tensor] = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pretraining_tp: int | None = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float = DEFAULT_ROPE_THETA,
        rope_scaling: Mapping[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float | None = 0.0,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_identity(kwargs.pop("model_type", None), kwargs.get("architectures"))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads: int = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        if pad_token_id == -1:
            logger.warning("pad_token_id=-1, which old files write for none, is read as null")
        self.pad_token_id = None if pad_token_id == -1 else pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        if head_dim is None:
            check_size("hidden_size", hidden_size)
            check_size("num_attention_heads", num_attention_heads)
            if hidden_size % num_attention_heads:
                raise ConfigError(
                    f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}; "
                    "change one of them or give head_dim"
                )
            head_dim = hidden_size // num_attention_heads
        self.head_dim: int = head_dim

        self._dtype = as_dtype("torch_dtype", kwargs.pop("torch_dtype", None))
        if (dtype := kwargs.pop("dtype", None)) is not None:  # where a file has both, transformers takes `dtype`
            self._dtype = as_dtype("dtype", dtype)
        attn_implementation = kwargs.pop("_attn_implementation", None)
        self._attn_implementation: str | None = kwargs.pop("attn_implementation", attn_implementation)
        if not isinstance(self._attn_implementation, str | None):
            raise ConfigError(f"attn_implementation={brief(self._attn_implementation)}; use a name or null")
        self._output_attentions = False
        self.output_attentions = kwargs.pop("output_attentions", False)
        self.output_hidden_states: bool = kwargs.pop("output_hidden_states", False)
        self.return_dict: bool = kwargs.pop("return_dict", True)
        self.architectures: list[str] | None = kwargs.pop("architectures", None)
        self._name_or_path: str = str(kwargs.pop("_name_or_path", kwargs.pop("name_or_path", "")))
        self.problem_type: str | None = kwargs.pop("problem_type", None)
        self._set_labels(kwargs.pop("num_labels", None), kwargs.pop("id2label", None), kwargs.pop("label2id", None))
        self._rope_parameters = merge_rope(
            rope_theta,
            as_rope_dict("rope_scaling", rope_scaling),
            as_rope_dict("rope_parameters", kwargs.pop("rope_parameters", None)),
            kwargs.pop("partial_rotary_factor", None),
            original := kwargs.pop("original_max_position_embeddings", None),
        )
        for name, value in kwargs.items():
            if hasattr(type(self), name) or name in _PRIVATE:
                raise ConfigError(
                    f"{shown(name)}={brief(value)}: this name is taken by LlamaConfig itself; remove or rename the key"
                )
            setattr(self, name, value)
        self.validate()
        warn_rope(
            self,
            original_in_scaling_only=original is None and "original_max_position_embeddings" in (rope_scaling or {}),
        )
        if pretraining_tp is not None and pretraining_tp > 1:
            logger.warning("pretraining_tp=%d has no effect, as in transformers 4.56", pretraining_tp)

    def _set_labels(self, num_labels: int | None, id2label: Mapping[Any, str] | None, label2id: Any) -> None:
        self.id2label: dict[int, str] = {}
        self.label2id: dict[str, int] = {}
        if id2label is None or id2label == {}:
            self.num_labels = 2 if num_labels is None else num_labels
            return
        if not isinstance(id2label, Mapping) or not all(
            re.fullmatch(r"\d{1,9}", str(key)) and isinstance(label, str)  # JSON keys are strings
            for key, label in id2label.items()
        ):
            raise ConfigError(f"id2label={brief(id2label)}; use an object from label number to label name")
        if not isinstance(label2id, Mapping | None):
            raise ConfigError(f"label2id={brief(label2id)}; use an object from label name to label number, or null")
        if num_labels is not None and num_labels != len(id2label):
            logger.warning("num_labels=%s disagrees with id2label, which has %d", brief(num_labels), len(id2label))
        self.id2label = {int(key): label for key, label in id2label.items()}
        self.label2id = dict(label2id) if label2id else {label: key for key, label in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        """Number of labels; setting another number renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        check_size("num_labels", num_labels)
        if num_labels != len(self.id2label):
            self.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
            self.label2id = {label: i for i, label in self.id2label.items()}

    @property
    def use_return_dict(self) -> bool:
        """`return_dict` under its other name."""
        return self.return_dict

    @property
    def output_attentions(self) -> bool:
        """Whether `forward` returns attention weights; only the "eager" implementation has them."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        check_bool("output_attentions", value)
        if value and self._attn_implementation not in (None, "eager"):
            raise ConfigError(
                f"output_attentions=True needs attn_implementation='eager', not {brief(self._attn_implementation)}"
            )
        if value:
            self._attn_implementation = "eager"
        self._output_attentions = value

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the checkpoint's weights, if the file says."""
        return self._dtype

    @dtype.setter
    def dtype(self, value: str | torch.dtype | None) -> None:
        self._dtype = as_dtype("dtype", value)

    torch_dtype = dtype

    def validate(self) -> None:
        """Check every field that the model reads; the model does it again, since fields can be changed.

        Raises:
            ConfigError: naming the first field that is wrong, its value and what is accepted.
        """
        check_fields(self)
        check_rope(self._rope_parameters, self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Read the config.json of a folder or hub id.

        Args:
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.
            **kwargs: replace the file's fields, or stand in for those it lacks.

        Raises:
            CheckpointPathError: there is no such folder and no such hub repository.
            ConfigError: no readable config.json there, it is no Llama's, lacks a field or its content is wrong.
        """
        folder = find_folder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            weights=False,
        )
        config = cls.from_json_file(folder / "config.json", **kwargs)
        config._name_or_path = str(pretrained_model_name_or_path)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read a configuration from a JSON file, as `from_pretrained` does.

        Raises:
            ConfigError: naming the file and what is wrong in it.
        """
        content = read_config_file(json_file, kwargs)
        try:
            return cls.from_dict(content, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{json_file}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a configuration from the content of a config.json; keyword arguments replace its fields.

        Fields that neither has keep the constructor's defaults.

        Raises:
            ConfigError: not a mapping, or a value is wrong.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"a configuration is a JSON object, not {type(config_dict).__name__}")
        # Views of a value that the file may spell in several ways are assigned, which replaces all of them; whole
        # RoPE settings come before their parts.
        views = [name for name in kwargs if getattr(getattr(cls, name, None), "fset", None)]
        fields = {name: value for name, value in kwargs.items() if name not in views}
        config = cls(**{**copy.deepcopy(dict(config_dict)), **fields})
        for name in sorted(views, key=lambda name: name not in ("rope_parameters", "rope_scaling")):
            setattr(config, name, kwargs[name])
        config.validate()
        return config

    def plain_fields(self) -> dict[str, Any]:
        """The fields that are stored under the name of their key in config.json: all but RoPE's, dtype and flags."""
        return {name: value for name, value in vars(self).items() if name not in _PRIVATE}

    def to_dict(self) -> dict[str, Any]:
        """All fields as they are written to config.json: v4 spelling, dtype as a string."""
        return config_content(self)

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the fields that every transformers configuration has and that keep their default here."""
        return without_defaults(self)

    def to_json_string(self) -> str:
        """The text of config.json.

        Raises:
            ConfigError: a value has no JSON form (a function as hidden_act, NaN).
        """
        return config_text(self)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/config.json, which transformers v4 and v5 read alike; makes the folder if need be.

        Raises:
            ConfigError: a field is wrong or has no JSON form.
            CheckpointIOError: the file cannot be written.
        """
        self.validate()
        write_config_file(self, folder)

    def __eq__(self, other: object) -> bool:
        """Equal fields; where a configuration was read from does not count."""
        if not isinstance(other, LlamaConfig):
            return NotImplemented
        return {**vars(self), "_name_or_path": None} == {**vars(other), "_name_or_path": None}

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_diff_dict(), indent=2, sort_keys=True, default=repr)}"

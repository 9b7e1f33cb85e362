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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch

from llama_fast.config_checks import (
    ACTIVATIONS,
    DEFAULT_ROPE_THETA,
    as_dtype,
    as_rope_dict,
    check_number,
    check_positive_int,
    check_rope,
    check_token_id,
    longrope_attention_factor,
    merge_rope,
    warn_rope,
)
from llama_fast.errors import CheckpointIOError, ConfigError

__all__ = ["ACTIVATIONS", "LlamaConfig"]

logger = logging.getLogger(__name__)

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_PRIVATE = ("_attn_implementation", "_dtype", "_output_attentions", "_rope_parameters")
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


class _ReadOnlyDict(dict[str, Any]):
    """A dict for reading: a write would be lost, so it raises instead."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise ConfigError(
            "config.rope_scaling is a view and cannot be changed in place; assign a whole dict to it, "
            "or change config.rope_parameters"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)  # copies and pickles are plain dicts


class LlamaConfig:
    """Configuration of a Llama model: the fields, defaults and argument order of the transformers page.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the shape.
        num_key_value_heads: None for num_attention_heads (MHA); 1 is MQA, a divisor is GQA.
        hidden_act: one of `ACTIVATIONS`, or an elementwise function of a tensor.
        max_position_embeddings: trained context length. `forward` takes longer input; rope types may depend on it.
        initializer_range: standard deviation of random weights.
        rms_norm_eps: in (0, 0.01].
        use_cache: default of `forward`.
        pad_token_id, bos_token_id: an id or None.
        eos_token_id: an id, a list of ids, or None.
        pretraining_tp: accepted, no effect (as in transformers 4.56, where the documentation says otherwise).
        tie_word_embeddings: the LM head is the embedding.
        rope_theta, rope_scaling: RoPE base and scaling dict; see `llama_fast.model.rope`.
        attention_bias: bias on q, k, v and o. mlp_bias: bias on gate, up and down.
        attention_dropout: for training.
        head_dim: None for hidden_size // num_attention_heads; any other value is allowed.
        **kwargs: v5's `rope_parameters` and `dtype` (or `torch_dtype`), `partial_rotary_factor`,
            `original_max_position_embeddings`, the fields all transformers configurations have (`architectures`,
            `num_labels`, `id2label`, `problem_type`, `return_dict`, ...), and anything else: kept as an attribute
            and written back.

    Raises:
        ConfigError: a field has a wrong value, two fields contradict each other, or `model_type` is not llama.
    """

    model_type: ClassVar[str] = "llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
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
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pretraining_tp = pretraining_tp
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        if head_dim is None:
            check_positive_int("hidden_size", hidden_size)
            check_positive_int("num_attention_heads", num_attention_heads)
            if hidden_size % num_attention_heads:
                raise ConfigError(
                    f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}; "
                    "change one of them or give head_dim"
                )
            head_dim = hidden_size // num_attention_heads
        self.head_dim: int = head_dim

        if (model_type := kwargs.pop("model_type", "llama")) != "llama":
            raise ConfigError(f"model_type={model_type!r} is not supported; llama_fast runs model_type 'llama'")
        self._dtype = as_dtype(kwargs.pop("torch_dtype", None))
        if (dtype := kwargs.pop("dtype", None)) is not None:  # where a file has both, transformers takes `dtype`
            self._dtype = as_dtype(dtype)
        attn_implementation = kwargs.pop("_attn_implementation", None)
        self._attn_implementation: str | None = kwargs.pop("attn_implementation", attn_implementation)
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
                    f"{name}={value!r}: this name is taken by LlamaConfig itself; remove or rename the key"
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
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
            return
        if not isinstance(id2label, Mapping) or not all(str(key).isdecimal() for key in id2label):
            raise ConfigError(f"id2label={id2label!r}; use an object from label number to label name")
        if num_labels is not None and num_labels != len(id2label):
            logger.warning("num_labels=%r disagrees with id2label, which has %d labels", num_labels, len(id2label))
        self.id2label = {int(key): label for key, label in id2label.items()}  # JSON keys are strings
        self.label2id = label2id or {label: key for key, label in self.id2label.items()}

    @property
    def num_labels(self) -> int:
        """Number of labels; setting another number renames them LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        check_positive_int("num_labels", num_labels)
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
        if value and self._attn_implementation not in (None, "eager"):
            raise ConfigError(
                f"output_attentions=True needs attn_implementation='eager', not {self._attn_implementation!r}"
            )
        if value:
            self._attn_implementation = "eager"
        self._output_attentions = bool(value)

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the checkpoint's weights, if the file says."""
        return self._dtype

    @dtype.setter
    def dtype(self, value: str | torch.dtype | None) -> None:
        self._dtype = as_dtype(value)

    torch_dtype = dtype

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """v5's view, and what is stored: `rope_theta`, `rope_type` and the type's keys. Changes in place count."""
        return self._rope_parameters

    @rope_parameters.setter
    def rope_parameters(self, value: Mapping[str, Any] | None) -> None:
        new = {"rope_type": "default", "rope_theta": self.rope_theta, **as_rope_dict("rope_parameters", value)}
        check_rope(new, self)
        self._rope_parameters = new

    @property
    def rope_theta(self) -> float:
        """RoPE base."""
        return self._rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self._rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """v4's view: `rope_parameters` without `rope_theta` and `partial_rotary_factor`; None for plain RoPE."""
        scaling = {k: v for k, v in self._rope_parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        return None if scaling == {"rope_type": "default"} else _ReadOnlyDict(scaling)

    @rope_scaling.setter
    def rope_scaling(self, value: Mapping[str, Any] | None) -> None:
        kept = {k: v for k, v in self._rope_parameters.items() if k in ("rope_theta", "partial_rotary_factor")}
        self.rope_parameters = {**kept, **as_rope_dict("rope_scaling", value)}

    @property
    def partial_rotary_factor(self) -> float:
        """Share of head_dim that is rotated."""
        return self._rope_parameters.get("partial_rotary_factor", 1.0)

    @partial_rotary_factor.setter
    def partial_rotary_factor(self, value: float) -> None:
        self.rope_parameters = {**self._rope_parameters, "partial_rotary_factor": value}

    @property
    def original_max_position_embeddings(self) -> int | None:
        """Context length before RoPE was scaled, if the file says; wherever in the file it stood."""
        return self._rope_parameters.get("original_max_position_embeddings")

    @original_max_position_embeddings.setter
    def original_max_position_embeddings(self, value: int | None) -> None:
        self.rope_parameters = {**self._rope_parameters, "original_max_position_embeddings": value}

    def validate(self) -> None:
        """Check every field that the model reads; the model does it again, since fields can be changed.

        Raises:
            ConfigError: naming the first field that is wrong, its value and what is accepted.
        """
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            check_positive_int(name, getattr(self, name))
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            check_positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if not (callable(self.hidden_act) or self.hidden_act in ACTIVATIONS):
            raise ConfigError(f"hidden_act={self.hidden_act!r}; use a function or one of {', '.join(ACTIVATIONS)}")
        if self.pretraining_tp is not None:
            check_positive_int("pretraining_tp", self.pretraining_tp)
        check_number("rms_norm_eps", self.rms_norm_eps, "above 0 and at most 0.01", lambda x: 0 < x <= 0.01)
        check_number("initializer_range", self.initializer_range, "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.attention_dropout is not None:
            check_number("attention_dropout", self.attention_dropout, "in [0, 1]", lambda x: 0 <= x <= 1)
        for name in ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r}; use true or false")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            check_token_id(name, getattr(self, name), lists=name == "eos_token_id")
        if self.problem_type not in (None, *_PROBLEM_TYPES):
            raise ConfigError(f"problem_type={self.problem_type!r}; use one of {', '.join(_PROBLEM_TYPES)}")
        check_rope(self._rope_parameters, self)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read `folder`/config.json; keyword arguments are set on the result.

        Raises:
            ConfigError: no readable config.json there, or its content is wrong.
        """
        config = cls.from_json_file(Path(folder) / "config.json", **kwargs)
        config._name_or_path = str(folder)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Read a configuration from a JSON file; keyword arguments are set on the result.

        Raises:
            ConfigError: naming the file and what is wrong in it.
        """
        try:
            content = json.loads(Path(json_file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{json_file}: cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{json_file}: is not JSON in UTF-8: {error}") from error
        try:
            return cls.from_dict(content, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{json_file}: {error}") from error

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make a configuration from the content of a config.json; keyword arguments are set on the result.

        Raises:
            ConfigError: not a mapping, or a value is wrong.
        """
        if not isinstance(config_dict, Mapping):
            raise ConfigError(f"a configuration is a JSON object, not {type(config_dict).__name__}")
        config = cls(**copy.deepcopy(dict(config_dict)))
        for name, value in kwargs.items():
            setattr(config, name, value)
        config.validate()
        return config

    def to_dict(self) -> dict[str, Any]:
        """All fields as they are written to config.json: v4 spelling, dtype as a string."""
        out = copy.deepcopy({name: value for name, value in vars(self).items() if name not in _PRIVATE})
        out["model_type"] = self.model_type
        out["torch_dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        out["output_attentions"] = self.output_attentions
        out["rope_theta"] = self.rope_theta
        out["rope_scaling"] = copy.deepcopy(self.rope_scaling)
        if "partial_rotary_factor" in self._rope_parameters:
            out["partial_rotary_factor"] = self.partial_rotary_factor
        if self._rope_parameters["rope_type"] == "longrope":
            out.update(self._longrope_for_v4(out["rope_scaling"]))
        if hasattr(quantization := out.get("quantization_config"), "to_dict"):
            out["quantization_config"] = quantization.to_dict()  # type: ignore[union-attr]
        return out

    def _longrope_for_v4(self, scaling: dict[str, Any]) -> dict[str, Any]:
        """Fields that make transformers v4 rotate as v5 does with `scaling`, and that v5 reads the same.

        v4 reads the original length at the top level only, and then replaces an explicit factor by the ratio of the
        lengths; an explicit attention_factor is what both would use.
        """
        original = self.original_max_position_embeddings or self.max_position_embeddings
        if scaling.get("factor") not in (None, self.max_position_embeddings / original):
            scaling["attention_factor"] = longrope_attention_factor(scaling, self.max_position_embeddings)
        scaling["original_max_position_embeddings"] = original
        return {"original_max_position_embeddings": original, "rope_scaling": scaling}

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without the fields that every transformers configuration has and that keep their default here."""
        defaults = {**_COMMON_DEFAULTS, "_name_or_path": self._name_or_path}
        return {k: v for k, v in self.to_dict().items() if k not in defaults or v != defaults[k]}

    def to_json_string(self) -> str:
        """The text of config.json.

        Raises:
            ConfigError: a value has no JSON form (a function as hidden_act, NaN).
        """
        content = self.to_diff_dict()
        if callable(self.hidden_act):
            raise ConfigError(f"hidden_act={self.hidden_act!r} cannot be written; use one of {', '.join(ACTIVATIONS)}")
        for name, value in content.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{name}={value!r} cannot be written as JSON: {error}") from error
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/config.json, which transformers v4 and v5 read alike; makes the folder if need be.

        Raises:
            ConfigError: a field is wrong or has no JSON form.
            CheckpointIOError: the file cannot be written.
        """
        self.validate()
        text = self.to_json_string()
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointIOError(f"{folder}/config.json: cannot be written: {error.strerror or error}") from error

    def __eq__(self, other: object) -> bool:
        """Equal fields; where a configuration was read from does not count."""
        if not isinstance(other, LlamaConfig):
            return NotImplemented
        return {**vars(self), "_name_or_path": None} == {**vars(other), "_name_or_path": None}

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_diff_dict(), indent=2, sort_keys=True, default=repr)}"

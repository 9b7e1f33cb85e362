"""What the fields of a LlamaConfig may hold; RoPE's have a module of their own, config_rope.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llama_fast.errors import ConfigError, brief

if TYPE_CHECKING:
    from llama_fast.config import LlamaConfig

# Names that hidden_act may have; the functions are llama_fast.ops.activations.ACTIVATIONS.
ACTIVATIONS = (
    *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "laplace", "leaky_relu", "linear", "mish", "quick_gelu"),
    *("relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh"),
)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
_HEADS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
# All have the same decoder under another head; the last is how the first conversions spelt it.
ARCHITECTURES = ("LlamaModel", *(f"LlamaFor{head}" for head in _HEADS), "LLaMAForCausalLM")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Far above any model (405B: 126 layers of 16384), low enough that sizes multiplied stay below 2**63 bytes and that the
# layers or label names of a hostile file are made in a second.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "num_labels": 2**16,
}
_BOOLS = ("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "return_dict", "output_hidden_states")


def check_size(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a positive integer that a size of this name may have."""
    largest = _LARGEST.get(name, 2**31 - 1)
    if not (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest):
        raise ConfigError(f"{name}={brief(value)}; use an integer from 1 to {largest}")


def check_number(name: str, value: object, accepted: str, test: Callable[[float], bool]) -> None:
    """Raise ConfigError unless `value` is a finite number that passes `test`, which `accepted` says in words."""
    # Not math.isfinite, which raises on integers that no float can hold.
    if not (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf and test(value)):
        raise ConfigError(f"{name}={brief(value)}; use a number {accepted}")


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={brief(value)}; use true or false")


_MAX_TOKEN_IDS = 1024  # as for a request


def check_token_ids(name: str, value: object, vocab_size: int, *, lists: bool) -> None:
    """Raise ConfigError unless `value` is None, an id in [0, vocab_size), or with `lists` a list of such ids."""
    ids = value if lists and isinstance(value, list | tuple) else [] if value is None else [value]
    accepted = f"a token id{', a list of them' if lists else ''} or null"
    if len(ids) > _MAX_TOKEN_IDS:
        raise ConfigError(f"{name} has {len(ids):,} ids; use at most {_MAX_TOKEN_IDS:,}")
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ConfigError(f"{name}={brief(value)}; use {accepted}")
        if not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"{name}={brief(value)} is outside the vocabulary: vocab_size={vocab_size}; use {accepted}, ids from 0 "
                f"to {vocab_size - 1}"
            )


def check_identity(model_type: object, architectures: object) -> None:
    """Raise ConfigError unless a configuration that says this of itself is a Llama's.

    As in transformers' LlamaConfig, one that says nothing is taken for it.
    """
    if model_type not in (None, "llama"):
        raise ConfigError(f"model_type={brief(model_type)} is not supported; llama_fast runs model_type 'llama'")
    if architectures is None:
        return
    if not isinstance(architectures, list | tuple) or not all(isinstance(name, str) for name in architectures):
        raise ConfigError(f"architectures={brief(architectures)}; use a list of class names or null")
    # Some versions of transformers wrote the name of the wrapper that FSDP puts round a model.
    if architectures and not {name.removeprefix("FSDP") for name in architectures} & set(ARCHITECTURES):
        raise ConfigError(
            f"architectures={brief(architectures)} is not supported; llama_fast runs {', '.join(ARCHITECTURES)}"
        )


def as_dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    """The torch.dtype that `value`, of the field `name`, says.

    Raises:
        ConfigError: not one of `DTYPES`.
    """
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if value is not None and dtype not in DTYPES.values():
        raise ConfigError(f"{name}={brief(value)} is not supported; use one of {', '.join(DTYPES)}")
    return dtype


def check_fields(config: LlamaConfig) -> None:
    """Raise ConfigError unless all fields but those of RoPE hold what the model can run."""
    for name in (*_LARGEST, "max_position_embeddings"):
        check_size(name, getattr(config, name))
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads={config.num_key_value_heads} does not divide "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if not (callable(config.hidden_act) or config.hidden_act in ACTIVATIONS):
        raise ConfigError(f"hidden_act={brief(config.hidden_act)}; use a function or one of {', '.join(ACTIVATIONS)}")
    if config.pretraining_tp is not None:
        check_size("pretraining_tp", config.pretraining_tp)
    check_number("rms_norm_eps", config.rms_norm_eps, "above 0 and at most 0.01", lambda x: 0 < x <= 0.01)
    check_number("initializer_range", config.initializer_range, "in [0, 1]", lambda x: 0 <= x <= 1)
    if config.attention_dropout is not None:
        check_number("attention_dropout", config.attention_dropout, "in [0, 1]", lambda x: 0 <= x <= 1)
    for name in _BOOLS:
        check_bool(name, getattr(config, name))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        check_token_ids(name, getattr(config, name), config.vocab_size, lists=name == "eos_token_id")
    if config.problem_type not in (None, *_PROBLEM_TYPES):
        raise ConfigError(f"problem_type={brief(config.problem_type)}; use one of {', '.join(_PROBLEM_TYPES)}")
    _check_maths(config)


def _check_maths(config: LlamaConfig) -> None:
    """Raise ConfigError if a field that is no Llama's asks for other arithmetic than a Llama's.

    Such fields are legal with a value that leaves a Llama as it is. Their names and meaning are those of the models in
    transformers that are a Llama with one thing changed (Mistral, Granite, Cohere, Gemma, SmolLM3, Llama 4, OLMo, ...).
    """
    neutral: dict[str, tuple[Any, ...]] = {
        "alibi": (False,),
        "attention_chunk_size": (),
        "attention_multiplier": (config.head_dim**-0.5,),
        "attn_logit_softcapping": (),
        "attn_temperature_tuning": (False,),
        "clip_qkv": (),
        "embedding_multiplier": (1,),
        "final_logit_softcapping": (),
        "is_causal": (True,),
        "is_encoder_decoder": (False,),
        "is_moe": (False,),
        "logit_scale": (1,),
        "logits_scaling": (1,),
        "n_routed_experts": (0, 1),
        "no_rope_layer_interval": (0,),
        "num_experts": (0, 1),
        "num_local_experts": (0, 1),
        "parallel_attn": (False,),
        "prefix_lm": (False,),
        "qk_layernorm": (False,),
        "qk_norm": (False,),
        "query_pre_attn_scalar": (config.head_dim,),
        "residual_multiplier": (1,),
        "rope_interleave": (False,),
        "rope_interleaved": (False,),
        "rotary_pct": (1,),
        "scale_depth": (config.num_hidden_layers**0.5,),
        "scale_emb": (1,),
        "softmax_scale": (config.head_dim**-0.5,),
        "use_bidirectional_attention": (False,),
        "use_parallel_residual": (False,),
        "use_qk_norm": (False,),
    }
    active = [name for name, values in neutral.items() if getattr(config, name, None) not in (None, *values)]
    every_layer = {"layer_types": "full_attention", "mlp_layer_types": "dense", "no_rope_layers": 1}
    for name, value in every_layer.items():  # one value a layer, 1 for RoPE
        values = getattr(config, name, None)
        if values is not None and not (isinstance(values, list | tuple) and all(one == value for one in values)):
            active.append(name)
    # A window that no sequence fills, or that another field switches off (Qwen's), is none.
    window = getattr(config, "sliding_window", None)
    used = window is not None and getattr(config, "use_sliding_window", True) is not False
    if used and not (isinstance(window, int) and window >= config.max_position_embeddings):
        active.append("sliding_window")
    if active:
        name = active[0]
        raise ConfigError(
            f"{name}={brief(getattr(config, name))} asks for arithmetic that a Llama does not have and that is not "
            "supported; use the model's own architecture, or remove the field if the weights were made without it"
        )

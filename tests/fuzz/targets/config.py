"""config.json. Where it is accepted, every field is what plain json.loads gives, and RoPE's tables are finite."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import ConfigError, UnsupportedError
from llama_fast.model.rope import RotaryEmbedding
from tests.bad_inputs.harness import check
from tests.fuzz.mutate import mutate_document, to_json
from tests.fuzz.target import Files, FileTarget, short

_LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 320,
}
_LLAMA_3 = {
    **_LLAMA_2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": [128, 200],
    "head_dim": 16,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 2048,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_VERSION_5 = {name: value for name, value in _LLAMA_3.items() if name not in ("rope_scaling", "rope_theta")} | {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": 32, "beta_slow": 1},
}
ROPES = (
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3] * 4, "attention_factor": 1e300},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
)
_BASES = (_LLAMA_2, _LLAMA_3, _VERSION_5, *({**_LLAMA_3, "rope_scaling": rope} for rope in ROPES))
KEYS = {
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ROPES),
    "rope_type": ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su"),
    "factor": (1e-300, 0.5, 1e300),
    "attention_factor": (-1, 0.5, 1e39),
    "partial_rotary_factor": (0.5, 0.125, 0.1),
    "beta_fast": (1e308, 1, 0),
    "low_freq_factor": (4.0, 5, 1e-300),
    "mscale": (0, 1e308),
    "original_max_position_embeddings": (1, 2, 4096, 2**31 - 1),
    "rope_theta": (1, 1 + 1e-9, 1e29, 1e-30),
    "max_position_embeddings": (1, 2**31 - 1),
    "head_dim": (2, 7, 8, 80, 96, 512, 2**31 - 2),
    "hidden_act": ("gelu", "relu", "swish", "silu ", "exec"),
    **dict.fromkeys(("torch_dtype", "dtype"), ("float32", "float8_e4m3fn", "torch.bfloat16", "int8", None)),
    "model_type": ("mistral", "Llama"),
    "architectures": (["MistralForCausalLM"], ["LlamaModel"], "LlamaForCausalLM"),
    "auto_map": ({"AutoConfig": "evil.Config"},),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {}, "gptq"),
    "id2label": ({"0": "a", "1": "b"}, {}, {"-1": "a"}, {"9" * 400: "a"}, {"²": "a"}),
    "label2id": ({"a": 0}, {"a": "b"}, 5),
    "num_labels": (1, 2, 10**9),
    "problem_type": ("regression", "wat"),
    "pad_token_id": (-1, 319, 320),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict", "custom_code"), (True, False)),
    "attn_implementation": ("flash", "eager"),
    **dict.fromkeys(("validate", "to_dict", "__class__", "_rope_parameters", "_dtype", "num_layers"), (1, {})),
    "layer_types": (["full_attention"] * 2,),
}
# Read under another name, changed by rule, or merged from several places.
_NOT_AS_WRITTEN = {
    "_name_or_path",
    "dtype",
    "head_dim",
    "model_type",
    "num_key_value_heads",
    "pad_token_id",
    "torch_dtype",
}


class Target(FileTarget):
    refusals = (ConfigError, UnsupportedError)

    def make(self, rng: random.Random) -> Files:
        document = json.loads(json.dumps(rng.choice(_BASES)))
        return {"config.json": to_json(rng, mutate_document(rng, document, also=ROPES, keys=KEYS))}

    def load(self, folder: Path, files: Files) -> None:
        config = LlamaConfig.from_pretrained(folder)
        written = json.loads(files["config.json"] or b"")
        for name in LlamaConfig.__init__.__annotations__.keys() - {"kwargs", "return", *_NOT_AS_WRITTEN}:
            if name in written and not name.startswith("rope_"):
                ours, theirs = getattr(config, name), written[name]
                check(_same(ours, theirs), f"{name}: {short(theirs)} became {short(ours)}")
        for name, value in vars(config).items():
            check(_finite(value), f"{name} holds NaN or infinity")
        again = LlamaConfig.from_dict(json.loads(config.to_json_string()))
        again._attn_implementation = config._attn_implementation  # not written, as in transformers
        if config.rope_parameters["rope_type"] != "longrope":  # which is completed, for transformers v4
            check(again == config, "what is written is read as another configuration")
        if config.head_dim < 4096:
            rope = RotaryEmbedding(config)
            lengths = torch.tensor([1, min(config.max_position_embeddings, 2**31) + 1])
            check(math.isfinite(rope.attention_scaling), f"attention_scaling is {rope.attention_scaling}")
            check(rope.inv_freq(lengths).isfinite().all(), "inv_freq holds NaN or infinity")


def _same(ours: Any, written: Any) -> bool:
    """Equal, and no bool for a number."""
    return ours == written and isinstance(ours, bool) == isinstance(written, bool)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)

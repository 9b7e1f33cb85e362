"""Checkpoints of 4-bit integers in the formats of other tools, made from what those formats are, not by the loader.

A packer (`gptq`, `awq`, `compressed_tensors`, `torchao`) takes a folder of a dense model and returns a `Checkpoint`,
which a test may damage before it is written. Weights are rounded to nearest: what the bits mean is all that matters.

Sources: AutoGPTQ's qlinear_cuda.py and config.py, GPTQModel's config.py, AutoAWQ's gemm.py and _config.py,
compressed-tensors 0.9 and 0.20 (pack_quantized), torchao 0.18 (int4_tensor.py, safetensors_support.py).
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj")
# Nibble i of a word of AutoAWQ's "gemm" is output 8 * c + AWQ_ORDER[i].
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Checkpoint:
    """A quantized checkpoint in memory.

    Attributes:
        tensors: what model.safetensors will hold.
        config: what config.json will hold.
        weights: the fp64 weight [out_features, in_features] of every quantized module, by module name.
        kept: the tensors that were not quantized, as stored.
        biases: the stored biases of quantized modules, by module name.
        source: the folder of the dense model, whose other files are copied.
        others: further JSON files, by name.
        metadata: model.safetensors' own.
    """

    tensors: dict[str, Tensor]
    config: dict
    weights: dict[str, Tensor]
    kept: dict[str, Tensor]
    biases: dict[str, Tensor]
    source: Path
    others: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def quantization(self) -> dict:
        """The object that describes the format, wherever it is stored."""
        return self.config.get("quantization_config") or next(iter(self.others.values()))  # type: ignore[return-value]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.source.glob("*.json"):
            if path.name != "config.json":
                shutil.copy(path, folder)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))
        for name, content in self.others.items():
            (folder / name).write_text(json.dumps(content, indent=2))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata=self.metadata)
        return folder

    def write_dense(self, folder: Path) -> Path:
        """The same model with its weights dequantized to fp32, which holds them exactly."""
        tensors = {name: tensor.float() for name, tensor in self.kept.items()}
        tensors |= {f"{name}.weight": weight.float() for name, weight in self.weights.items()}
        tensors |= {f"{name}.bias": bias.float() for name, bias in self.biases.items()}
        config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        config |= {"torch_dtype": "float32"}
        return Checkpoint(tensors, config, {}, self.kept, {}, self.source).write(folder)


@dataclass(frozen=True)
class Options:
    """What all packers take.

    Attributes:
        group_size: consecutive input features that share a scale; -1 is all of them.
        symmetric: zeros are 8 throughout.
        dtype: of the model, its scales and its other tensors.
        scale_dtype: of the scales alone, where they differ.
        dense: regular expressions of full module names that are not quantized.
        head: quantize the head too, which unties it.
        config: fields of the quantization config to set.
    """

    group_size: int = 128
    symmetric: bool = True
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype | None = None
    dense: tuple[str, ...] = ()
    head: bool = False
    config: dict = field(default_factory=dict)

    def __str__(self) -> str:
        """What differs from the defaults, for names of tests."""
        defaults = type(self)()
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        text = ",".join(f"{name}={v}" for name, v in changed.items() if v != getattr(defaults, name))
        return f"{type(self).__name__}({text})"


@dataclass(frozen=True)
class Gptq(Options):
    """GPTQ as AutoGPTQ and GPTQModel write it.

    Attributes:
        checkpoint_format: "gptq" stores zeros minus 1, "gptq_v2" as they are; None leaves the field out, which means
            "gptq".
        desc_act: groups are made of columns in another order than their own.
        g_idx: store it; where it says only what its absence says, some tools leave it out.
        zero_biases: store a bias of zeros for every projection, as old AutoGPTQ did.
        wide_zeros: one zero of 16 a projection, which the first format stores as 15.
        tool: whose config is written: "autogptq", "gptqmodel" or "optimum".
        side_file: the config stands in quantize_config.json alone.
    """

    checkpoint_format: str | None = "gptq"
    desc_act: bool = False
    g_idx: bool = True
    zero_biases: bool = False
    wide_zeros: bool = False
    tool: str = "autogptq"
    side_file: bool = False


@dataclass(frozen=True)
class Awq(Options):
    """AWQ as AutoAWQ's "gemm" writes it, which is never symmetric.

    Attributes:
        side_file: the config stands in quant_config.json alone, in that file's own names.
    """

    symmetric: bool = False
    side_file: bool = False


@dataclass(frozen=True)
class CompressedTensors(Options):
    """compressed-tensors' "pack-quantized" as llm-compressor writes it.

    Attributes:
        packed_zeros: zeros are packed along the outputs (0.9.4 and later), else int8 (before).
        actorder: "group" permutes the columns and stores weight_g_idx; "weight" and "static" are only said.
        targets: of the only config group.
        ignore: modules that a target matches and that are not quantized.
    """

    dtype: torch.dtype = torch.bfloat16
    packed_zeros: bool = True
    actorder: str | None = None
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] | None = ("lm_head",)


@dataclass(frozen=True)
class Torchao(Options):
    """torchao's Int4Tensor, whose zeros are real numbers."""

    symmetric: bool = False
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Rounded:
    """A projection of (values - zeros) * scales; column k is in group group_of[k]."""

    values: Tensor  # int64 [out_features, in_features], 0 to 15
    zeros: Tensor  # int64 [out_features, groups]
    scales: Tensor  # [out_features, groups]
    group_of: Tensor  # int64 [in_features]

    def weight(self) -> Tensor:
        zeros, scales = self.zeros[:, self.group_of].double(), self.scales[:, self.group_of].double()
        return (self.values.double() - zeros) * scales


def rounded(
    weight: Tensor, group_of: Tensor, *, symmetric: bool, scale_dtype: torch.dtype, zero_range: tuple[int, int]
) -> Rounded:
    """`weight` rounded to nearest, by the extremes of each group."""
    weight = weight.double()
    values, zeros, scales = torch.empty(weight.shape, dtype=torch.long), [], []
    for group in range(int(group_of.max()) + 1):
        columns = group_of == group
        part = weight[:, columns]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scale = (2 * torch.maximum(-low, high) / 15).clamp(min=1e-4).to(scale_dtype)
            zero = torch.full_like(low, 8)
        else:
            scale = ((high - low) / 15).clamp(min=1e-4).to(scale_dtype)
            zero = (-low / scale.double()).round().clamp(*zero_range)
        values[:, columns] = (part / scale.double()[:, None] + zero[:, None]).round().clamp(0, 15).long()
        zeros.append(zero.long())
        scales.append(scale)
    return Rounded(values, torch.stack(zeros, 1), torch.stack(scales, 1), group_of)


def words(nibbles: Tensor) -> Tensor:
    """[..., 8] below 16 -> int32 [...], the first nibble lowest."""
    bits = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32)


def packed_rows(values: Tensor) -> Tensor:
    """[n, k] -> [n / 8, k]: eight rows a word."""
    return words(values.unflatten(0, (-1, 8)).transpose(1, 2))


def packed_columns(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[n, k] -> [n, k / 8]: eight columns a word, nibble i being column order[i] of the eight."""
    return words(values.unflatten(1, (-1, 8))[..., list(order)])


def groups_in_order(in_features: int, group_size: int) -> Tensor:
    return torch.arange(in_features) // (in_features if group_size == -1 else group_size)


def groups_by_activation(in_features: int, group_size: int) -> Tensor:
    """Groups of columns in a random order, as that of their activations' size is."""
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))
    group_of = torch.empty(in_features, dtype=torch.long)
    group_of[order] = groups_in_order(in_features, group_size)
    return group_of


@cache
def _dense(source: Path) -> tuple[dict[str, Tensor], str]:
    return load_file(source / "model.safetensors"), (source / "config.json").read_text()


def _begin(source: Path, options: Options) -> Checkpoint:
    """Everything that is not quantized; `weights` holds what is to be quantized, in its own dtype."""
    tensors, text = _dense(source)
    config = json.loads(text) | {"torch_dtype": str(options.dtype).removeprefix("torch.")}
    chosen = {}
    for name in tensors:
        module = name.removesuffix(".weight")
        if PROJECTION.fullmatch(module) and not any(re.search(pattern, module) for pattern in options.dense):
            chosen[module] = tensors[name]
    if options.head:
        chosen[HEAD] = tensors.get(f"{HEAD}.weight", tensors[f"{EMBEDDING}.weight"])
        config["tie_word_embeddings"] = False
    replaced = {f"{module}.weight" for module in chosen}
    kept = {name: tensor.to(options.dtype) for name, tensor in tensors.items() if name not in replaced}
    return Checkpoint(dict(kept), config, chosen, kept, {}, source)


def gptq(source: Path, options: Gptq) -> Checkpoint:
    checkpoint = _begin(source, options)
    offset = 0 if (options.checkpoint_format or "gptq").lower() == "gptq_v2" else 1
    for module, weight in checkpoint.weights.items():
        in_features = weight.shape[1]
        group_of = (groups_by_activation if options.desc_act else groups_in_order)(in_features, options.group_size)
        q = rounded(
            weight,
            group_of,
            symmetric=options.symmetric,
            scale_dtype=options.scale_dtype or options.dtype,
            zero_range=(offset, 15),
        )
        if options.wide_zeros:
            q.zeros[0, 0] = 16
        tensors = {
            "qweight": packed_rows(q.values.T),
            "qzeros": packed_columns(q.zeros.T - offset),
            "scales": q.scales.T,
        }
        if options.g_idx:
            tensors["g_idx"] = q.group_of.to(torch.int32)
        if options.zero_biases:
            tensors["bias"] = torch.zeros(weight.shape[0], dtype=options.dtype)
        checkpoint.tensors |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
        checkpoint.weights[module] = q.weight()
    content = _gptq_config(options, {module.split(".", 3)[-1] for module in checkpoint.weights})
    if options.side_file:
        checkpoint.others["quantize_config.json"] = content
    else:
        checkpoint.config["quantization_config"] = content
    return checkpoint


def _gptq_config(options: Gptq, quantized: set[str]) -> dict:
    content: dict = {
        "bits": 4,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "sym": options.symmetric,
    }
    if options.tool == "autogptq":
        content |= {
            "damp_percent": 0.01,
            "static_groups": False,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
        }
    elif options.tool == "gptqmodel":
        content |= {
            "lm_head": options.head,
            "pack_dtype": "int32",
            "dynamic": {f"-:.*{pattern}": {} for pattern in options.dense} or None,
            "meta": {
                "quantizer": ["gptqmodel:1.7.4"],
                "uri": "https://github.com/modelcloud/gptqmodel",
                "damp_percent": 0.1,
                "damp_auto_increment": 0.0025,
                "static_groups": False,
                "true_sequential": True,
                "mse": 0.0,
            },
        }
    else:
        content |= {
            "backend": "auto",
            "batch_size": 1,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "damp_percent": 0.1,
            "dataset": None,
            "exllama_config": {"version": 1},
            "max_input_length": None,
            "model_seqlen": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": [sorted(quantized)] if options.dense else None,
            "pad_token_id": None,
            "tokenizer": None,
            "true_sequential": True,
            "use_cuda_fp16": False,
            "use_exllama": True,
        }
    content["quant_method"] = "gptq"
    if options.checkpoint_format is not None:
        content["checkpoint_format"] = options.checkpoint_format
    return content | options.config


def awq(source: Path, options: Awq) -> Checkpoint:
    checkpoint = _begin(source, options)
    for module, weight in checkpoint.weights.items():
        q = rounded(
            weight,
            groups_in_order(weight.shape[1], options.group_size),
            symmetric=options.symmetric,
            scale_dtype=options.scale_dtype or options.dtype,
            zero_range=(0, 15),
        )
        checkpoint.tensors |= {
            f"{module}.qweight": packed_columns(q.values.T, AWQ_ORDER),
            f"{module}.qzeros": packed_columns(q.zeros.T, AWQ_ORDER),
            f"{module}.scales": q.scales.T,
        }
        checkpoint.weights[module] = q.weight()
    # The tool leaves out whatever has one of these as a part of its name.
    left_out = sorted({name.split(".weight")[0] for name in checkpoint.kept if PROJECTION.match(name)}) or None
    if options.side_file:
        checkpoint.others["quant_config.json"] = {
            "zero_point": True,
            "q_group_size": options.group_size,
            "w_bit": 4,
            "version": "GEMM",
            "modules_to_not_convert": left_out,
        } | options.config
    else:
        checkpoint.config["quantization_config"] = {
            "quant_method": "awq",
            "zero_point": True,
            "group_size": options.group_size,
            "bits": 4,
            "version": "gemm",
            "modules_to_not_convert": left_out,
        } | options.config
    return checkpoint


def compressed_tensors(source: Path, options: CompressedTensors) -> Checkpoint:
    checkpoint = _begin(source, options)
    for module, weight in checkpoint.weights.items():
        permuted = options.actorder == "group"
        group_of = (groups_by_activation if permuted else groups_in_order)(weight.shape[1], options.group_size)
        q = rounded(
            weight,
            group_of,
            symmetric=options.symmetric,
            scale_dtype=options.scale_dtype or options.dtype,
            zero_range=(0, 15),
        )
        tensors = {
            "weight_packed": packed_columns(q.values),
            "weight_scale": q.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not options.symmetric:
            tensors["weight_zero_point"] = (
                packed_rows(q.zeros) if options.packed_zeros else (q.zeros - 8).to(torch.int8)
            )
        if permuted:
            tensors["weight_g_idx"] = q.group_of.to(torch.int32)
        checkpoint.tensors |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
        checkpoint.weights[module] = q.weight()
    weights = {
        "actorder": options.actorder,
        "block_structure": None,
        "dynamic": False,
        "group_size": options.group_size,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": options.symmetric,
        "type": "int",
    }
    checkpoint.config["quantization_config"] = {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": list(options.targets),
                "weights": weights,
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": None if options.ignore is None else list(options.ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | options.config
    return checkpoint


def torchao(source: Path, options: Torchao) -> Checkpoint:
    """torchao's plain layout: weight = value * scale + zero, value -8 to 7, zero a real number."""
    checkpoint = _begin(source, options)
    metadata = {name: json.dumps({"_type": "Tensor"}) for name in checkpoint.kept}
    for module, weight in checkpoint.weights.items():
        groups = weight.double().unflatten(1, (-1, options.group_size))
        low = groups.amin(-1)
        scale = ((groups.amax(-1) - low) / 15).clamp(min=1e-6)
        value = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).long() - 8
        zero = (low + 8 * scale).to(options.dtype)
        scale = scale.to(options.dtype)
        pairs = (value & 15).flatten(1).unflatten(1, (-1, 2))
        checkpoint.tensors |= {
            f"{module}._weight_qdata": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).view(torch.int8),
            f"{module}._weight_scale": scale.T,
            f"{module}._weight_zero_point": zero.T,
        }
        metadata[f"{module}.weight"] = json.dumps(
            {
                "_type": "Int4Tensor",
                "_data": {
                    "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
                    "block_size": [1, options.group_size],
                    "shape": list(weight.shape),
                },
                "_tensor_data_names": ["qdata", "scale", "zero_point"],
            }
        )
        checkpoint.weights[module] = (value * scale.double()[..., None] + zero.double()[..., None]).flatten(1)
    checkpoint.metadata |= metadata | {"tensor_names": json.dumps(list(metadata))}
    packing = {"_type": "Int4PackingFormat", "_data": "PLAIN"}
    algorithm = {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"}
    checkpoint.config["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {
            "default": {
                "_type": "Int4WeightOnlyConfig",
                "_version": 2,
                "_data": {
                    "group_size": options.group_size,
                    "set_inductor_config": True,
                    "int4_packing_format": packing,
                    "int4_choose_qparams_algorithm": algorithm,
                    "int4_tile_packed_ntile": 8,
                },
            }
        },
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    } | options.config
    return checkpoint


PACKERS = {Gptq: gptq, Awq: awq, CompressedTensors: compressed_tensors, Torchao: torchao}


def pack(source: Path, options: Options) -> Checkpoint:
    """The packer of these options."""
    return PACKERS[type(options)](source, options)  # type: ignore[operator]


def random_source(folder: Path, *, hidden_size: int = 64, intermediate_size: int = 128) -> Path:
    """A dense model of one random layer to quantize, smaller than the demo model."""
    heads, head_dim, vocab_size = 4, hidden_size // 4, 32
    generator = torch.Generator().manual_seed(0)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    shapes = {
        f"{EMBEDDING}.weight": (vocab_size, hidden_size),
        "model.layers.0.input_layernorm.weight": (hidden_size,),
        f"{attention}.q_proj.weight": (heads * head_dim, hidden_size),
        f"{attention}.k_proj.weight": (heads * head_dim // 2, hidden_size),
        f"{attention}.v_proj.weight": (heads * head_dim // 2, hidden_size),
        f"{attention}.o_proj.weight": (hidden_size, heads * head_dim),
        "model.layers.0.post_attention_layernorm.weight": (hidden_size,),
        f"{mlp}.gate_proj.weight": (intermediate_size, hidden_size),
        f"{mlp}.up_proj.weight": (intermediate_size, hidden_size),
        f"{mlp}.down_proj.weight": (hidden_size, intermediate_size),
        "model.norm.weight": (hidden_size,),
    }
    tensors = {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    return Checkpoint(tensors, config, {}, tensors, {}, folder).write(folder)

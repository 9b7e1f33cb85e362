"""A model on the meta device whose projections become int4 before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llama_fast.errors import CheckpointMismatchError, ConfigError, listed
from llama_fast.model.llama import Linear, LlamaLM
from llama_fast.model.quantization import Int4Scheme, Layout, names_part
from llama_fast.ops.int4 import Int4Linear

# Projections that run as one matrix.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def use_int4(model: LlamaLM, scheme: Int4Scheme) -> None:
    """Replace the projections that `scheme` names by `Int4Linear` without weights.

    Raises:
        ConfigError: a group size does not fit, a name of the scheme names nothing, or nothing is int4.
        CheckpointMismatchError: of projections that run as one matrix some are int4 and others not, or in other groups.
    """
    layouts = {name: scheme.layout_of(name, linear.in_features) for name, linear in linears(model)}
    unknown = [part for part in scheme.names if not any(names_part(name, part) for name in layouts)]
    if unknown:
        raise ConfigError(f"{scheme.where}: no projection is named {listed(unknown)}; there are {listed(layouts)}")
    _check_together(scheme, layouts)
    if not any(layouts.values()):
        raise ConfigError(f"{scheme.where}: no projection is int4; leave the quantization out")
    for name, layout in layouts.items():
        if layout is not None:
            _replace(model, name, layout)


def linears(model: LlamaLM) -> Iterator[tuple[str, nn.Linear]]:
    """The projections that may be int4, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def int4_linears(model: nn.Module) -> Iterator[tuple[str, Int4Linear]]:
    """The projections that are int4, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            yield name, module


def int4_module(words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Int4Linear:
    """An `Int4Linear` of these parameters; shapes and dtypes as there."""
    out_features, groups = scales.shape
    in_features = words.shape[1] * 8
    with torch.device("meta"):
        module = Int4Linear(
            in_features,
            out_features,
            group_size=in_features // groups,
            symmetric=zeros is None,
            bias=bias is not None,
        )
    given = {"weight_packed": words, "weight_scale": scales, "weight_zero_point": zeros, "bias": bias}
    for name, value in given.items():
        if value is not None:
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return module


def _check_together(scheme: Int4Scheme, layouts: dict[str, Layout | None]) -> None:
    for name in layouts:
        parent, _, last = name.rpartition(".")
        for together in _TOGETHER:
            if last == together[0]:
                found = {part: layouts[f"{parent}.{part}"] for part in together}
                sizes = {part: layout and layout.group_size for part, layout in found.items()}
                if len(set(sizes.values())) > 1:
                    told = ", ".join(f"{part} {'float' if size is None else size}" for part, size in sizes.items())
                    raise CheckpointMismatchError(
                        f"{scheme.where}: {parent} has group sizes {told}; they run as one matrix and need the same"
                    )


def _replace(model: LlamaLM, name: str, layout: Layout) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    linear: nn.Linear = getattr(owner, last)
    with torch.device("meta"):
        int4 = Int4Linear(
            linear.in_features,
            linear.out_features,
            group_size=layout.group_size,
            symmetric=layout.symmetric,
            bias=linear.bias is not None,
        )
    setattr(owner, last, int4)


def quantization_config(model: LlamaLM) -> dict[str, Any] | None:
    """config.json's `quantization_config` for what `save_weights` writes of `model`; None without int4 projections.

    Source: what llm-compressor writes for compressed-tensors' "pack-quantized".
    """
    found: dict[Layout, list[str]] = {}
    for name, linear in int4_linears(model):
        found.setdefault(Layout(linear.group_size, linear.weight_zero_point is None), []).append(name)
    if not found:
        return None
    groups = {}
    for index, (layout, names) in enumerate(found.items()):
        weights: dict[str, Any] = {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": layout.group_size,
            "num_bits": 4,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "group",
            "symmetric": layout.symmetric,
            "type": "int",
        }
        groups[f"group_{index}"] = {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"] if len(found) == 1 else names,
            "weights": weights,
        }
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": [name for name, _ in linears(model)],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }

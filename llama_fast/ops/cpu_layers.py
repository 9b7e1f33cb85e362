"""Whole decoder layers for one native call.

A layer's ops stream its weights through the caches, which evicts Python's own code and data: what stands between two
ops then takes ten times as long as for a model that stays in the caches (bench/results/cpu-experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llama_fast.ops.cpu_arguments import pages_of
from llama_fast.ops.cpu_linear import ACTIVATION_NUMBERS, LinearWeight

if TYPE_CHECKING:
    import torch

    from llama_fast.model.kv_cache import PagedKVCache
    from llama_fast.model.llama import DecoderLayer


@dataclass(frozen=True)
class NativeLayers:
    """Layers whose weights are ready (`DecoderLayer.prepare`).

    Attributes:
        layers: in their order; they hold what the addresses in `native` point at.
        native: one `_C.Layer` each; empty where a layer needs Python, and then the layers run op by op.
    """

    layers: Sequence[DecoderLayer]
    native: list[Any]
    weights: Sequence[LinearWeight]

    def __reduce__(self) -> tuple:
        # As LinearWeight: a copy is prepared anew.
        return NativeLayers, (self.layers, [], ())


def native_layers(module: ModuleType, layers: Sequence[DecoderLayer]) -> NativeLayers:
    """The layers as the native module takes them."""
    native, weights = [], []
    for layer in layers:
        qkv, o, gate_up, down = layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj
        attention_norm, mlp_norm = layer.attention_norm, layer.mlp_norm
        activation = gate_up.activation or "silu"
        plain = all(
            norm.weight.is_contiguous() and norm.weight.dtype is qkv.dtype for norm in (attention_norm, mlp_norm)
        )
        fits = attention_norm.weight.shape == mlp_norm.weight.shape == (qkv.in_features,)
        fits &= o.out_features == gate_up.in_features == down.out_features == qkv.in_features
        fits &= down.in_features * 2 == gate_up.out_features
        if not (isinstance(activation, str) and gate_up.pair and plain and fits):
            return NativeLayers(layers, [], ())
        weights += [qkv, o, gate_up, down]
        norms = (attention_norm.weight.data_ptr(), attention_norm.eps, mlp_norm.weight.data_ptr(), mlp_norm.eps)
        parts = (qkv.native, o.native, gate_up.native, down.native)
        native.append(module.Layer(*parts, *norms, ACTIVATION_NUMBERS[activation]))
    return NativeLayers(layers, native, weights)


def native_pages(
    module: ModuleType, cache: PagedKVCache, num_layers: int, dtype: torch.dtype
) -> tuple[list[Any], int, int]:
    """Each layer's pages as the native module takes them, num_kv_heads and head_dim."""
    every = [pages_of(module, "run_layers", cache.layer(index), dtype) for index in range(num_layers)]
    return [pages for pages, _, _ in every], *every[0][1:]

"""Rounding to 4 bits that knows a text: GPTQ, layer by layer.

A projection's outputs matter, not its weights. Over the text's inputs x the squared error of an output is
(w - q) H (w - q)' with H = sum of x x'. Columns are rounded one after the other, those that matter most first (the
largest diagonal of H), and what rounding one changed is made up for by those that are not rounded yet. Scales are those
of plain rounding with each input weighed by its mean square; they are fixed before, so that groups keep their inputs.

Each layer sees what the rounded layers before it give, and its four inputs as it computed them before it was rounded.
Source  GPTQ, arXiv:2210.17323 (its equations 2 and 3 in blocks of columns, by the Cholesky factor of the inverse).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from llama_fast.model.int4_formats import check_scales
from llama_fast.model.int4_modules import int4_module
from llama_fast.model.int4_rounding import fit_groups
from llama_fast.model.llama import DecoderLayer, LlamaLM, Norm
from llama_fast.model.progress import ProgressBar
from llama_fast.model.quantization import Int4Scheme, Layout
from llama_fast.model.sequences import Sequences
from llama_fast.ops.int4 import Int4Linear, Int4Weight, pack_rows

# Columns whose corrections are gathered before the rest of the weight gets them.
_BLOCK = 128
# Tokens that run at a time.
_TOKENS = 4096
# Added to the diagonal of H, relative to its mean; more where the factor does not exist.
_DAMPING = (0.01, 0.1, 1.0)


@torch.no_grad()
def calibrate(
    model: LlamaLM,
    scheme: Int4Scheme,
    ops: ModuleType,
    windows: Sequence[Sequence[int]],
    *,
    show_progress: bool | None = False,
) -> None:
    """Round the projections that `scheme` names, in place.

    Args:
        model: with float weights, which are not changed; `Int4Linear`s take the modules' places.
        ops: the backend that runs it.
        windows: token ids of pieces of the text.
        show_progress: a bar over the layers; None shows it on a terminal.

    Raises:
        ConfigError: a group size does not fit.
    """
    model.prepare(ops)
    parts = [Sequences(model, ops, group) for group in _groups(windows)]
    states = [part.embedded() for part in parts]
    layers = [cast(DecoderLayer, layer) for layer in model.model.layers]
    disable = None if show_progress is None else not show_progress
    for index, layer in enumerate(ProgressBar(layers, "calibrating", unit="layer", disable=disable)):
        grams = _Grams(ops)
        for part, state in zip(parts, states, strict=True):
            part.layer(layer, state, grams)
        for names, gram in grams.by_projections(layer):
            for name in names:
                linear = cast(nn.Linear, layer.get_submodule(name))
                layout = scheme.layout_of(f"model.layers.{index}.{name}", linear.in_features)
                if layout is not None:
                    _replace(layer, name, _rounded(linear, layout, gram, model.dtype))
        layer.prepare(ops)
        states = [part.layer(layer, state) for part, state in zip(parts, states, strict=True)]
    layout = scheme.layout_of("lm_head", model.lm_head.in_features)
    if layout is not None:
        norm = model.model.norm.prepare()
        gram = _gram(ops.rms_norm(torch.cat(states), norm.weight, norm.eps))
        model.lm_head = _rounded(model.lm_head, layout, gram, model.dtype)  # type: ignore[assignment]
    model.refresh()


def _groups(windows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Windows that run together: a layer's own tensors are there for some thousand tokens, not for the whole text."""
    groups: list[list[Sequence[int]]] = [[]]
    for window in windows:
        if groups[-1] and sum(map(len, groups[-1])) + len(window) > _TOKENS:
            groups.append([])
        groups[-1].append(window)
    return groups


class _Grams:
    """A backend that notes the Gram matrix, fp32 [in_features, in_features], of each projection's input."""

    def __init__(self, ops: ModuleType) -> None:
        self._ops = ops
        self._of_weight: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _add(self, weight: Any, x: Tensor) -> None:
        gram = _gram(x)
        self._of_weight[id(weight)] = self._of_weight[id(weight)].add_(gram) if id(weight) in self._of_weight else gram

    def norm_qkv_rope_cache(self, x: Tensor, norm: Norm, qkv: Any, *args: Any) -> Tensor:
        self._add(qkv, self._ops.rms_norm(x, norm.weight, norm.eps))
        return self._ops.norm_qkv_rope_cache(x, norm, qkv, *args)

    def norm_gate_up_act(self, x: Tensor, norm: Norm, gate_up: Any, *args: Any) -> Tensor:
        self._add(gate_up, self._ops.rms_norm(x, norm.weight, norm.eps))
        return self._ops.norm_gate_up_act(x, norm, gate_up, *args)

    def linear_residual(self, x: Tensor, weight: Any, *args: Any) -> Tensor:
        self._add(weight, x)
        return self._ops.linear_residual(x, weight, *args)

    def by_projections(self, layer: DecoderLayer) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Names in the layer of the projections of one input, and its matrix, which is forgotten then."""
        # The largest first: it is not needed while the others are worked on.
        yield ("mlp.down_proj",), self._of_weight.pop(id(layer.down_proj))
        yield ("mlp.gate_proj", "mlp.up_proj"), self._of_weight.pop(id(layer.gate_up_proj))
        yield ("self_attn.o_proj",), self._of_weight.pop(id(layer.o_proj))
        yield ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), self._of_weight.pop(id(layer.qkv_proj))


def _gram(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for rows in x.split(4096):
        wide = rows.float()
        total.addmm_(wide.t(), wide)
    return total


def _replace(layer: DecoderLayer, name: str, linear: Int4Linear) -> None:
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, linear)


def _rounded(linear: nn.Linear, layout: Layout, gram: Tensor, dtype: torch.dtype) -> Int4Linear:
    weight = gptq(linear.weight, gram, layout, dtype)
    check_scales("the calibrated weight", weight.scales)
    bias = None if linear.bias is None else linear.bias.data
    return int4_module(pack_rows(weight.values), weight.scales, weight.zeros, bias)


def gptq(weight: Tensor, gram: Tensor, layout: Layout, dtype: torch.dtype) -> Int4Weight:
    """Round a weight for the inputs that a Gram matrix tells of.

    Args:
        weight: [out_features, in_features].
        gram: fp32 [in_features, in_features], the sum of x x' over inputs x.
        dtype: of the scales.
    """
    out_features, in_features = weight.shape
    rest = weight.float().clone()
    importance = (gram.diagonal() / gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=1e-6)
    groups = rest.unflatten(1, (-1, layout.group_size))
    scale, zero = _fit(groups, layout, dtype, importance)
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order])
    rest = rest[:, order]
    scale_of, zero_of = (t.repeat_interleave(layout.group_size, 1)[:, order] for t in (scale, zero))
    values = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        block, errors = rest[:, start:stop], torch.empty(out_features, stop - start, device=weight.device)
        for place in range(stop - start):
            column = start + place
            w, s, z = block[:, place], scale_of[:, column], zero_of[:, column]
            q = (w / s + z).round_().clamp_(0, 15)
            values[:, column] = q.to(torch.uint8)
            error = (w - (q - z) * s) / factor[column, column]
            block[:, place:] -= error[:, None] * factor[column, column:stop]
            errors[:, place] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    restored = torch.empty_like(values)
    restored[:, order] = values
    zeros = None if layout.symmetric else zero.to(torch.uint8)
    return Int4Weight(restored, scale.to(dtype), zeros, None)


def _fit(groups: Tensor, layout: Layout, dtype: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    """fit_groups, some rows at a time."""
    weighed = importance.view(-1, layout.group_size)
    parts = [fit_groups(rows, layout.symmetric, dtype, weighed) for rows in groups.split(64)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper U with U' U = the inverse of `gram`, whose diagonal is raised for it."""
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for damping in _DAMPING:
        raised = gram.clone()
        raised.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(raised)
        del raised
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and bool(factor.isfinite().all()):
            return factor
    # Inputs of NaN, or none at all: each column for itself.
    return torch.eye(gram.shape[0], device=gram.device)

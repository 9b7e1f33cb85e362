"""How files hold a projection of 4-bit integers, and its way into an `Int4Linear`; sources are given with each format.

A format says which tensors a projection has, so that a missing, misshapen or left-over one is found like that of any
other weight, and turns them into the one form that backends read. Nothing is guessed: scales, zeros and the order of
groups are checked, and what a format could mean in two ways is decided by config.json (quantization.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama_fast.errors import CheckpointFormatError, CheckpointMismatchError, ConfigError, UnsupportedError
from llama_fast.model.int4_rounding import RoundingError, round_weight
from llama_fast.ops.int4 import MAX_ZERO, SYMMETRIC_ZERO, Int4Linear, pack_rows, unpack_rows

# Values in an int32.
_NIBBLES = 8
# AutoAWQ's: nibble p of a word is column _AWQ_ORDER[p] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Int4Tensors(NamedTuple):
    """What an `Int4Linear` gets; shapes and dtypes as there."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None


class Int4Format(Protocol):
    """One way to store a projection."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Suffixes of `tensors` that a file may leave out."""
        ...

    @property
    def kept(self) -> bool:
        """Whether the words are used as stored, so that they may stay mapped."""
        ...

    def tensors(self, linear: Int4Linear, held: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """What a file holds of `linear`, by suffix, on the meta device; floats stand for floats of any size.

        Args:
            held: dtypes of what the file has under the projection's name, by suffix: some formats have two forms.
        """
        ...

    def read(self, where: str, stored: Mapping[str, Tensor], linear: Int4Linear, dtype: torch.dtype) -> Int4Tensors:
        """Turn them into what `linear` holds, its scales in `dtype`.

        Args:
            where: file and projection, for messages.

        Raises:
            CheckpointFormatError: a value that the format does not allow.
            CheckpointMismatchError, ConfigError: values that are not what config.json says.
            UnsupportedError: a variant that is not supported.
        """
        ...


def _meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _groups(linear: Int4Linear) -> int:
    return linear.in_features // linear.group_size


def check_scales(where: str, scales: Tensor) -> None:
    """Raise CheckpointFormatError unless each is a positive, normal number of its dtype."""
    # NaN is not above anything.
    right = (scales >= torch.finfo(scales.dtype).tiny) & scales.isfinite()
    if wrong := int((~right).sum()):
        raise CheckpointFormatError(
            f"{where}: {wrong} of {scales.numel()} scales are zero, negative, subnormal, infinite or NaN in "
            f"{scales.dtype}, the first is {scales[~right][0].item()}; quantize the model again, or load it in another "
            "dtype"
        )


def _checked_scales(where: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` in `dtype`, contiguous and checked."""
    cast = scales.to(dtype).contiguous()
    check_scales(where, cast)
    return cast


def _symmetric(where: str, zeros: Tensor, symmetric: bool, fix: str) -> Tensor | None:
    """`zeros`, or None where they must all be 8 and are."""
    if not symmetric:
        return zeros
    if not bool((zeros == SYMMETRIC_ZERO).all()):
        found = sorted(set(zeros.flatten()[:1000].tolist()))[:5]
        raise ConfigError(
            f"{where}: the zeros of a symmetric weight are {SYMMETRIC_ZERO}, and these are {found}; {fix}"
        )
    return None


def _refuse_outputs(where: str, linear: Int4Linear) -> None:
    """Words hold eight outputs: of a ninth these formats do not say where it is."""
    if linear.out_features % _NIBBLES:
        raise UnsupportedError(f"{where} has {linear.out_features} outputs: supported are multiples of {_NIBBLES}")


def _refuse_bias(where: str, stored: Mapping[str, Tensor], linear: Int4Linear) -> None:
    """Old writers store a bias for every projection: zeros where the model has none."""
    if linear.bias is None and "bias" in stored and bool(stored["bias"].any()):
        raise CheckpointMismatchError(
            f"{where}.bias holds numbers, and the model has none there; set attention_bias or mlp_bias in config.json"
        )


def _check_groups(where: str, g_idx: Tensor, linear: Int4Linear) -> None:
    """The group of each input feature must be the one that it lies in."""
    groups = _groups(linear)
    expected = torch.arange(linear.in_features, dtype=g_idx.dtype, device=g_idx.device) // linear.group_size
    if torch.equal(g_idx, expected):
        return
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointFormatError(f"{where} holds {low} to {high}; there are {groups} groups, from 0")
    if not torch.equal(g_idx.sort().values, expected):
        raise CheckpointFormatError(f"{where} does not give each of {groups} groups {linear.group_size} inputs")
    raise UnsupportedError(
        f"{where} orders the inputs by activation (desc_act): that is not supported; use a checkpoint made with "
        "desc_act=false or static_groups=true"
    )


@dataclass(frozen=True)
class Gptq:
    """AutoGPTQ's and GPTQModel's: qweight int32 [in / 8, out], nibble i of row r is input feature 8 r + i.

    Attributes:
        version: of the zeros, qzeros int32 [groups, out / 8]: 1 stores each minus 1, 2 as it is.
        symmetric: config.json's `sym`.
        optional: without "g_idx" where the inputs may be in another order than that of the groups (`desc_act`).

    Source: https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/ModelCloud/GPTQModel, their QuantLinear.
    """

    version: int
    symmetric: bool
    optional: tuple[str, ...] = ("g_idx", "bias")
    kept: bool = False

    def tensors(self, linear: Int4Linear, held: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        ins, outs, groups = linear.in_features, linear.out_features, _groups(linear)
        return {
            "qweight": _meta(ins // _NIBBLES, outs, dtype=torch.int32),
            "qzeros": _meta(groups, outs // _NIBBLES, dtype=torch.int32),
            "scales": _meta(groups, outs),
            "g_idx": _meta(ins, dtype=torch.int32),
            "bias": _meta(outs),
        }

    def read(self, where: str, stored: Mapping[str, Tensor], linear: Int4Linear, dtype: torch.dtype) -> Int4Tensors:
        _refuse_outputs(where, linear)
        _refuse_bias(where, stored, linear)
        if "g_idx" in stored:
            _check_groups(f"{where}.g_idx", stored["g_idx"], linear)
        zeros = unpack_rows(stored["qzeros"]).t().contiguous() + (1 if self.version == 1 else 0)
        other = "gptq_v2" if self.version == 1 else "gptq"
        fix = f"set sym to false in its quantization settings, or checkpoint_format to '{other}', if that is true"
        return Int4Tensors(
            stored["qweight"].t().contiguous(),
            _checked_scales(f"{where}.scales", stored["scales"].t(), dtype),
            _symmetric(f"{where}.qzeros", zeros, self.symmetric, fix),
        )


@dataclass(frozen=True)
class Awq:
    """AutoAWQ's "gemm" version: qweight int32 [in, out / 8] and qzeros int32 [groups, out / 8], eight columns a word.

    Source: https://github.com/casper-hansen/AutoAWQ, WQLinear_GEMM; arXiv:2306.00978.
    """

    optional: tuple[str, ...] = ("bias",)
    kept: bool = False

    def tensors(self, linear: Int4Linear, held: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        ins, outs, groups = linear.in_features, linear.out_features, _groups(linear)
        return {
            "qweight": _meta(ins, outs // _NIBBLES, dtype=torch.int32),
            "qzeros": _meta(groups, outs // _NIBBLES, dtype=torch.int32),
            "scales": _meta(groups, outs),
            "bias": _meta(outs),
        }

    def read(self, where: str, stored: Mapping[str, Tensor], linear: Int4Linear, dtype: torch.dtype) -> Int4Tensors:
        _refuse_outputs(where, linear)
        _refuse_bias(where, stored, linear)
        return Int4Tensors(
            pack_rows(self._columns(stored["qweight"]).t().contiguous()),
            _checked_scales(f"{where}.scales", stored["scales"].t(), dtype),
            self._columns(stored["qzeros"]).t().contiguous(),
        )

    @staticmethod
    def _columns(words: Tensor) -> Tensor:
        """int32 [rows, out / 8] -> uint8 [rows, out]."""
        nibbles = unpack_rows(words).view(words.shape[0], -1, _NIBBLES)
        columns = torch.empty_like(nibbles)
        columns[..., list(_AWQ_ORDER)] = nibbles
        return columns.flatten(1)


@dataclass(frozen=True)
class CompressedTensors:
    """compressed-tensors' "pack-quantized": words as `pack_rows` makes them, of values that count from -8.

    weight_zero_point, of asymmetric weights, is int32 [out / 8, groups], nibble i of row r that of output 8 r + i;
    before version 0.9.4 int8 [out, groups], counted from -8.

    Attributes:
        optional: without "weight_g_idx" where the inputs may be in another order than that of the groups (`actorder`).

    Source: https://github.com/vllm-project/compressed-tensors, PackedQuantizationCompressor.
    """

    symmetric: bool
    optional: tuple[str, ...] = ("weight_g_idx",)
    kept: bool = True

    def tensors(self, linear: Int4Linear, held: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        ins, outs, groups = linear.in_features, linear.out_features, _groups(linear)
        found = {
            "weight_packed": _meta(outs, ins // _NIBBLES, dtype=torch.int32),
            "weight_scale": _meta(outs, groups),
            "weight_shape": _meta(2, dtype=torch.int32 if held.get("weight_shape") == torch.int32 else torch.int64),
            "weight_g_idx": _meta(ins, dtype=torch.int32),
        }
        if not self.symmetric:
            packed = held.get("weight_zero_point") != torch.int8
            rows, kind = (-(-outs // _NIBBLES), torch.int32) if packed else (outs, torch.int8)
            found["weight_zero_point"] = _meta(rows, groups, dtype=kind)
        return found

    def read(self, where: str, stored: Mapping[str, Tensor], linear: Int4Linear, dtype: torch.dtype) -> Int4Tensors:
        shape = stored["weight_shape"].tolist()
        if shape != [linear.out_features, linear.in_features]:
            raise CheckpointMismatchError(
                f"{where}.weight_shape is {shape}; the model has {[linear.out_features, linear.in_features]}"
            )
        # -1 throughout: never filled in, since nothing was reordered.
        if "weight_g_idx" in stored and not bool((stored["weight_g_idx"] == -1).all()):
            _check_groups(f"{where}.weight_g_idx", stored["weight_g_idx"], linear)
        zeros = None
        if not self.symmetric:
            zeros = self._zeros(f"{where}.weight_zero_point", stored["weight_zero_point"], linear)
        scales = _checked_scales(f"{where}.weight_scale", stored["weight_scale"], dtype)
        return Int4Tensors(stored["weight_packed"], scales, zeros)

    @staticmethod
    def _zeros(where: str, stored: Tensor, linear: Int4Linear) -> Tensor:
        if stored.dtype == torch.int32:
            return unpack_rows(stored.t()).t()[: linear.out_features].contiguous()
        if bool(((stored < -8) | (stored > 7)).any()):
            raise CheckpointFormatError(
                f"{where} holds {int(stored.min())} to {int(stored.max())}; four bits hold -8 to 7"
            )
        return (stored + SYMMETRIC_ZERO).to(torch.uint8)

    def write(self, where: str, linear: Int4Linear) -> dict[str, Tensor]:
        """The tensors that `read` turns into `linear`'s, bit for bit.

        Raises:
            UnsupportedError: a zero of 16, which GPTQ's first format can hold and four bits cannot.
        """
        tensors = {
            "weight_packed": linear.rows(),
            "weight_scale": linear.weight_scale.data,
            "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
        }
        if linear.weight_zero_point is not None:
            zeros = linear.weight_zero_point.data
            if int(zeros.max()) >= MAX_ZERO:
                raise UnsupportedError(f"{where} has zeros of {MAX_ZERO}, which pack-quantized files cannot hold")
            padded = torch.nn.functional.pad(zeros, (0, 0, 0, -zeros.shape[0] % _NIBBLES), value=SYMMETRIC_ZERO)
            tensors["weight_zero_point"] = pack_rows(padded.t().contiguous()).t()
        return tensors


@dataclass
class Rounded:
    """A float weight, rounded as it is read (int4_rounding.py).

    Attributes:
        total: what rounding changed so far.
    """

    symmetric: bool
    total: RoundingError
    optional: tuple[str, ...] = ()
    kept: bool = False

    def tensors(self, linear: Int4Linear, held: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        return {"weight": _meta(linear.out_features, linear.in_features)}

    def read(self, where: str, stored: Mapping[str, Tensor], linear: Int4Linear, dtype: torch.dtype) -> Int4Tensors:
        weight = stored["weight"]
        if not bool(weight.isfinite().all()):
            raise CheckpointFormatError(f"{where}.weight holds NaN or infinity, which no 4-bit integer stands for")
        rounded, error = round_weight(weight, linear.group_size, self.symmetric, dtype)
        self.total += error
        scales = _checked_scales(f"{where}.weight", rounded.scales, dtype)
        return Int4Tensors(pack_rows(rounded.values), scales, rounded.zeros)

"""Rotary position embedding: the cos and sin of each packed token, for every RoPE type of the Llama page.

A token at position p is rotated by the angles p * inv_freq. inv_freq depends on the type, and for two types on the
length of the sequence as well:

    default   inv_freq_i = theta^(-2i / rotary_dim)
    linear    default / factor                                                        (position interpolation)
    llama3    default, divided by factor where the wavelength is long, blended between (Llama 3.1)
    yarn      default and default / factor, blended by a ramp over the dimensions     (arXiv:2309.00071)
    dynamic   default with theta * (factor * L / M - (factor - 1))^(d / (d - 2)), L = max(length, M) (NTK-aware)
    longrope  default / short_factor up to the original length, / long_factor beyond  (arXiv:2402.13753)

M is max_position_embeddings, d is rotary_dim. yarn and longrope also scale cos and sin (attention_scaling). All but
default and longrope need `factor`, which the transformers page calls optional.

**Length.** Hugging Face computes inv_freq once per forward call, from the largest position in the call, so there a
token's rotation depends on its neighbours in the batch, and for dynamic on earlier calls too: the largest length seen
is kept until a call shorter than M. Here each token carries its own `rope_len`, the length that Hugging Face sees
in the call that rotates it when its sequence runs alone on a fresh model: the prompt's length for every prompt token,
position + 1 for a generated one. These lengths never shrink along a sequence, so what is kept never outlives its use.

**At a crossing** (a generated token whose length first exceeds M, or longrope's original length) only the new token is
rotated the new way. Keys are cached rotated, so those of earlier tokens keep the rotation of their own call, with
dynamic a different one for each generated token: Hugging Face's cache holds the same (transformers issues 25104
and 25306). A continued text that is sent as a new prompt is rotated in one way throughout.

**dynamic** takes M from max_position_embeddings; original_max_position_embeddings has no effect, as in transformers
v4 and v5. **longrope** takes the original length from original_max_position_embeddings, wherever in config.json it
stands, else from max_position_embeddings, and an explicit factor wins over their ratio (v5's rules).
**partial_rotary_factor** holds for all types: the first int(head_dim * factor) dimensions are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from llama_fast.config import LlamaConfig
from llama_fast.config_rope import longrope_attention_factor
from llama_fast.errors import KernelArgumentError
from llama_fast.ops.rows import SERIAL_ELEMENTS, elementwise

# Positions whose cos and sin are kept where they are asked for: 16 MB at most with a rotary_dim of 64.
TABLE_ROWS = 32768


class RotaryEmbedding:
    """cos and sin of packed tokens.

    Args:
        config: gives head_dim, max_position_embeddings and rope_parameters, read once.

    Raises:
        ConfigError: the configuration is wrong.
    """

    def __init__(self, config: LlamaConfig) -> None:
        config.validate()
        params = config.rope_parameters
        self.rope_type: str = params["rope_type"]
        self.rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        self.attention_scaling = 1.0
        self._theta = float(params["rope_theta"])  # torch takes no integer beyond int64
        self._max_len = config.max_position_embeddings
        self._original_len = params.get("original_max_position_embeddings") or self._max_len
        self._factor = params.get("factor", 1.0)
        # What the model is made for: dynamic starts to scale beyond max_position_embeddings, the others count up to it.
        self.context_len = int(self._max_len * self._factor) if self.rope_type == "dynamic" else self._max_len

        # On the CPU in fp32 whatever the default device and dtype are: models are built on the meta device.
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device="cpu") / self.rotary_dim
        tables = [exponents]
        if self.rope_type == "longrope":
            self.attention_scaling = longrope_attention_factor(params, self._max_len)
            for name in ("short_factor", "long_factor"):
                factors = torch.tensor(params[name], dtype=torch.float32, device="cpu")
                tables.append(1.0 / (factors * self._theta**exponents))
        elif self.rope_type == "yarn":
            self.attention_scaling = _yarn_scaling(params)
            tables.append(_yarn_inv_freq(self._theta, exponents, self._original_len, params))
        else:
            inv_freq = 1.0 / self._theta**exponents
            if self.rope_type == "linear":
                inv_freq = inv_freq / params["factor"]
            elif self.rope_type == "llama3":
                inv_freq = _llama3_inv_freq(inv_freq, self._original_len, params)
            tables.append(inv_freq)
        # exponents, then one inv_freq (longrope: short, long), each [rotary_dim / 2], per device they were needed on.
        self._tables: dict[torch.device, list[Tensor]] = {exponents.device: tables}
        self._cos_sin: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def state(self, rope_len: int) -> Hashable:
        """Everything besides its position that the rotation of a token depends on; part of a prefix's key."""
        if self.rope_type == "dynamic":
            return max(rope_len, self._max_len)
        if self.rope_type == "longrope":
            return "long" if rope_len > self._original_len else "short"
        return ()

    def inv_freq(self, rope_lens: Tensor) -> Tensor:
        """Inverse frequencies for tokens with these lengths.

        Args:
            rope_lens: int64 [num_tokens].

        Returns:
            fp32 [num_tokens, rotary_dim / 2], or [rotary_dim / 2] for types that do not depend on the length.
        """
        tables = self._tables.get(rope_lens.device)
        if tables is None:
            tables = [table.to(rope_lens.device) for table in self._tables[torch.device("cpu")]]
            self._tables[rope_lens.device] = tables
        if self.rope_type == "longrope":
            _, short, long = tables
            return torch.where((rope_lens > self._original_len)[:, None], long, short)
        exponents, inv_freq = tables
        if self.rope_type == "dynamic":
            grown = self._dynamic_inv_freq(rope_lens.clamp(min=self._max_len), exponents)
            return torch.where((rope_lens > self._max_len)[:, None], grown, inv_freq)
        return inv_freq

    def __call__(self, positions: Tensor, rope_lens: Tensor, longest: int | None = None) -> tuple[Tensor, Tensor]:
        """Rotation of each token; its bits depend on its own position and length alone.

        Args:
            positions: int64 [num_tokens], on any device.
            rope_lens: int64 [num_tokens]; see the module's text. Read by dynamic and longrope only.
            longest: every position is in [0, longest): rows of a table then serve, which saves a decoding step cos and
                sin; None where that is not known. The bits are the same.

        Returns:
            cos and sin, both fp32 [num_tokens, rotary_dim] with the angles twice (rotate-half layout), times
            attention_scaling.

        Raises:
            KernelArgumentError: the two are not vectors of one length.
        """
        if positions.ndim != 1 or positions.shape != rope_lens.shape:
            raise KernelArgumentError(
                f"positions and rope_lens must both be [num_tokens]; got {tuple(positions.shape)} and "
                f"{tuple(rope_lens.shape)}"
            )
        table = None if longest is None else self.table(longest, positions.device)
        if table is not None:
            return table[0].index_select(0, positions), table[1].index_select(0, positions)
        return self._computed(positions, rope_lens)

    def write(
        self,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        rope_lens: Tensor,
        table: tuple[Tensor, Tensor] | None,
    ) -> None:
        """The same into `cos` and `sin`, fp32 [num_tokens, rotary_dim], which a captured step reads where they are.

        Args:
            table: of `table`, for every position that will come; whoever captures the call must keep it.
        """
        if table is not None:
            for values, out in zip(table, (cos, sin), strict=True):
                torch.index_select(values, 0, positions, out=out)
        else:
            for values, out in zip(self._computed(positions, rope_lens), (cos, sin), strict=True):
                out.copy_(values)

    def table(self, longest: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the positions below `longest`, and perhaps more; None where that would be too large, or where
        a rotation depends on more than the position. A later call may make another one and forget this."""
        if longest > TABLE_ROWS or self.rope_type in ("dynamic", "longrope"):
            return None
        table = self._cos_sin.get(device)
        if table is None or table[0].shape[0] < longest:
            # Doubled: a growing sequence makes it anew a few times.
            every = torch.arange(max(1024, 1 << (longest - 1).bit_length()), device=device)
            # Read by steps in every mode, so never an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                table = self._cos_sin[device] = self._computed(every, every)
        return table

    def _computed(self, positions: Tensor, rope_lens: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].to(torch.float32) * self.inv_freq(rope_lens)
        cos = elementwise(torch.cos, angles) * self.attention_scaling
        sin = elementwise(torch.sin, angles) * self.attention_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)

    def _dynamic_inv_freq(self, lengths: Tensor, exponents: Tensor) -> Tensor:
        """Inverse frequencies [num_tokens, rotary_dim / 2] at lengths [num_tokens] of max_position_embeddings or more.

        Source: NTK-aware scaling with a growing length, https://www.reddit.com/r/LocalLLaMA/comments/14mrgpr.
        """
        growth = (self._factor * lengths / self._max_len) - (self._factor - 1)
        # Every second element of a buffer: for strided operands pow takes PyTorch's scalar loop, in which no neighbour
        # can matter, and which is what the single length of a call takes in Hugging Face's code (a 0-dim tensor).
        growth = torch.stack((growth, growth), dim=-1)[:, 0]
        theta = self._theta * growth ** (self.rotary_dim / (self.rotary_dim - 2))
        rows = max(1, SERIAL_ELEMENTS // len(exponents))
        return torch.cat([1.0 / part[:, None] ** exponents for part in theta.split(rows)])


def _llama3_inv_freq(inv_freq: Tensor, original_len: int, params: dict[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended. All [rotary_dim / 2]."""
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    wavelengths = 2 * math.pi / inv_freq
    keep = (original_len / wavelengths - low) / (high - low)
    scaled = torch.where(wavelengths > original_len / low, inv_freq / factor, inv_freq)
    blended = (1 - keep) * inv_freq / factor + keep * inv_freq
    between = (wavelengths >= original_len / high) & (wavelengths <= original_len / low)
    return torch.where(between, blended, scaled)


def _yarn_inv_freq(theta: float, exponents: Tensor, original_len: int, params: dict[str, Any]) -> Tensor:
    """YaRN: dimensions that turn often within the original length are kept, slow ones interpolated. [rotary_dim / 2]"""
    rotary_dim = 2 * len(exponents)

    def dimension(rotations: float) -> float:
        # The (fractional) dimension that turns this many times within the original length.
        return (rotary_dim * math.log(original_len / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(params.get("beta_fast") or 32), dimension(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp

    ramp = (torch.arange(len(exponents), dtype=torch.float32, device="cpu") - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    wavelengths = theta**exponents
    return 1.0 / (params["factor"] * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _yarn_scaling(params: dict[str, Any]) -> float:
    """YaRN's factor on cos and sin, so its square on the attention logits."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(params["factor"]) + 1.0 if params["factor"] > 1 else 1.0

    if params.get("attention_factor") is not None:
        return params["attention_factor"]
    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)

"""A canary: what a quantized model computes for one prompt, kept in its file, so that any reader can be checked.

Kept are the prompt's ids, a fingerprint of the hidden state after each layer and some logits, all of the last token,
and two distances of each layer: from the model before quantization, and from the same weights computed in fp32, which
is what other roundings may do. Allowed is a quarter of the one or four times the other, whichever is more: a reader
that takes a zero, a scale or an order of values for another is further off, be it in one layer alone, and the first
such layer is named (tests/model/test_canary.py).

The fingerprint is FINGERPRINT sums of a hidden state's elements with signs that look random, over the root of their
number: the squared length of a difference is kept on average (Johnson-Lindenstrauss), and none of it is out of sight.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from llama_fast.errors import CheckpointFormatError, brief
from llama_fast.model.llama import DecoderLayer, LlamaLM
from llama_fast.model.sequences import Sequences
from llama_fast.ops import reference

# Of a safetensors file's metadata.
KEY = "llama_fast.canary"
FINGERPRINT = 64
_LOGITS = 64
# Of the distance from the model before quantization, and from the one in fp32.
_OF_ERROR, _OF_NOISE = 0.25, 4.0
# A replay must end soon, whatever a file says.
_MOST_TOKENS, _MOST_LOGITS = 256, 1024


@dataclass(frozen=True)
class Canary:
    """What a file keeps.

    Attributes:
        token_ids: the prompt.
        layers: of each layer a fingerprint, FINGERPRINT floats.
        errors: of each layer the distance from the model before quantization, relative to that one's length; None
            where it was not at hand.
        noise: of each layer the distance from the same weights in fp32; of the logits in the end.
        vocab_ids, logits: some of the last token's logits, the largest among them.
    """

    token_ids: list[int]
    layers: list[list[float]]
    errors: list[float] | None
    noise: list[float]
    vocab_ids: list[int]
    logits: list[float]

    def to_json(self) -> str:
        return json.dumps({"version": 1, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, where: str) -> Canary:
        """Read what `to_json` wrote.

        Raises:
            CheckpointFormatError: it is something else.
        """
        try:
            content = json.loads(text)
            if content.pop("version") != 1:
                raise ValueError("of another version")
            canary = cls(**content)
            if len(canary.token_ids) > _MOST_TOKENS or len(canary.vocab_ids) > _MOST_LOGITS:
                raise ValueError("it is too long")
            distances = [*(canary.errors or []), *canary.noise]
            if not all(0 <= distance < math.inf for distance in distances) or not canary.vocab_ids:
                raise ValueError("its distances are none")
            numbers = [*canary.logits, *distances, *(value for layer in canary.layers for value in layer)]
            ids = [*canary.token_ids, *canary.vocab_ids]
            if not all(type(number) is float for number in numbers) or not all(type(token) is int for token in ids):
                raise ValueError("its numbers are none")
            if not canary.token_ids or any(len(layer) != FINGERPRINT for layer in canary.layers):
                raise ValueError("it is not whole")
            count = len(canary.layers)
            if len(canary.vocab_ids) != len(canary.logits) or len(canary.errors or canary.layers) != count:
                raise ValueError("its parts do not fit")
            if len(canary.noise) != count + 1:
                raise ValueError("its parts do not fit")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointFormatError(f"{where}: the canary cannot be read: {brief(str(error))}") from error
        return canary


@dataclass(frozen=True)
class CanaryResult:
    """What a model made of a canary.

    Attributes:
        deviations: of each layer, relative to the length of what was kept.
        allowed: what each may be.
        logits_deviation: likewise, of the logits.
        problem: the first layer that disagrees; empty if none does.
    """

    deviations: list[float]
    allowed: list[float]
    logits_deviation: float
    problem: str


@torch.no_grad()
def make_canary(model: LlamaLM, ops: ModuleType, token_ids: Sequence[int], original: LlamaLM | None = None) -> Canary:
    """Note what `model` computes.

    Args:
        model, original: with weights prepared for `ops`; `original` is the model before quantization, if at hand.
        token_ids: the prompt, at least one.
    """
    hidden_states = [state[-1:] for state in Sequences(model, ops, [token_ids]).hidden_states()]
    errors = None
    if original is not None:
        others = [state[-1:] for state in Sequences(original, ops, [token_ids]).hidden_states()]
        errors = [
            _distance(state.flatten(), other.flatten()) for state, other in zip(hidden_states, others, strict=True)
        ]
    logits = model.logits(hidden_states[-1], ops)[0].float()
    spread = torch.arange(0, logits.shape[0], max(1, logits.shape[0] // (_LOGITS // 2)), device=logits.device)
    top = logits.topk(min(_LOGITS // 2, logits.shape[0])).indices
    places = torch.cat([top, spread]).unique()
    fingerprints = [fingerprint(state).tolist() for state in hidden_states]
    wide = _in_fp32(model, token_ids)
    noise = [_distance(state, other) for state, other in zip([*hidden_states, logits], wide, strict=True)]
    return Canary(list(token_ids), fingerprints, errors, noise, places.tolist(), logits[places].double().tolist())


def _in_fp32(model: LlamaLM, token_ids: Sequence[int]) -> list[Tensor]:
    """The last token's hidden state after each layer, then its logits, of the same weights in fp32.

    One layer at a time is copied for it.
    """
    ops = reference
    sequences = Sequences(model, ops, [token_ids], dtype=torch.float32)
    hidden_states, found = sequences.embedded().float(), []
    for layer in model.model.layers:
        wide = copy.deepcopy(cast(DecoderLayer, layer)).float()
        wide.prepare(ops)
        hidden_states = sequences.layer(wide, hidden_states)
        found.append(hidden_states[-1:])
    norm, head = copy.deepcopy(model.model.norm).float(), copy.deepcopy(model.lm_head).float()
    found.append(ops.norm_lm_head(found[-1], norm.prepare(), ops.prepare_linear([head]))[0])
    return found


@torch.no_grad()
def replay(canary: Canary, model: LlamaLM, ops: ModuleType, where: str) -> CanaryResult:
    """Compute the canary's prompt anew and compare.

    Args:
        model: with weights prepared for `ops`.
        where: the file, for messages.

    Raises:
        CheckpointFormatError: the canary is another model's: layers or ids do not fit.
    """
    vocab_size, num_layers = model.config.vocab_size, len(model.model.layers)
    ids = [*canary.token_ids, *canary.vocab_ids]
    if len(canary.layers) != num_layers or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise CheckpointFormatError(f"{where}: the canary is of another model: its layers or token ids do not fit")
    states = [state[-1:] for state in Sequences(model, ops, [canary.token_ids]).hidden_states()]
    deviations = [
        _distance(fingerprint(state), torch.tensor(kept, dtype=torch.float64))
        for state, kept in zip(states, canary.layers, strict=True)
    ]
    logits = model.logits(states[-1], ops)[0][canary.vocab_ids].double().cpu()
    logits_deviation = _distance(logits, torch.tensor(canary.logits, dtype=torch.float64))
    errors = canary.errors or [0.0] * num_layers
    allowed = [max(_OF_ERROR * error, _OF_NOISE * noise) for error, noise in zip(errors, canary.noise, strict=False)]
    problem = ""
    for index, (deviation, most) in enumerate(zip(deviations, allowed, strict=True)):
        if not deviation <= most:  # NaN is wrong too
            problem = f"layer {index} disagrees: it is off by {deviation:.3g} of its length, and {most:.3g} is allowed"
            break
    if not problem and not logits_deviation <= max(_OF_ERROR * errors[-1], _OF_NOISE * canary.noise[-1]):
        problem = f"the layers agree, but the logits are off by {logits_deviation:.3g} of their length"
    return CanaryResult(deviations, allowed, logits_deviation, problem)


def fingerprint(hidden_state: Tensor) -> Tensor:
    """fp64 [FINGERPRINT] on the CPU, of all elements of a tensor."""
    values = hidden_state.detach().double().cpu().flatten()
    # A multiplicative hash of the element's place and the sum's; no generator of another version draws it otherwise.
    mixed = (
        torch.arange(values.numel())[None] * 2654435761 + torch.arange(FINGERPRINT)[:, None] * 2246822519 + 374761393
    )
    for _ in range(2):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 739198319 & 0xFFFFFFFF
    signs = (mixed >> 16 & 1) * 2 - 1
    return signs.double() @ values / FINGERPRINT**0.5


def _distance(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))

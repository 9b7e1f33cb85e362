"""How far a model's predictions are from another's on the same text, as for a quantized one and its original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from llama_fast.model.llama import LlamaLM
from llama_fast.model.progress import ProgressBar
from llama_fast.model.sequences import Sequences

# Tokens that run at a time, and rows of logits that are compared at a time: a large vocabulary's are 0.5 MB each.
_BATCH_TOKENS, _ROWS = 1024, 64


@dataclass(frozen=True)
class Divergence:
    """Of a model from another on a text.

    Attributes:
        perplexity: the model's, exp of the mean negative log-likelihood of each token but the windows' first ones.
        kl: mean Kullback-Leibler divergence of its prediction from the other's, in nats a token.
        same_top: share of tokens whose most probable successor is the same.
        num_tokens: that were predicted.
    """

    perplexity: float
    kl: float
    same_top: float
    num_tokens: int


@torch.no_grad()
def divergences(
    original: tuple[LlamaLM, ModuleType],
    models: Sequence[tuple[LlamaLM, ModuleType]],
    windows: Sequence[Sequence[int]],
    *,
    show_progress: bool | None = False,
) -> list[Divergence]:
    """Compare models with `original`; the original itself may be among them.

    Args:
        original, models: each with the backend that its weights are prepared for.
        windows: token ids of pieces of the text, two at least in each.
        show_progress: a bar on stderr; None shows it on a terminal.
    """
    count = sum(len(window) - 1 for window in windows)
    sums = torch.zeros(len(models), 3, dtype=torch.float64)
    every = [original, *models]
    disable = None if show_progress is None else not show_progress
    with ProgressBar(total=count, desc="comparing", unit="token", disable=disable) as bar:
        for group in _groups(windows):
            targets, predicts = _targets(group)
            states = [Sequences(model, ops, group).last()[predicts.to(model.device)] for model, ops in every]
            for start in range(0, len(targets), _ROWS):
                part = slice(start, start + _ROWS)
                expected, *found = (
                    model.logits(state[part], ops).float().log_softmax(-1)
                    for state, (model, ops) in zip(states, every, strict=True)
                )
                for index, got in enumerate(found):
                    nll = -got.gather(1, targets[part, None].to(got.device)).double().sum()
                    kl = (expected.exp() * (expected - got)).double().sum()
                    same = (expected.argmax(-1) == got.argmax(-1)).double().sum()
                    sums[index] += torch.stack([nll, kl, same]).cpu()
            bar.update(len(targets))
    means = (sums / count).tolist()
    return [Divergence(float(torch.tensor(nll).exp()), kl, same, count) for nll, kl, same in means]


def _groups(windows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    groups: list[list[Sequence[int]]] = [[]]
    tokens = 0
    for window in windows:
        if groups[-1] and tokens + len(window) > _BATCH_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(window)
        tokens += len(window)
    return groups


def _targets(windows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """What is to be predicted, and which of the packed tokens predict."""
    targets = torch.tensor([token for window in windows for token in window[1:]])
    predicts = torch.cat([torch.arange(len(window)) < len(window) - 1 for window in windows])
    return targets, predicts


def windows_of(token_ids: Sequence[int], length: int, bos: Sequence[int] = ()) -> list[list[int]]:
    """`token_ids` cut into windows of `length` tokens, `bos` before each; a last one of a single token is left out."""
    step = length - len(bos)
    cut = [[*bos, *token_ids[start : start + step]] for start in range(0, len(token_ids), step)]
    return [window for window in cut if len(window) > 1]

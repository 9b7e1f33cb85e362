"""The ideal schedule of a mix of requests: the least time in which measured steps could do its work.

A step of kind k decodes b_k sequences beside p_k prompt tokens and was measured to take t_k seconds. A request's first
token comes out of its prompt, so a mix of requests has P = sum(prompt_len) prompt tokens and D = sum(output_len - 1)
decoded ones, and its longest output takes L = max(output_len) steps, one after the other. With n_k steps of kind k
(fractions of steps too) the ideal schedule takes

    min sum(n_k t_k)   where   sum(n_k b_k) = D,   sum(n_k p_k) = P,   sum(n_k) >= L,   n_k >= 0

over the full steps: all places decode, or all but one, whose prompt runs beside them in the chunk that is the cheapest
(a backend that runs prompts apart: alone). Smaller steps are allowed only where full ones are less than L, as the
lengths force it then. Nothing else is in it: no scheduling, no place that falls empty, no prompt that waits for a place
or comes in a smaller chunk than it could.

It is a linear programme with three conditions, so that some three kinds of steps (one may be the slack of L) are
enough for its minimum: all triples are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kind:
    """A step that decodes `rows` sequences beside `prompt_tokens` of others, and how long it takes."""

    rows: int
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class Ideal:
    """The ideal schedule: how long it takes, and how many steps of which kinds it has."""

    seconds: float
    steps: tuple[tuple[Kind, float], ...]

    @property
    def num_steps(self) -> float:
        return sum(count for _, count in self.steps)


def ideal_schedule(
    kinds: Sequence[Kind], places: int, prompt_tokens: int, decoded_tokens: int, longest_output: int
) -> Ideal:
    """Of the steps measured, the cheapest that do this work.

    Args:
        places: sequences at once.
        longest_output: tokens of the longest output, the first one included.

    Raises:
        ValueError: these steps cannot do it, as when none has prompt tokens.
    """
    work = (decoded_tokens, prompt_tokens, longest_output)
    beside = [kind for kind in kinds if kind.prompt_tokens and kind.rows == places - 1]
    alone = [kind for kind in kinds if kind.prompt_tokens and not kind.rows]
    decoding = [kind for kind in kinds if not kind.prompt_tokens and kind.rows <= places]
    full = [kind for kind in decoding if kind.rows == places]
    ideal = _cheapest(full + (beside or alone), work) or _cheapest(decoding + (beside or alone), work)
    if ideal is None:
        raise ValueError(f"no steps of {list(kinds)} run {prompt_tokens} prompt and {decoded_tokens} other tokens")
    return ideal


def _cheapest(kinds: Sequence[Kind], work: tuple[int, int, int]) -> Ideal | None:
    """The minimum above; None: these kinds cannot do the work."""
    # The last column is the slack of L.
    columns = np.array([(kind.rows, kind.prompt_tokens, 1) for kind in kinds] + [(0, 0, -1)], dtype=np.float64)
    costs = np.array([kind.seconds for kind in kinds] + [0.0])
    triples = np.array(list(itertools.combinations(range(len(columns)), 3)), dtype=np.int64).reshape(-1, 3)
    matrices = columns[triples].transpose(0, 2, 1)  # [triples, conditions, kinds of a triple]
    # Dependent ones say nothing that others do not.
    solvable = np.abs(np.linalg.det(matrices)) > 1e-6
    triples, matrices = triples[solvable], matrices[solvable]
    wanted = np.broadcast_to(np.array(work, dtype=np.float64), (len(matrices), 3))
    counts = np.linalg.solve(matrices, wanted[..., None])[..., 0]
    possible = (counts >= -1e-9).all(axis=1)
    if not possible.any():
        return None
    seconds = np.where(possible, (counts * costs[triples]).sum(axis=1), np.inf)
    best = int(seconds.argmin())
    taken = zip(triples[best].tolist(), counts[best].tolist(), strict=True)
    steps = tuple((kinds[index], count) for index, count in taken if index < len(kinds) and count > 1e-9)
    return Ideal(float(seconds[best]), steps)

"""Packed tokens: what one run of the graph works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_fast.model.rope import RotaryEmbedding
from llama_fast.ops.transfers import to_device


@dataclass(frozen=True)
class Batch:
    """Tokens of several sequences, one after the other, and where each stands.

    Attributes:
        ops: the backend that runs the graph.
        token_ids: int64 [num_tokens].
        slots: int64 [num_tokens], a token's place in its sequence's cache; it sees the slots up to its own.
        seq_ids: int64 [num_tokens], row of `page_table`, `seq_lens` and `query_starts`.
        query_starts: int64 [num_seqs + 1], cumulative number of tokens (cu_seqlens).
        seq_lens: int64 [num_seqs], filled slots once this batch has run.
        page_table: int64 [num_seqs, max_pages], a sequence's pages in slot order; unused entries are 0.
        cos, sin: fp32 [num_tokens, rotary_dim], each token's own rotation.
        split_size: slots whose softmax is summed together.
        generated: whether the tokens are generated ones, one a sequence, rather than prompt. A backend may take another
            route for each role, but a token's route depends on nothing else.
        kept: what the backend keeps from layer to layer.
    """

    ops: ModuleType
    token_ids: Tensor
    slots: Tensor
    seq_ids: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    page_table: Tensor
    cos: Tensor
    sin: Tensor
    split_size: int
    generated: bool = False
    kept: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def pages_of_slots(self, page_size: int) -> tuple[Tensor, Tensor]:
        """Each token's page and the offset in it: int64 [num_tokens] each."""
        return self.page_table[self.seq_ids, self.slots // page_size], self.slots % page_size


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence.

    Attributes:
        token_ids: the new tokens.
        start: slot and position of the first one.
        rope_len: the length that rotates them (see RotaryEmbedding); None: each token's position + 1.
        pages: the sequence's pages in slot order, at least up to the last new token.
    """

    token_ids: Sequence[int]
    start: int
    rope_len: int | None
    pages: Sequence[int]


def pack(
    ops: ModuleType,
    rotary: RotaryEmbedding,
    chunks: Sequence[Chunk],
    split_size: int,
    device: torch.device,
    *,
    generated: bool = False,
) -> Batch:
    """Pack chunks of unpadded sequences (slot = position) into a batch on `device`."""
    token_ids: list[int] = []
    slots: list[int] = []
    seq_ids: list[int] = []
    rope_lens: list[int] = []
    query_starts = [0]
    for index, chunk in enumerate(chunks):
        count = len(chunk.token_ids)
        token_ids += chunk.token_ids
        slots += range(chunk.start, chunk.start + count)
        seq_ids += [index] * count
        rope_lens += (
            range(chunk.start + 1, chunk.start + count + 1) if chunk.rope_len is None else [chunk.rope_len] * count
        )
        query_starts.append(query_starts[-1] + count)
    width = max((len(chunk.pages) for chunk in chunks), default=0)
    seq_lens = [chunk.start + len(chunk.token_ids) for chunk in chunks]
    table: list[int] = []
    for chunk in chunks:
        table += [*chunk.pages, *[0] * (width - len(chunk.pages))]
    # One tensor for all of them: a copy to the device each would take longer than a small model's step.
    fields = (token_ids, slots, seq_ids, rope_lens, query_starts, seq_lens, table)
    # Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for a pointer that does not.
    padded = [number for values in fields for number in (*values, *[0] * (len(values) % 2))]
    joined = to_device(padded, torch.int64, device)
    parts = joined.split([len(values) + len(values) % 2 for values in fields])
    tensors = [part[: len(values)] for part, values in zip(parts, fields, strict=True)]
    cos, sin = rotary(tensors[1], tensors[3], max(seq_lens, default=0))
    return Batch(
        ops=ops,
        token_ids=tensors[0],
        slots=tensors[1],
        seq_ids=tensors[2],
        query_starts=tensors[4],
        seq_lens=tensors[5],
        page_table=tensors[6].view(len(chunks), width),
        cos=cos,
        sin=sin,
        split_size=split_size,
        generated=generated,
    )

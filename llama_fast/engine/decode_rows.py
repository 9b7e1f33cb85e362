"""The state of every sequence that decodes, in buffers that stay where they are: what a captured step reads, writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from llama_fast.engine.request import Sample
from llama_fast.ops.reference_sample import SamplingBatch
from llama_fast.ops.transfers import to_device

# Fields begin at multiples of 16 bytes, which kernels count on.
_ROW_MULTIPLE = 16
_WIDE = ("token_ids", "slots", "seq_lens", "limits", "done", "seeds")
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_NARROW = ("top_k", "sample_index")


class DecodeRows:
    """One row a sequence. Rows without one are at rest: they run with the others and count for nothing.

    Attributes ([capacity] and int64 where nothing else is said; capacity is `num_rows` or a little more):
        token_ids: the token that the next step runs.
        slots: its place in its sequence; 0 at rest.
        seq_lens: slots + 1, what attention sees; also the position of the token that is drawn next.
        limits: the sequence ends when it has this many tokens.
        done: 1 for a row at rest.
        seeds, temperature, ...: parameters of sampling, as in SamplingBatch.
        every: 0, 1, 2, ... capacity.
        page_table: [capacity, max_pages]; a row at rest writes into `spare_page`, which no sequence has.
        stop_mask: bool [capacity, vocab_size], the tokens that end a sequence.
        prompt_mask, output_counts, bias: [capacity, vocab_size], as in SamplingBatch. They are read only in steps where
            some row needs them; what they hold for a row whose penalties are neutral does not matter.
        kept: what a backend keeps about the buffers.
    """

    kept: dict[str, Any]
    token_ids: Tensor
    slots: Tensor
    seq_lens: Tensor
    limits: Tensor
    done: Tensor
    seeds: Tensor

    def __init__(self, num_rows: int, max_pages: int, vocab_size: int, spare_page: int, device: torch.device) -> None:
        self.spare_page = spare_page
        self.kept = {}
        capacity = -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._wide = zeros(torch.int64, len(_WIDE), capacity)
        self._floats = zeros(torch.float32, len(_FLOATS), capacity)
        self._narrow = zeros(torch.int32, len(_NARROW), capacity)
        self.page_table = zeros(torch.int64, capacity, max_pages)
        self.stop_mask = zeros(torch.bool, capacity, vocab_size)
        self.prompt_mask = zeros(torch.bool, capacity, vocab_size)
        self.output_counts = zeros(torch.int32, capacity, vocab_size)
        self.bias = zeros(torch.float32, capacity, vocab_size)
        resting = {"seq_lens": 1, "limits": 1, "done": 1}
        # As sequence ids and, one longer, as query starts: a row runs one token.
        self.every = torch.arange(capacity + 1, device=device)
        self._at_rest = torch.tensor([resting.get(name, 0) for name in _WIDE], device=device)
        for name, buffer in zip(_WIDE, self._wide, strict=True):
            setattr(self, name, buffer)
        # What a row's stop mask was made of (None: not known), as the next sequence often has the same; and whether its
        # bias may be other than 0. Set to the worst before a table is written: an interrupt may come in between.
        self._stops: list[frozenset[int] | None] = [frozenset()] * capacity
        self._biased = [False] * capacity
        self.rest_all()

    def sampling(self, num_rows: int, with_tables: bool) -> SamplingBatch:
        """Parameters of the first rows: views, good for every later step."""
        fields = dict(zip((*_FLOATS, *_NARROW), (*self._floats, *self._narrow), strict=True))
        fields |= {"seeds": self.seeds, "position": self.seq_lens}
        if with_tables:
            fields |= {"prompt_mask": self.prompt_mask, "output_counts": self.output_counts, "bias": self.bias}
        return SamplingBatch(**{name: field[:num_rows] for name, field in fields.items()})

    def sampling_of(self, rows: Tensor, with_tables: bool) -> SamplingBatch:
        """Parameters of some rows as they are now; `rows` int64."""
        every = vars(self.sampling(len(self.done), with_tables))
        return SamplingBatch(**{name: field[rows] for name, field in every.items() if field is not None})

    def join(self, rows: Sequence[int], samples: Sequence[Sample]) -> None:
        """Samples take rows at rest; all their tokens but the last are in the cache.

        Nothing of a row is read before: it may be at rest in steps that the device has yet to run.
        """
        device = self.done.device
        index = to_device(rows, torch.int64, device)
        wide, floats, narrow, pages = [], [], [], []
        for sample in samples:
            sampling, sequence = sample.request.sampling, sample.sequence
            length = len(sequence.token_ids)
            # The bit pattern of an unsigned 64-bit seed.
            seed = sampling.seed - (1 << 64) if sampling.seed >> 63 else sampling.seed
            wide.append([sequence.token_ids[-1], length - 1, length, sequence.max_len, 0, seed])
            floats.append([getattr(sampling, name) for name in _FLOATS])
            narrow.append([sampling.top_k, sample.index])
            pages.append([*sequence.pages, *[0] * (self.page_table.shape[1] - len(sequence.pages))])
        for buffer, values in ((self._wide, wide), (self._floats, floats), (self._narrow, narrow)):
            buffer[:, index] = to_device(values, buffer.dtype, device).T
        self.page_table[index] = to_device(pages, torch.int64, device)
        for row, sample in zip(rows, samples, strict=True):
            self._fill_tables(row, sample)

    def _fill_tables(self, row: int, sample: Sample) -> None:
        sampling = sample.request.sampling
        if self._stops[row] != sampling.stop_token_ids:
            self._stops[row] = None
            _set(self.stop_mask[row], sampling.stop_token_ids, [True])
            self._stops[row] = sampling.stop_token_ids
        if sampling.penalizes:
            _set(self.prompt_mask[row], sample.request.prompt_token_ids, [True])
            counts = Counter(sample.token_ids)
            _set(self.output_counts[row], list(counts), list(counts.values()))
        self._fill_bias(row, sample, may_stop=sample.may_stop)

    def _fill_bias(self, row: int, sample: Sample, may_stop: bool) -> None:
        sampling = sample.request.sampling
        bias = dict(sampling.logit_bias)
        if not may_stop:
            bias |= dict.fromkeys(sampling.stop_token_ids, float("-inf"))
        if bias or self._biased[row]:
            self._biased[row] = True
            _set(self.bias[row], list(bias), list(bias.values()))
        self._biased[row] = bool(bias)

    def add_pages(self, row: int, start: int, pages: Sequence[int]) -> None:
        """A row's sequence has further pages, from place `start` on."""
        self.page_table[row, start : start + len(pages)] = to_device(pages, torch.int64, self.done.device)

    def allow_stops(self, row: int, sample: Sample) -> None:
        """The row has `min_tokens`: from the next step on its stop tokens may be drawn."""
        self._fill_bias(row, sample, may_stop=True)

    def guess(
        self, rows: Sequence[int], targets: Sequence[int], token_ids: Sequence[int], ahead: Sequence[int]
    ) -> None:
        """Rows at rest run guessed tokens of sequences that have rows; no penalties or bias.

        Args:
            rows, targets: of the sequence, and for the guessed token.
            token_ids, ahead: the token, and how many places behind the one that the sequence's row runs next.
        """
        device = self.done.device
        for row in targets:
            self._stops[row] = None
        source, target, ids, places = to_device([rows, targets, token_ids, ahead], torch.int64, device)
        for buffer in (self._wide, self._floats, self._narrow):
            buffer[:, target] = buffer[:, source]
        for table in (self.page_table, self.stop_mask):
            table[target] = table[source]
        self.token_ids[target] = ids
        self.slots[target] += places
        self.seq_lens[target] += places
        for row, other in zip(targets, rows, strict=True):
            self._stops[row] = self._stops[other]
            if self._biased[row]:
                _set(self.bias[row], (), ())
                self._biased[row] = False

    def go_on(self, rows: Sequence[int], token_ids: Sequence[int], places: Sequence[int]) -> None:
        """Rows run these tokens next, so many places behind the one that they would have run."""
        index, ids, more = to_device([rows, token_ids, places], torch.int64, self.done.device)
        self.token_ids[index] = ids
        self.slots[index] += more
        self.seq_lens[index] += more

    def rest(self, *rows: int) -> None:
        """Put rows to rest."""
        for row in rows:
            self._wide[:, row] = self._at_rest
            # Not by assignment: PyTorch would copy the number from the host, and wait for the device.
            self.page_table[row, 0].fill_(self.spare_page)

    def rest_all(self) -> None:
        """Put every row to rest."""
        self._wide.copy_(self._at_rest[:, None])
        self.page_table[:, 0].fill_(self.spare_page)
        # What rests draws greedily: no filter, no noise.
        self._floats.zero_()

    def move(self, source: int, target: int) -> None:
        """Give a row's sequence another row, which is at rest; the source rests then."""
        self._stops[target], self._biased[target] = None, True
        for buffer in (self._wide, self._floats, self._narrow):
            buffer[:, target] = buffer[:, source]
        self.page_table[target] = self.page_table[source]
        for table in (self.stop_mask, self.prompt_mask, self.output_counts, self.bias):
            table[target] = table[source]
        self._stops[target], self._biased[target] = self._stops[source], self._biased[source]
        self.rest(source)


def _set(row: Tensor, ids: Collection[int], values: Sequence[float]) -> None:
    """`row` [vocab_size] with values at some ids and 0 elsewhere."""
    row.zero_()
    if ids:
        index = to_device(list(ids), torch.int64, row.device)
        row[index] = to_device(values, row.dtype, row.device)

"""The samples of a step as the tensors that the backend's sampler reads."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import Tensor

from llama_fast.engine.request import Sample
from llama_fast.ops.reference_sample import SamplingBatch


class SamplingTensors:
    """Makes a step's SamplingBatch; what does not change from step to step is made once for the same samples."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._samples: list[Sample] = []
        self._lengths: list[int] = []
        self._penalized = False
        self._batch: SamplingBatch | None = None

    def batch(self, samples: list[Sample]) -> SamplingBatch:
        """One row a sample, for the token it draws next; optional tables only where some sample needs them."""
        lengths = [len(sample.sequence.token_ids) for sample in samples]
        if (
            self._batch is not None
            and lengths == [length + 1 for length in self._lengths]
            and all(map(operator.is_, samples, self._samples))
        ):
            self._batch.position.add_(1)
        else:
            self._batch, self._samples = self._make(samples, lengths), list(samples)
        self._lengths = lengths
        return self._with_tables(self._batch, samples)

    def _with_tables(self, batch: SamplingBatch, samples: list[Sample]) -> SamplingBatch:
        prompt_mask = output_counts = bias = None
        if self._penalized:
            counts = [sample.token_counts(self._vocab_size, self._device) for sample in samples]
            prompt_mask = _stacked([in_prompt for in_prompt, _ in counts])
            output_counts = _stacked([generated for _, generated in counts])
        biases = [sample.bias(self._vocab_size, self._device) for sample in samples]
        if any(row is not None for row in biases):
            neutral = torch.zeros(self._vocab_size, dtype=torch.float32, device=self._device)
            bias = torch.stack([neutral if row is None else row for row in biases])
        if prompt_mask is None and bias is None:
            return batch
        return replace(batch, prompt_mask=prompt_mask, output_counts=output_counts, bias=bias)

    def _make(self, samples: list[Sample], lengths: list[int]) -> SamplingBatch:
        sampling = [sample.request.sampling for sample in samples]
        self._penalized = any(
            p.repetition_penalty != 1.0 or p.frequency_penalty or p.presence_penalty for p in sampling
        )
        return SamplingBatch(
            temperature=self._tensor([p.temperature for p in sampling], torch.float32),
            top_k=self._tensor([p.top_k for p in sampling], torch.int32),
            top_p=self._tensor([p.top_p for p in sampling], torch.float32),
            min_p=self._tensor([p.min_p for p in sampling], torch.float32),
            repetition_penalty=self._tensor([p.repetition_penalty for p in sampling], torch.float32),
            frequency_penalty=self._tensor([p.frequency_penalty for p in sampling], torch.float32),
            presence_penalty=self._tensor([p.presence_penalty for p in sampling], torch.float32),
            # The bit pattern of an unsigned 64-bit seed.
            seeds=self._tensor([p.seed - (1 << 64) if p.seed >> 63 else p.seed for p in sampling], torch.int64),
            sample_index=self._tensor([sample.index for sample in samples], torch.int32),
            position=self._tensor(lengths, torch.int64),
        )

    def _tensor(self, values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _stacked(rows: list[Tensor]) -> Tensor:
    """[B, vocab_size]; a single row is not copied."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)

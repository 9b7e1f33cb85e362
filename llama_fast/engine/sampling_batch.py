"""The samples of a step as the tensors that the backend's sampler reads."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_fast.engine.request import Sample
from llama_fast.ops.reference_sample import SamplingBatch


def sampling_batch(samples: list[Sample], vocab_size: int, device: torch.device) -> SamplingBatch:
    """One row a sample, for the token it draws next; optional tables only where some sample needs them."""
    sampling = [sample.request.sampling for sample in samples]

    def tensor(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    prompt_mask = output_counts = bias = None
    if any(p.repetition_penalty != 1.0 or p.frequency_penalty or p.presence_penalty for p in sampling):
        counts = [sample.token_counts(vocab_size, device) for sample in samples]
        prompt_mask = torch.stack([in_prompt for in_prompt, _ in counts])
        output_counts = torch.stack([generated for _, generated in counts])
    biases = [sample.bias(vocab_size, device) for sample in samples]
    if any(row is not None for row in biases):
        neutral = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        bias = torch.stack([neutral if row is None else row for row in biases])
    return SamplingBatch(
        temperature=tensor([p.temperature for p in sampling], torch.float32),
        top_k=tensor([p.top_k for p in sampling], torch.int32),
        top_p=tensor([p.top_p for p in sampling], torch.float32),
        min_p=tensor([p.min_p for p in sampling], torch.float32),
        repetition_penalty=tensor([p.repetition_penalty for p in sampling], torch.float32),
        frequency_penalty=tensor([p.frequency_penalty for p in sampling], torch.float32),
        presence_penalty=tensor([p.presence_penalty for p in sampling], torch.float32),
        # The bit pattern of an unsigned 64-bit seed.
        seeds=tensor([p.seed - (1 << 64) if p.seed >> 63 else p.seed for p in sampling], torch.int64),
        sample_index=tensor([sample.index for sample in samples], torch.int32),
        position=tensor([len(sample.sequence.token_ids) for sample in samples], torch.int64),
        prompt_mask=prompt_mask,
        output_counts=output_counts,
        bias=bias,
    )

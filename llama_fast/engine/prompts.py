"""Runs of the graph over chunks of prompts, and the log probabilities of prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from llama_fast.engine.outputs import Logprob, PositionLogprobs
from llama_fast.engine.request import Request
from llama_fast.engine.scheduler import Work
from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops.transfers import to_device

# Prompt positions whose logits are in memory at once while prompts are scored.
SCORED_ROWS = 64


def run_works(works: Sequence[Work], model: LlamaLM, ops: ModuleType, cache: PagedKVCache) -> Sequence[Tensor]:
    """Run all works in one pass; each one's hidden states [tokens, hidden_size]."""
    chunks = [
        Chunk(
            token_ids=work.sequence.token_ids[work.start : work.end],
            start=work.start,
            rope_len=work.sequence.prompt_len if work.start < work.sequence.prompt_len else None,
            pages=work.sequence.pages,
        )
        for work in works
    ]
    batch = pack(ops, model.model.rotary, chunks, cache.split_size, model.device)
    return model.model.run(batch, cache).split([work.end - work.start for work in works])


def score_prompt(request: Request, work: Work, hidden_states: Tensor, model: LlamaLM, ops: ModuleType) -> None:
    """Log probabilities of the prompt tokens that a work's positions predict, if they were asked for."""
    if request.prompt_logprobs is None:
        return
    sequence, num_top = work.sequence, request.sampling.prompt_logprobs or 0
    # The work may have been scored before, and have failed after that.
    del request.prompt_logprobs[work.start + 1 :]
    # The last prompt token predicts no prompt token.
    for start in range(work.start, min(work.end, sequence.prompt_len - 1), SCORED_ROWS):
        end = min(start + SCORED_ROWS, work.end, sequence.prompt_len - 1)
        logits = model.logits(hidden_states[start - work.start : end - work.start], ops)
        targets = to_device(sequence.token_ids[start + 1 : end + 1], torch.int64, logits.device)
        scores = zip(*(tensor.tolist() for tensor in ops.log_probs(logits, targets, num_top)), strict=True)
        for token_id, scored in zip(targets.tolist(), scores, strict=True):
            request.prompt_logprobs.append(position_logprobs(token_id, scored, num_top))


def pool_states(request: Request, work: Work, hidden_states: Tensor, model: LlamaLM, ops: ModuleType) -> None:
    """Keep what the request's pooling wants of a work's hidden states [tokens, hidden_size]; pool behind the last."""
    if request.pooling == "last":
        hidden_states = hidden_states[-1:] if work.samples else hidden_states[:0]
    elif request.pooling == "first":
        hidden_states = hidden_states[:1] if work.start == 0 else hidden_states[:0]
    if len(hidden_states):
        norm = model.prepared_norm
        request.states[work.start] = ops.rms_norm(hidden_states, norm.weight, norm.eps).float().cpu()
    if work.samples:
        # Added up all at once, so that the sum does not depend on the chunks.
        states = torch.cat([request.states[start] for start in sorted(request.states)])
        request.pooled = states if request.pooling == "all" else states.mean(0)


def position_logprobs(
    token_id: int, scored: tuple[float, int, list[float], list[int]], num_top: int
) -> PositionLogprobs:
    """The token, then the `num_top` most probable ones in order.

    Args:
        scored: a row of ops.log_probs: log probability, rank, and at least `num_top` top values and ids.
    """
    logprob, rank, top_values, top_ids = scored
    position = {token_id: Logprob(logprob, rank)}
    for place, (top_id, value) in enumerate(zip(top_ids[:num_top], top_values, strict=False), start=1):
        position.setdefault(top_id, Logprob(value, place))
    return position

"""What a backend compiles, compiled before the first request comes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch

from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.prompts import SCORED_ROWS
from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM

# Up to here PyTorch takes memory of a GPU from other segments than above.
_SMALL_BYTES = 2**20


def warm_up(model: LlamaLM, ops: ModuleType, cache: PagedKVCache, graph: DecodeGraph, prefill_chunk: int) -> None:
    """Run all that makes kernels of its own: on the spare page of `cache`, with the rows of `graph` at rest.

    Args:
        graph: captured already, if it captures: its steps ran then.
        prefill_chunk: the most prompt tokens of a step.
    """
    counts = ops.warm_up_rows(model.linears(), prefill_chunk)
    if not counts:
        return
    if not graph.captures:
        most = graph.max_batch
        for size in {*ops.warm_up_rows(model.linears(), most), *(2**power for power in range(most.bit_length()))}:
            for full in (False, True):
                graph.step(size, full)()
    device, page_size, config = model.device, cache.page_size, model.config
    heads = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    widths = config.hidden_size, heads[0], sum(heads), config.intermediate_size
    counts = sorted({*counts, *_small_rows([model.dtype.itemsize * width for width in widths], prefill_chunk)})
    for num_tokens, num_seqs in _sizes(counts, graph.max_batch, prefill_chunk):
        lengths = [num_tokens - num_seqs + 1, *[1] * (num_seqs - 1)]
        chunks = [Chunk([0] * n, 0, n, [cache.spare_page] * -(-n // page_size)) for n in lengths]
        batch = pack(ops, model.model.rotary, chunks, cache.split_size, device)
        hidden_states = model.model.run(batch, cache)
    most = max(graph.max_batch, SCORED_ROWS)
    for count in {*ops.warm_up_rows([model.prepared_head], most), *_small_rows([4 * config.vocab_size], most)}:
        logits = model.logits(hidden_states[:1].repeat(count, 1), ops)
        drawn = min(count, graph.max_batch)
        index = torch.arange(drawn, device=device)
        # Samples that fork take copies of their prompt's logits, and those with log probabilities one more.
        forked = logits[index]
        for full in (False, True):
            # As Decoder.draw. Rows at rest stay so, whatever they are handed.
            tokens = ops.sample(forked, graph.rows.sampling_of(index, with_tables=full))
            ops.advance(tokens, index, graph.rows, full)
        for scored in (forked[index], logits):
            ops.log_probs(scored, torch.zeros(len(scored), dtype=torch.int64, device=device), 1)


def _small_rows(row_bytes: list[int], most: int) -> set[int]:
    """Numbers of rows, up to `most`, with which tensors of such rows are just small: where small ones need the most."""
    return {_SMALL_BYTES // size for size in row_bytes if 0 < _SMALL_BYTES // size <= most}


def _sizes(counts: list[int], max_batch: int, prefill_chunk: int) -> Iterator[tuple[int, int]]:
    """(tokens, sequences): every count of rows, and every power of two of sequences, which attention is compiled for.

    The largest last: its memory serves all prompts that follow.
    """
    num_seqs = 2
    while num_seqs <= min(max_batch, prefill_chunk):
        yield num_seqs, num_seqs
        num_seqs *= 2
    # Up to the next power of two.
    if num_seqs // 2 < min(max_batch, prefill_chunk):
        yield min(max_batch, prefill_chunk), min(max_batch, prefill_chunk)
    for count in counts:
        yield count, 1

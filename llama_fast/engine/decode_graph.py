"""The decoding step: one function over fixed buffers, captured on a GPU once for each size of batch.

Embedding, layers, LM head, sampling, and for each row: was this its last token, else what runs next. Nothing in it
depends on the host, so steps can be enqueued before the host has seen the tokens of the one before (decoder.py does).

    sizes    a captured step has a fixed number of rows, a bucket; all lengths go through one graph.
    kinds    a full step reads the tables of penalties and bias and keeps the logits; a plain one does neither. Rows
             that need neither have the same bits in both.

Where steps are not captured the same function is called, for every number of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from llama_fast.engine.decode_rows import DecodeRows
from llama_fast.errors import BackendError, OutOfMemoryError
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import replay
from llama_fast.ops.replay import Step

logger = logging.getLogger(__name__)


def bucket_sizes(max_batch: int) -> list[int]:
    """Numbers of rows that are captured: 1, 2, 4, 8, then every 8 (16 from 128, 32 from 256), and max_batch."""
    sizes, size = [], 1
    while size < max_batch:
        sizes.append(size)
        size += size if size < 8 else 8 if size < 128 else 16 if size < 256 else 32
    return [*sizes, max_batch]


class DecodeGraph:
    """The rows that decode and the steps that run them.

    Args:
        model, cache: what the steps run.
        ops: the backend.
        max_batch: rows.
        max_seq_len: tokens of a sequence, at most.
        graphs: whether steps are captured where they can be.

    Attributes:
        rows: what steps read and write.
        drawn: int64 [max_batch], what the last step gave the host (see ops.advance).
        logits: fp32 [max_batch, vocab_size] of the last full step.
        buckets: numbers of rows that have a step, ascending; fewer once `make_ready` found no memory for the largest.
        steps_ahead: steps worth enqueueing before the host waits for the first.
        num_steps: that have been enqueued.
    """

    def __init__(
        self,
        model: LlamaLM,
        cache: PagedKVCache,
        ops: ModuleType,
        max_batch: int,
        max_seq_len: int,
        *,
        graphs: bool = True,
    ) -> None:
        device, vocab_size = model.device, model.config.vocab_size
        self._model, self._cache, self._ops, self._max_seq_len = model, cache, ops, max_seq_len
        self._graphs = graphs
        self._maker = replay.step_maker(ops, device, graphs)
        self.steps_ahead = self._maker.ahead
        max_pages = -(-max_seq_len // cache.page_size)
        self.rows = DecodeRows(max_batch, max_pages, vocab_size, cache.spare_page, device)
        self._cos, self._sin = torch.zeros(2, max_batch, model.model.rotary.rotary_dim, device=device)
        self.drawn = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.logits = torch.empty(max_batch, vocab_size, dtype=torch.float32, device=device)
        self.buckets = bucket_sizes(max_batch) if self._maker.captures else list(range(1, max_batch + 1))
        self._steps: dict[tuple[int, bool], Step] = {}
        self.num_steps = 0

    @property
    def captures(self) -> bool:
        """Whether steps are captured, not called."""
        return self._maker.captures

    @property
    def max_batch(self) -> int:
        """Rows of the largest step."""
        return self.buckets[-1]

    def bucket(self, num_rows: int) -> int:
        """Rows of the smallest step that holds so many."""
        return next(size for size in self.buckets if size >= num_rows)

    def run(self, size: int, full: bool) -> None:
        """Enqueue the step of `size` rows, a bucket."""
        step = self._steps.get((size, full))
        if step is None:
            step = self._steps[size, full] = self._maker.make(self.step(size, full))
        step()
        self.num_steps += 1

    # --- steps --------------------------------------------------------------------------------------------------------

    def capture(self) -> None:
        """Capture every step anew, for weights that moved.

        Raises:
            OutOfMemoryError: not even the smallest graph fits.
            BackendError: the step does what no graph can, as a hidden_act of one's own may.
        """
        # With its last graph a pool of memory dies: new ones take a new pool.
        self._steps.clear()
        maker = self._new_maker()
        # The largest first: the others then fit into its memory.
        steps = {size: {full: self.step(size, full) for full in (True, False)} for size in reversed(self.buckets)}
        runnable = {size: kinds for size, kinds in steps.items() if self._made(maker.warm_up, kinds) is not None}
        maker.release()
        for size, kinds in runnable.items():
            made = self._made(maker.make, kinds)
            if made is not None:
                self._steps |= {(size, full): replayed for full, replayed in made.items()}
            elif not self._steps:
                maker = self._new_maker()
        captured = [size for size in self.buckets if (size, False) in self._steps]
        if not captured:
            raise OutOfMemoryError("no memory is left to capture a decoding step; lower cache_bytes")
        if captured[-1] < self.buckets[-1]:
            logger.warning(
                "memory is left to decode %d sequences at once, not %d; lower cache_bytes for more",
                captured[-1],
                self.buckets[-1],
            )
        self.buckets = captured

    def _new_maker(self) -> Any:
        self._maker = replay.step_maker(self._ops, self._model.device, self._graphs)
        return self._maker

    def _made(self, make: Callable[[Step], Any], kinds: dict[bool, Step]) -> dict[bool, Any] | None:
        """What `make` makes of the steps of one size; None if it finds no memory."""
        try:
            return {full: make(step) for full, step in kinds.items()}
        except Exception as error:
            if replay.is_out_of_memory(error):
                return None
            if replay.is_fatal(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise BackendError(f"a decoding step cannot be captured ({reason}); use graphs=False") from error

    def step(self, size: int, full: bool) -> Step:
        """The step function for the first `size` rows.

        It refers to all that it reads and writes, and not to this object: whoever keeps it keeps that memory.
        """
        rows, ops, model, cache = self.rows, self._ops, self._model, self._cache
        drawn, logits_of_rows, rotary = self.drawn[:size], self.logits[:size], model.model.rotary
        table = rotary.table(self._max_seq_len, model.device)
        batch = Batch(
            ops=ops,
            token_ids=rows.token_ids[:size],
            slots=rows.slots[:size],
            seq_ids=rows.every[:size],
            query_starts=rows.every[: size + 1],
            seq_lens=rows.seq_lens[:size],
            page_table=rows.page_table[:size],
            cos=self._cos[:size],
            sin=self._sin[:size],
            split_size=cache.split_size,
            generated=True,
        )
        sampling = rows.sampling(size, with_tables=full)

        def step() -> None:
            rotary.write(batch.cos, batch.sin, batch.slots, batch.seq_lens, table)
            logits = model.logits(model.model.run(batch, cache), ops)
            tokens = ops.sample(logits, sampling)
            drawn.copy_(ops.advance(tokens, None, rows, full))
            if full:
                logits_of_rows.copy_(logits)

        return step

"""What a model needs in memory and what fits, counted from config.json and the headers of its weights.

Nothing is allocated and no weight is read. `llama-fast plan` prints the rows; LLM and from_pretrained refuse before
reading what does not fit. On the CPU mapped weights count like others: of a model larger than memory every token would
read a part from disk again.

The cache may take half of what is free beside the weights; a step's buffers and all else that the machine does have
the other half.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from llama_fast.config import LlamaConfig
from llama_fast.engine.engine import DEFAULT_PREFILL_CHUNK
from llama_fast.engine.memory import check_sizes, warn_of_limit
from llama_fast.engine.prompts import SCORED_ROWS
from llama_fast.errors import OutOfMemoryError
from llama_fast.model.int4_modules import int4_linears
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import Checkpoint
from llama_fast.model.rope import RotaryEmbedding
from llama_fast.ops import device_memory
from llama_fast.ops.reference import HEAD_CHUNK
from llama_fast.ops.rows import MATMUL_MULTIPLE


@dataclass(frozen=True)
class Row:
    """One line of a plan.

    Attributes:
        part: weights, cache or step; a step's buffers, but those for decoding, are there for its duration only.
        bytes: on the device, in the dtype the model runs in.
        stored_bytes: of weights: in the checkpoint's files.
        note: how the bytes come about.
    """

    part: str
    name: str
    bytes: int
    stored_bytes: int | None = None
    note: str = ""


def weight_rows(checkpoint: Checkpoint) -> tuple[Row, ...]:
    """The weights by group, as stored and as loaded.

    Raises:
        ConfigError, CheckpointMismatchError: the int4 projections do not fit the model.
    """
    config, files, dtype = checkpoint.config, checkpoint.files, checkpoint.dtype
    layers = f"{config.num_hidden_layers} layers"
    stored = dict.fromkeys(("embeddings", layers, "final norm", "head"), 0)
    loaded = dict(stored)
    names = {name.removeprefix("model.") for name in files.shapes}
    tied = config.tie_word_embeddings and "embed_tokens.weight" in names
    stands_for_both = "embeddings" if config.tie_word_embeddings and not tied else "head"
    groups = {"embed_tokens": "embeddings", "norm": "final norm", "lm_head": stands_for_both}
    int4 = {} if checkpoint.int4 is None else _int4_bytes(checkpoint)
    for name, shape in files.shapes.items():
        base = name.removeprefix("model.")
        owner = base.rpartition(".")[0]
        group = groups.get(owner, layers)
        count = torch.Size(shape).numel()
        stored[group] += count * files.dtypes[name].itemsize
        if owner not in int4 and not base.endswith("rotary_emb.inv_freq") and not (tied and owner == "lm_head"):
            loaded[group] += count * dtype.itemsize
    for owner, size in int4.items():
        loaded["head" if owner == "lm_head" else layers] += size
    notes = dict.fromkeys(stored, "")
    notes["head"] = "the embeddings" if config.tie_word_embeddings and "lm_head" not in int4 else ""
    if int4:
        notes[layers] = f"{len(int4)} projections of 4-bit integers"
    return tuple(Row("weights", name, loaded[name], stored[name], notes[name]) for name in stored)


def _int4_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each int4 projection, by its name without the prefix `model.`."""

    def size(parameter: torch.Tensor) -> int:
        dtype = checkpoint.dtype if parameter.is_floating_point() else parameter.dtype
        return parameter.numel() * dtype.itemsize

    model = checkpoint.empty_model(LlamaLM)
    return {
        name.removeprefix("model."): sum(size(parameter) for parameter in linear.parameters())
        for name, linear in int4_linears(model)
    }


def step_rows(
    config: LlamaConfig, dtype: torch.dtype, max_batch: int, max_seq_len: int, prefill_chunk: int
) -> list[Row]:
    """The most that one step of the reference backend allocates: hidden states, and what its largest phase adds.

    A step has a prefill chunk and one token of each running sequence. The factors count the copies that are alive at
    once: results of row blocks beside the joined ones, and what is widened to fp32. A weight of a width that is no
    multiple of 16 is copied to pad it. A test measures that the estimate is above the peak and not far above.
    """
    item, wide = dtype.itemsize, max(dtype.itemsize, 4)
    tokens = prefill_chunk + max_batch
    hidden_size, vocab_size = config.hidden_size, config.vocab_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    gate_up = 2 * config.intermediate_size
    slots = -(-max_seq_len // SPLIT_SIZE) * SPLIT_SIZE
    scores = 16 * config.num_attention_heads * SPLIT_SIZE * wide  # of one block of 16 queries
    scored = max(max_batch, min(SCORED_ROWS, prefill_chunk))

    def padded(rows: int, columns: int) -> int:
        return 2 * rows * columns * item if rows % MATMUL_MULTIPLE or columns % MATMUL_MULTIPLE else 0

    attention = tokens * (3 * (q_width + 2 * kv_width) * item + 5 * q_width * wide)
    attention += 3 * slots * kv_width * wide + 5 * scores + padded(q_width, hidden_size)
    mlp = tokens * gate_up * 2 * (item + wide) + padded(config.intermediate_size, hidden_size)
    # 11: logits twice, penalties 4, bias and counts twice each and a mask; 16: one row being sorted.
    logits = max(2 * scored, 11 * max_batch + 16) * vocab_size * 4
    logits += padded(vocab_size, hidden_size) if item >= 4 else 2 * HEAD_CHUNK * hidden_size * wide
    phases = {
        "attention": (attention, f"q, k, v of {tokens:,} tokens; K, V of {slots:,} slots of one sequence, widened"),
        "gate and up": (mlp, f"{tokens:,} tokens x {gate_up:,}"),
        "logits, sampling": (logits, f"{scored:,} rows x {vocab_size:,}"),
    }
    name, (size, note) = max(phases.items(), key=lambda phase: phase[1][0])
    hidden_states = 5 * tokens * hidden_size * item
    return [
        Row("step", "hidden states", hidden_states, None, f"{tokens:,} tokens x {hidden_size:,}"),
        Row("step", name, size, None, note),
    ]


def decode_row(config: LlamaConfig, max_batch: int, max_seq_len: int, page_size: int) -> Row:
    """The buffers that decoding steps read and write, there as long as the engine (see decode_rows.py)."""
    # Stop tokens, tokens of the prompt, counts, bias and logits: 1 + 1 + 4 + 4 + 4 bytes.
    size = max_batch * (14 * config.vocab_size + 8 * -(-max_seq_len // page_size))
    return Row("step", "decoding", size, None, f"{max_batch:,} rows x {config.vocab_size:,}")


@dataclass(frozen=True)
class MemoryPlan:
    """What one setting needs on a device, and whether that is there.

    Attributes:
        checkpoint: opened, not read.
        weights: its rows.
        available_bytes: free on the device before anything is loaded.
        max_batch, max_seq_len, cache_bytes, page_size, prefill_chunk: as for `Engine`.
        at_once: sequences of max_seq_len that must have room in the cache together; default max_batch.
    """

    checkpoint: Checkpoint
    weights: tuple[Row, ...]
    available_bytes: int
    max_batch: int
    max_seq_len: int
    cache_bytes: int | None = None
    page_size: int = PAGE_SIZE
    prefill_chunk: int = DEFAULT_PREFILL_CHUNK
    at_once: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, max_batch: int, max_seq_len: int | None, **settings: Any) -> MemoryPlan:
        """A plan for the memory that is free now; without `max_seq_len` for what the model is made for."""
        length = RotaryEmbedding(checkpoint.config).context_len if max_seq_len is None else max_seq_len
        return cls(checkpoint, weight_rows(checkpoint), _free_bytes(checkpoint), max_batch, length, **settings)

    @property
    def context_len(self) -> int:
        """Tokens of a sequence that the model is made for."""
        return RotaryEmbedding(self.checkpoint.config).context_len

    @property
    def page_bytes(self) -> int:
        return PagedKVCache.page_bytes(self.checkpoint.config, self.page_size, self.checkpoint.dtype)

    @property
    def cache_budget(self) -> int:
        """The most that the cache may take."""
        if self.cache_bytes is not None:
            return self.cache_bytes
        return max(0, self.available_bytes - _total(self.weights)) // 2

    @property
    def sequence_bytes(self) -> int:
        """The cache of all `at_once` sequences, in whole pages."""
        num_sequences = self.max_batch if self.at_once is None else self.at_once
        return num_sequences * -(-self.max_seq_len // self.page_size) * self.page_bytes

    @property
    def rows(self) -> list[Row]:
        pages = f"{self.page_bytes // self.page_size:,} bytes a token, {self.page_bytes:,} a page of {self.page_size}"
        # And the page of rows that run without a sequence.
        cache = Row("cache", "K and V", (self.cache_bytes or self.sequence_bytes) + self.page_bytes, None, pages)
        config, dtype = self.checkpoint.config, self.checkpoint.dtype
        step = step_rows(config, dtype, self.max_batch, self.max_seq_len, self.prefill_chunk)
        return [*self.weights, cache, decode_row(config, self.max_batch, self.max_seq_len, self.page_size), *step]

    @property
    def needed_bytes(self) -> int:
        return _total(self.rows)

    @property
    def fits(self) -> bool:
        return self.sequence_bytes <= self.cache_budget and self.needed_bytes <= self.available_bytes

    @property
    def largest_max_seq_len(self) -> int:
        """What max_seq_len may be with the rest as it is, at most the model's context; 0 if nothing fits."""
        return self._largest("max_seq_len", max(self.max_seq_len, self.context_len))

    @property
    def largest_max_batch(self) -> int:
        """What max_batch may be with the rest as it is; 0 if nothing fits."""
        return self._largest("max_batch", max(self.max_batch, self.cache_budget // self.page_bytes))

    def _largest(self, field: str, most: int) -> int:
        # What fits with n fits with less: halve the range until one is left.
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            change: dict[str, Any] = {field: middle}
            low, high = (middle, high) if replace(self, **change).fits else (low, middle - 1)
        return low

    def check(self) -> None:
        """Raise OutOfMemoryError, naming settings that fit, unless this one does."""
        if self.fits:
            return
        checkpoint, parts = self.checkpoint, dict.fromkeys(("weights", "cache", "step"), 0)
        for row in self.rows:
            parts[row.part] += row.bytes
        found = {"max_seq_len": self.largest_max_seq_len, "max_batch": self.largest_max_batch}
        found["prefill_chunk"] = self._largest("prefill_chunk", self.prefill_chunk)
        fixes = [f"{name}={value}" for name, value in found.items() if value]
        # Less than was given, or more than the half that is taken where nobody gives it.
        room = max(self.sequence_bytes, (self.cache_bytes or 0) - max(0, self.needed_bytes - self.available_bytes))
        if replace(self, cache_bytes=room).fits:
            fixes.append(f"cache_bytes={room}")
        if checkpoint.dtype.itemsize > 2:
            smaller = replace(checkpoint, dtype=torch.bfloat16)
            if replace(self, checkpoint=smaller, weights=weight_rows(smaller)).fits:
                fixes.append("dtype='bfloat16'")
        raise OutOfMemoryError(
            f"{checkpoint.folder} needs {self.needed_bytes:,} bytes on {checkpoint.device}, where "
            f"{self.available_bytes:,} are available: {parts['weights']:,} of weights in {checkpoint.dtype}, "
            f"{parts['cache']:,} of cache for max_seq_len={self.max_seq_len} (it may take {self.cache_budget:,}) and "
            f"{parts['step']:,} of buffers for a step of max_batch={self.max_batch}; use "
            f"{' or '.join(fixes) or 'a smaller model or more memory'}"
        )


def check_weights(checkpoint: Checkpoint) -> None:
    """Raise OutOfMemoryError if the weights alone do not fit."""
    needed, available = _total(weight_rows(checkpoint)), _free_bytes(checkpoint)
    if needed <= available:
        return
    smaller = _total(weight_rows(replace(checkpoint, dtype=torch.bfloat16)))
    fix = f"dtype='bfloat16' ({smaller:,} bytes)" if smaller < needed and smaller <= available else "a smaller model"
    raise OutOfMemoryError(
        f"{checkpoint.folder}: the weights need {needed:,} bytes in {checkpoint.dtype} on {checkpoint.device}, where "
        f"{available:,} are available; use {fix}, or a machine with more memory"
    )


def engine_sizes(
    checkpoint: Checkpoint,
    *,
    max_batch: int,
    max_seq_len: int | None,
    cache_bytes: int | None,
    page_size: int,
    prefill_chunk: int,
) -> tuple[int, int]:
    """`max_seq_len` and `cache_bytes` of an engine that fits beside weights that are not read yet.

    Where they are None they are chosen as `Engine` does: the model's context or what fits, and pages for `max_batch`
    such sequences or as many as fit.

    Raises:
        RequestError: an argument is not a positive integer.
        OutOfMemoryError: weights, a step's buffers and the cache of one sequence (or `cache_bytes`) do not fit.
    """
    check_sizes(
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        cache_bytes=cache_bytes,
        page_size=page_size,
        prefill_chunk=prefill_chunk,
    )
    check_weights(checkpoint)
    sizes = {"cache_bytes": cache_bytes, "page_size": page_size, "prefill_chunk": prefill_chunk}
    plan = MemoryPlan.of(checkpoint, max_batch, max_seq_len, at_once=1, **sizes)
    if max_seq_len is None and not plan.fits:
        context_len = plan.max_seq_len
        plan = replace(plan, max_seq_len=max(1, plan.largest_max_seq_len))
        plan.check()
        warn_of_limit(plan.max_seq_len, context_len, plan.cache_budget)
    plan.check()
    room = min(plan.cache_budget, plan.available_bytes - plan.needed_bytes + plan.sequence_bytes)
    num_pages = min(room, max_batch * plan.sequence_bytes) // plan.page_bytes
    return plan.max_seq_len, num_pages * plan.page_bytes if cache_bytes is None else cache_bytes


def _free_bytes(checkpoint: Checkpoint) -> int:
    """On the checkpoint's device, before anything is loaded."""
    return device_memory.free_bytes(checkpoint.device, 0)


def _total(rows: Iterable[Row]) -> int:
    return sum(row.bytes for row in rows)

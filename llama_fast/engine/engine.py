"""The one generation loop: requests to batches to tokens, over one static cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from llama_fast.engine.memory import cache_size, check_sizes
from llama_fast.engine.outputs import Logprob, PositionLogprobs
from llama_fast.engine.request import Request, Sample
from llama_fast.engine.sampling_batch import SamplingTensors
from llama_fast.engine.scheduler import Scheduler, Work
from llama_fast.engine.scheduler import Sequence as SequenceInCache
from llama_fast.errors import ContextLengthError, NonFiniteLogitsError, RequestError, brief
from llama_fast.model.batch import Chunk, pack
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import select_backend

logger = logging.getLogger(__name__)

DEFAULT_MAX_BATCH = 16
DEFAULT_PREFILL_CHUNK = 512
# Prompt positions whose logits are in memory at once while prompts are scored.
SCORED_ROWS = 64


class Engine:
    """Runs requests on one model and one cache.

    The same request gives the same tokens and logits, bit for bit, alone or in any batch, in any order of arrival and
    with any `prefill_chunk`.

    Args:
        model: its weights, device and dtype.
        backend: "auto", "reference", "cpu" or "gpu".
        max_batch: samples that run at once; default 16, fewer if memory is short.
        max_seq_len: tokens of one sample, prompt included; default what the model is made for (its
            max_position_embeddings, times the factor of dynamic RoPE) or what fits. More is allowed with a warning.
        cache_bytes: size of the KV cache; default what max_batch sequences of max_seq_len need, at most half of the
            memory that is free beside the weights.
        page_size, split_size: of the cache (see kv_cache.py); split_size is part of every result's bits.
        prefill_chunk: prompt tokens run in one step.

    Raises:
        RequestError: an argument is out of range.
        OutOfMemoryError: not even one sequence of max_seq_len fits.
    """

    def __init__(
        self,
        model: LlamaLM,
        *,
        backend: str = "auto",
        max_batch: int = DEFAULT_MAX_BATCH,
        max_seq_len: int | None = None,
        cache_bytes: int | None = None,
        page_size: int = PAGE_SIZE,
        split_size: int = SPLIT_SIZE,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    ) -> None:
        check_sizes(
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            cache_bytes=cache_bytes,
            page_size=page_size,
            split_size=split_size,
            prefill_chunk=prefill_chunk,
        )
        context_len = model.model.rotary.context_len
        self.max_seq_len, pages = cache_size(model, max_batch, max_seq_len, cache_bytes, page_size)
        if self.max_seq_len > context_len:
            logger.warning(
                "max_seq_len=%d goes beyond the %d tokens the model is made for", self.max_seq_len, context_len
            )
        self.model = model
        self._device_type = model.device.type
        self.ops = select_backend(backend, model.device, model.dtype)
        self.ops.check_cache(model.config.head_dim, page_size, model.dtype, model.device)
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.cache = PagedKVCache(
            model.config,
            pages,
            page_size=page_size,
            split_size=split_size,
            dtype=model.dtype,
            device=model.device,
        )
        self._owner: dict[str, object] = {}
        self._reset()

    def _reset(self) -> None:
        self.scheduler = Scheduler(self.cache.num_pages, self.cache.page_size, self.max_batch, self.prefill_chunk)
        self._samples: dict[SequenceInCache, Sample] = {}
        self._sampling = SamplingTensors(self.model.config.vocab_size, self.model.device)

    def check(self, request: Request) -> None:
        """Refuse what could never run, before any work.

        Raises:
            RequestError: token ids, n or a token id of the parameters are out of range.
            ContextLengthError: prompt and new tokens do not fit max_seq_len or the cache.
        """
        sampling, prompt_ids = request.sampling, request.prompt_token_ids
        if not prompt_ids:
            raise RequestError(
                f"prompt {request.index}: the prompt has no tokens; give at least one (the tokenizer adds no bos here)"
            )
        vocab_size = self.model.config.vocab_size
        for position, token_id in enumerate(prompt_ids):
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"prompt {request.index}: prompt_token_ids[{position}]={brief(token_id)} is not an id of the "
                    f"vocabulary, 0 to {vocab_size - 1}"
                )
        if sampling.n > self.max_batch:
            raise RequestError(f"n={sampling.n} exceeds max_batch={self.max_batch}; build the engine with a larger one")
        length = len(prompt_ids) + sampling.max_tokens
        if length > self.max_seq_len:
            raise ContextLengthError(
                f"{len(prompt_ids)} prompt tokens + max_tokens={sampling.max_tokens} "
                f"exceed max_seq_len={self.max_seq_len}"
            )
        needed = self.scheduler.pages_needed(request.samples[0].sequence)
        if needed > self.cache.num_pages:
            raise ContextLengthError(
                f"the request needs {needed} cache pages of {self.cache.page_size} tokens, the cache has "
                f"{self.cache.num_pages}; lower n or max_tokens, or raise cache_bytes"
            )

    def run(self, requests: Sequence[Request]) -> Generator[list[Sample], None, None]:
        """Run all requests to their end; yields after each step the samples that got a token or ended.

        Closing the iterator or an exception drops what is unfinished and leaves the engine usable.

        Raises:
            RequestError: a request can never run (see `check`), or this engine is running others.
        """
        run = object()
        try:
            # One atomic step inside `try`: an interrupt between taking a lock and `try` would leave it taken.
            if self._owner.setdefault("run", run) is not run:
                raise RequestError("this engine is generating already; finish or close that stream first")
            if (self.cache.pool.dtype, self.cache.pool.device) != (self.model.dtype, self.model.device):
                raise RequestError("the model was moved or cast after its engine was made; make a new LLM or Engine")
            # Here, not at the end: an interrupt during the clean-up would leave pages taken.
            self._reset()
            for request in requests:
                self.check(request)
            self.model.prepare(self.ops)
            for request in requests:
                first = request.samples[0]
                self._samples[first.sequence] = first
                self.scheduler.add(first.sequence)
            while self.scheduler.has_work:
                yield self.step()
        finally:
            if self._owner.get("run") is run:
                self._owner.clear()

    def step(self) -> list[Sample]:
        """One run of the graph over the scheduled tokens, then one token for every sequence that is due."""
        # The caller's contexts must not reach the graph: autocast changes its arithmetic, and a tensor made in
        # inference mode cannot be written by a later step outside of it.
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(self._device_type):
            with torch.inference_mode(False), torch.autocast(self._device_type, enabled=False), torch.no_grad():
                return self._step()
        # Entering those two for nothing would take a twentieth of a small model's step.
        with torch.no_grad():
            return self._step()

    def _step(self) -> list[Sample]:
        works = self.scheduler.plan()
        now = time.monotonic()
        for work in works:
            metrics = self._samples[work.sequence].request.metrics
            metrics.started = metrics.started or now
        hidden_states = self._run_graph(works)
        due = [(work, states[-1]) for work, states in zip(works, hidden_states, strict=True) if work.samples]
        if not due:
            return []
        logits = self.model.logits(torch.stack([state for _, state in due]), self.ops)
        samples: list[Sample] = []
        rows: list[int] = []
        for row, (work, _) in enumerate(due):
            for sample in self._samples_of(work):
                samples.append(sample)
                rows.append(row)
        self._draw(samples, logits if len(rows) == len(due) else logits[rows])
        return samples

    def _run_graph(self, works: list[Work]) -> Sequence[Tensor]:
        """Each work's hidden states [tokens, hidden_size]; prompts are scored where asked."""
        if self.ops.ROLES_SHARE_RUNS:
            hidden_states = self._run_role(works, generated=False)
        else:
            roles = {work: work.start >= work.sequence.prompt_len for work in works}
            by_work: dict[Work, Tensor] = {}
            for generated in (False, True):
                group = [work for work in works if roles[work] == generated]
                if group:
                    by_work.update(zip(group, self._run_role(group, generated), strict=True))
            hidden_states = [by_work[work] for work in works]
        for work, states in zip(works, hidden_states, strict=True):
            work.sequence.num_computed = work.end
            self._score_prompt(work, states)
        return hidden_states

    def _run_role(self, works: list[Work], generated: bool) -> Sequence[Tensor]:
        """One run of the graph over prompt or over generated tokens; each work's hidden states."""
        chunks = [
            Chunk(
                token_ids=work.sequence.token_ids[work.start : work.end],
                start=work.start,
                rope_len=work.sequence.prompt_len if work.start < work.sequence.prompt_len else None,
                pages=work.sequence.pages,
            )
            for work in works
        ]
        rotary, split_size = self.model.model.rotary, self.cache.split_size
        batch = pack(self.ops, rotary, chunks, split_size, self.model.device, generated=generated)
        return self.model.model.run(batch, self.cache).split([work.end - work.start for work in works])

    def _samples_of(self, work: Work) -> list[Sample]:
        """The samples that take a token from this work; the further ones fork off when the prompt has run."""
        sample = self._samples[work.sequence]
        if work.start >= work.sequence.prompt_len:
            return [sample]
        forks, source, target = self.scheduler.fork(work.sequence)
        if source:
            self.cache.copy_pages(self.ops, source, target)
        for other, fork in zip(sample.request.samples[1:], forks, strict=True):
            other.sequence = fork
            self._samples[fork] = other
        return sample.request.samples

    def _draw(self, samples: list[Sample], logits: Tensor) -> None:
        """Sample one token a row of `logits` [len(samples), vocab_size] and hand it to its sample."""
        token_ids = self.ops.sample(logits, self._sampling.batch(samples))
        scored = [row for row, sample in enumerate(samples) if sample.logprobs is not None]
        logprobs: dict[int, PositionLogprobs] = {}
        if scored:
            num_top = max(samples[row].request.sampling.logprobs or 0 for row in scored)
            positions = self._logprobs(logits[scored], token_ids[scored].clamp(min=0), num_top)
            logprobs = dict(zip(scored, positions, strict=True))
        now = time.monotonic()
        for row, (sample, token_id) in enumerate(zip(samples, token_ids.tolist(), strict=True)):
            request = sample.request
            if token_id < 0:
                request.error = NonFiniteLogitsError(
                    f"the logits after token {len(sample.sequence.token_ids)} hold NaN or no finite value; "
                    "check the weights, or use dtype='float32'"
                )
                sample.finish("error")
            elif request.sampling.max_tokens == 0:
                sample.finish("length")
            else:
                request.metrics.first_token = request.metrics.first_token or now
                sample.append(token_id)
                if sample.logprobs is not None:
                    sample.logprobs.append(_cut(logprobs[row], token_id, request.sampling.logprobs or 0))
            if sample.finish_reason is not None:
                del self._samples[sample.sequence]
                self.scheduler.finish(sample.sequence)
                if all(other.finish_reason is not None for other in request.samples):
                    request.metrics.finished = now

    def _logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> list[PositionLogprobs]:
        """Each row's chosen token, then its `num_top` most probable ones in order."""
        chosen, ranks, top_values, top_ids = (t.tolist() for t in self.ops.log_probs(logits, token_ids, num_top))
        positions = []
        for row, token_id in enumerate(token_ids.tolist()):
            position = {token_id: Logprob(chosen[row], ranks[row])}
            for rank, (top_id, value) in enumerate(zip(top_ids[row], top_values[row], strict=True), start=1):
                position.setdefault(top_id, Logprob(value, rank))
            positions.append(position)
        return positions

    def _score_prompt(self, work: Work, hidden_states: Tensor) -> None:
        """Log probabilities of the prompt tokens that these positions predict, if they were asked for."""
        request, sequence = self._samples[work.sequence].request, work.sequence
        if request.prompt_logprobs is None or work.start >= sequence.prompt_len:
            return
        num_top = request.sampling.prompt_logprobs or 0
        # The last prompt token predicts no prompt token.
        for start in range(work.start, min(work.end, sequence.prompt_len - 1), SCORED_ROWS):
            end = min(start + SCORED_ROWS, work.end, sequence.prompt_len - 1)
            logits = self.model.logits(hidden_states[start - work.start : end - work.start], self.ops)
            targets = torch.tensor(sequence.token_ids[start + 1 : end + 1], device=logits.device)
            request.prompt_logprobs += self._logprobs(logits, targets, num_top)


def _cut(position: PositionLogprobs, token_id: int, num_top: int) -> PositionLogprobs:
    """The chosen token and the `num_top` best; a batch is scored with the largest number that a row wants."""
    return {other: value for other, value in position.items() if other == token_id or value.rank <= num_top}

"""The one generation loop: requests to batches to tokens, over one static cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llama_fast.engine.admission import check_request
from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.decoder import Decoder
from llama_fast.engine.memory import cache_size, check_sizes
from llama_fast.engine.outputs import EngineStats, FinishReason
from llama_fast.engine.prompts import position_logprobs, run_works, score_prompt
from llama_fast.engine.request import Request, Sample
from llama_fast.engine.scheduler import Scheduler, Work
from llama_fast.engine.scheduler import Sequence as SequenceInCache
from llama_fast.engine.warm_up import warm_up
from llama_fast.errors import EngineDeadError, NonFiniteLogitsError, OutOfMemoryError, RequestError
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import select_backend
from llama_fast.ops.replay import (
    compiled_kernels,
    device_allocations,
    is_current,
    is_fatal,
    is_out_of_memory,
    on_device,
)
from llama_fast.ops.transfers import to_device

logger = logging.getLogger(__name__)

DEFAULT_MAX_BATCH = 16
DEFAULT_PREFILL_CHUNK = 512


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
        graphs: whether decoding steps are captured where the device can; False launches every kernel anew.
        steps_ahead: decoding steps that are enqueued before the host reads the first; default what suits the device.

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
        graphs: bool = True,
        steps_ahead: int | None = None,
    ) -> None:
        check_sizes(
            max_batch=max_batch,
            max_seq_len=max_seq_len,
            cache_bytes=cache_bytes,
            page_size=page_size,
            split_size=split_size,
            prefill_chunk=prefill_chunk,
            **({} if steps_ahead is None else {"steps_ahead": steps_ahead}),
        )
        context_len = model.model.rotary.context_len
        self.max_seq_len, pages = cache_size(model, max_batch, max_seq_len, cache_bytes, page_size)
        if self.max_seq_len > context_len:
            logger.warning(
                "max_seq_len=%d goes beyond the %d tokens the model is made for", self.max_seq_len, context_len
            )
        self.model = model
        self._device = model.device
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
        # Their buffers are written in every mode, so they are never inference tensors.
        with on_device(self._device), torch.inference_mode(False):
            self._graph = DecodeGraph(model, self.cache, self.ops, max_batch, self.max_seq_len, graphs=graphs)
            self.decoder = Decoder(self._graph, self.ops, model.device, steps_ahead)
        self._dead: EngineDeadError | None = None
        self._owner: dict[str, object] = {}
        self._prepared: object = None
        self._at_ready = (device_allocations(model.device), compiled_kernels())
        self._reset()

    def _reset(self) -> None:
        self.scheduler = Scheduler(self.cache.num_pages, self.cache.page_size, self.max_batch, self.prefill_chunk)
        self._samples: dict[SequenceInCache, Sample] = {}
        with self._at_work():
            self.decoder.forget()

    def make_ready(self) -> None:
        """Make the weights as the backend wants them, compile, capture: what else the first request would wait for.

        `run` calls it; it does something only the first time and when weights have changed.

        Raises:
            OutOfMemoryError, BackendError: a decoding step cannot be captured.
        """
        with self._at_work():
            prepared = self.model.prepare(self.ops)
            if prepared is self._prepared:
                return
            if self._graph.captures:
                self._graph.capture()
                self.max_batch = self.scheduler.max_batch = self._graph.max_batch
            try:
                warm_up(self.model, self.ops, self.cache, self._graph, self.prefill_chunk)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemoryError(
                    f"a step of {self.prefill_chunk} prompt tokens needs more memory than there is "
                    f"({' '.join(str(error).split())[:200]}); lower prefill_chunk, cache_bytes or max_batch"
                ) from error
        self._prepared = prepared
        self._at_ready = (device_allocations(self.model.device), compiled_kernels())

    def stats(self) -> EngineStats:
        """Counts of this engine."""
        device_before, compiled_before = self._at_ready
        device_now = device_allocations(self.model.device)
        return EngineStats(
            decode_steps=self._graph.num_steps,
            captured=tuple(self._graph.buckets) if self._graph.captures else (),
            allocations=None if device_now is None or device_before is None else device_now - device_before,
            compilations=compiled_kernels() - compiled_before,
        )

    def check(self, request: Request) -> None:
        """Refuse what could never run, before any work.

        Raises:
            RequestError: token ids, n or a token id of the parameters are out of range.
            ContextLengthError: prompt and new tokens do not fit max_seq_len or the cache.
        """
        check_request(request, self.scheduler, self.model.config.vocab_size, self.max_seq_len)

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
            self.make_ready()
            for request in requests:
                self.check(request)  # there may be memory for fewer sequences than was thought
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
        """A chunk of the waiting prompts, decoding steps for the device to work on, and the oldest draw read.

        Returns:
            The samples that got a token or ended.

        Raises:
            EngineDeadError: the device met an error after which it cannot be used; so does every later call.
            RequestError: the model was prepared for something else since the run began.
        """
        with self._at_work():
            if self.model.prepared is not self._prepared:
                raise RequestError(
                    "the model's weights changed, or another engine or a call with gradients took them, while this "
                    "engine was generating; finish or close that stream first"
                )
            return self._step()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Around all that the device is told: the modes that belong there, and what its faults mean."""
        if self._dead is not None:
            raise self._dead
        try:
            # The caller's contexts must not reach the graph: autocast changes its arithmetic, and a tensor made in
            # inference mode cannot be written by a later step outside of it. Entering all for nothing would take a
            # twentieth of a small model's step.
            if is_current(self._device) and not (
                torch.is_inference_mode_enabled() or torch.is_autocast_enabled(self._device.type)
            ):
                with torch.no_grad():
                    yield
            else:
                no_autocast = torch.autocast(self._device.type, enabled=False)
                with on_device(self._device), torch.inference_mode(False), no_autocast, torch.no_grad():
                    yield
        except Exception as error:
            if not is_fatal(error):
                raise
            reason = " ".join(str(error).split())[:300]
            self._dead = EngineDeadError(f"the device failed ({reason}); start a new process")
            raise self._dead from error

    def _step(self) -> list[Sample]:
        works = self.scheduler.plan()
        failed: list[Sample] = []
        if works:
            # Where the decoding samples' tokens are all known, one pass over the weights may serve both.
            shared = self.decoder.samples if self.ops.ROLES_SHARE_RUNS and not self.decoder.unread else []
            try:
                samples, logits = self._run_prompts(works, shared)
                if not shared and samples:
                    self.decoder.draw(samples, logits)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = self._fail(works, error)
            else:
                if shared:
                    # Not in `try`: once the shared samples' rows go on, their tokens must be read.
                    self.decoder.draw(samples, logits)
        while self.decoder.may_enqueue:
            self.decoder.enqueue()
        return failed + (self._read() if self.decoder.unread else [])

    def _run_prompts(self, works: list[Work], shared: list[Sample]) -> tuple[list[Sample], Tensor]:
        """Run chunks of prompts, and the next token of the `shared` samples.

        Returns:
            The samples that draw now, those whose prompt is through and the shared ones, and their logits.
        """
        now = time.monotonic()
        for work in works:
            metrics = self._samples[work.sequence].request.metrics
            metrics.started = metrics.started or now
        ends = [len(sample.sequence.token_ids) for sample in shared]
        decoding = [Work(sample.sequence, end - 1, end) for sample, end in zip(shared, ends, strict=True)]
        hidden_states = run_works([*works, *decoding], self.model, self.ops, self.cache)
        for work, states in zip(works, hidden_states, strict=False):
            score_prompt(self._samples[work.sequence].request, work, states, self.model, self.ops)
        due = [row for row, work in enumerate(works) if work.samples]
        rows: list[int] = []
        samples: list[Sample] = []
        for place, row in enumerate(due):
            forked = self._fork(works[row])
            samples += forked
            rows += [place] * len(forked)
        self.decoder.join(samples)
        rows += range(len(due), len(due) + len(shared))
        due += range(len(works), len(works) + len(shared))
        if not due:
            return [], hidden_states[0]
        logits = self.model.logits(torch.stack([hidden_states[row][-1] for row in due]), self.ops)
        if len(rows) > len(due):
            logits = logits[to_device(rows, torch.int64, logits.device)]
        return samples + shared, logits

    def _fork(self, work: Work) -> list[Sample]:
        """The samples of a prompt that is through; the further ones fork off."""
        sample = self._samples[work.sequence]
        forks, source, target = self.scheduler.fork(work.sequence)
        for other, fork in zip(sample.request.samples[1:], forks, strict=True):
            other.sequence = fork
            self._samples[fork] = other
        if source:
            self.cache.copy_pages(self.ops, source, target)
        return sample.request.samples

    def _read(self) -> list[Sample]:
        """Hand the tokens of the oldest draw to their samples."""
        drawn = self.decoder.read()
        now = time.monotonic()
        for token in drawn:
            sample, request = token.sample, token.sample.request
            if token.token_id < 0:
                request.error = NonFiniteLogitsError(
                    f"the logits after token {len(sample.sequence.token_ids)} hold NaN or no finite value; "
                    "check the weights, or use dtype='float32'"
                )
                self._end(sample, "error", at_rest=True)
            elif request.sampling.max_tokens == 0:
                self._end(sample, "length", at_rest=True)
            else:
                request.metrics.first_token = request.metrics.first_token or now
                sample.append(token.token_id)
                sample.sequence.num_computed = len(sample.sequence.token_ids) - 1
                if sample.logprobs is not None and token.log_probs is not None:
                    num_top = request.sampling.logprobs or 0
                    sample.logprobs.append(position_logprobs(token.token_id, token.log_probs, num_top))
                if sample.finish_reason is not None:
                    # The device knows no texts: it goes on behind a stop string.
                    self._release(sample, at_rest=not isinstance(sample.stop_reason, str))
        return [token.sample for token in drawn]

    def abort(self, request: Request) -> None:
        """End a request that waits or runs: what its samples have so far is theirs, the rest of the engine goes on."""
        with self._at_work():
            for sample in request.samples:
                if sample.finish_reason is None:
                    self._end(sample, "abort", at_rest=False)

    def _fail(self, works: list[Work], error: Exception) -> list[Sample]:
        """End the requests whose prompts found no memory."""
        failed: list[Sample] = []
        for request in {id(r): r for r in (self._samples[work.sequence].request for work in works)}.values():
            request.error = OutOfMemoryError(
                f"prompt {request.index}: a step of {self.prefill_chunk} prompt tokens needs more memory than there is "
                f"({' '.join(str(error).split())[:200]}); lower prefill_chunk, cache_bytes or max_batch"
            )
            for sample in request.samples:
                if sample.finish_reason is None:
                    self._end(sample, "error", at_rest=False)
                    failed.append(sample)
        return failed

    def _end(self, sample: Sample, reason: FinishReason, at_rest: bool) -> None:
        sample.finish(reason)
        self._release(sample, at_rest)

    def _release(self, sample: Sample, at_rest: bool) -> None:
        """Give up the row and the pages of a sample that ended."""
        self.decoder.leave(sample, at_rest)
        # Samples that have not forked yet have the first one's sequence.
        if self._samples.get(sample.sequence) is sample:
            del self._samples[sample.sequence]
            self.scheduler.finish(sample.sequence)
        if all(other.finish_reason is not None for other in sample.request.samples):
            sample.request.metrics.finished = time.monotonic()

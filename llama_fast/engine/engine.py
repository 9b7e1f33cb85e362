"""The one generation loop: requests to batches to tokens, over one static cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch

from llama_fast.engine.admission import check_request
from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.decoder import Decoder
from llama_fast.engine.memory import cache_size, check_sizes
from llama_fast.engine.outputs import EngineStats
from llama_fast.engine.request import Request, Sample
from llama_fast.engine.running import Running
from llama_fast.engine.scheduler import Scheduler
from llama_fast.engine.warm_up import warm_up
from llama_fast.errors import EngineDeadError, OutOfMemoryError, RequestError
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
    survives_fork,
)

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
        prefill_chunk: tokens run in one step, of prompts and of samples that decode.
        prefix_caching: whether prompts that begin like earlier ones take those tokens' K and V from the cache.
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
        prefix_caching: bool = True,
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
        self.prefix_caching = prefix_caching
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
        self._process = os.getpid()
        self._prepared: object = None
        self._at_ready = (device_allocations(model.device), compiled_kernels())
        self._reset()

    def _reset(self) -> None:
        """Begin with an empty cache and nothing queued."""
        share_generated = self.ops.ROLES_SHARE_RUNS and self.model.model.rotary.state(1) == ()
        scheduler = Scheduler(
            self.cache.num_pages,
            self.cache.page_size,
            self.max_batch,
            self.prefill_chunk,
            lookahead=self.decoder.steps_ahead + 1,
            share_prefixes=self.prefix_caching,
            share_generated=share_generated,
        )
        if hasattr(self, "_running"):
            scheduler.counts = self.scheduler.counts
        with self._at_work():
            self._running = Running(self.model, self.ops, self.cache, self.decoder, scheduler)
        self._in_order = True

    @property
    def scheduler(self) -> Scheduler:
        """What waits and runs, and whose pages are whose."""
        return self._running.scheduler

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
                if self.scheduler.prefixes is not None:
                    self.scheduler.prefixes.clear()
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
            **self.scheduler.stats(),
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
        with self.session():
            for request in requests:
                self.check(request)
            self.make_ready()
            for request in requests:
                self.add(request)  # checked again: there may be memory for fewer sequences than was thought
            while self.has_work:
                yield self.step()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Makes the caller the one who adds requests and calls `step`. At its end what is unfinished is dropped.

        Raises:
            RequestError: somebody else is.
        """
        session = object()
        try:
            if self._dead is not None:
                raise self._dead
            if self._process != os.getpid() and not survives_fork(self._device):
                raise RequestError("the engine was made in another process, whose GPU a fork cannot use; make one here")
            # One atomic step inside `try`: an interrupt between taking a lock and `try` would leave it taken.
            if self._owner.setdefault("session", session) is not session:
                raise RequestError("this engine is generating already; finish or close that stream first")
            if (self.cache.pool.dtype, self.cache.pool.device) != (self.model.dtype, self.model.device):
                raise RequestError("the model was moved or cast after its engine was made; make a new LLM or Engine")
            # Here, not at the end: an interrupt during the clean-up would leave pages taken.
            if not self._in_order:
                self._reset()
            yield
        finally:
            if self._owner.get("session") is session:
                try:
                    if self._in_order and self._dead is None:
                        self._drop_unfinished()
                finally:
                    self._owner.clear()

    def _drop_unfinished(self) -> None:
        with self._moving():
            for request in self.open_requests:
                self.abort(request)
            # What is on its way would be read as tokens of the next session.
            with self._at_work():
                self.decoder.forget()

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.has_work

    @property
    def open_requests(self) -> list[Request]:
        """Those that wait or run."""
        return list({id(sample.request): sample.request for sample in list(self._running.samples.values())}.values())

    def add(self, request: Request) -> None:
        """Queue a request; in a session.

        Raises:
            RequestError: it can never run (see `check`), or was added before.
        """
        self.check(request)
        if request.metrics.started is not None or request.finished or request in self.open_requests:
            raise RequestError(f"prompt {request.index}: this request has run already; make a new one")
        root = (request.cache_salt, self.model.model.rotary.state(len(request.prompt_token_ids)))
        # Where every position counts every position has to run.
        all_run = request.prompt_logprobs is not None or request.pooling not in (None, "last")
        request.samples[0].sequence.root = None if all_run else root
        with self._moving():
            self._running.add(request)

    def abort(self, request: Request) -> None:
        """End a request that waits or runs: what its samples have so far is theirs, the rest of the engine goes on.

        One that has ended already, or was never added, stays as it is.
        """
        with self._at_work(), self._moving():
            self._running.abort(request)

    def abort_soon(self, request: Request) -> None:
        """The same for any thread and at any time: it happens before the next step, which returns its samples."""
        if not request.finished:
            self._running.to_abort.append(request)

    def declare_dead(self, reason: str) -> None:
        """Let every later call fail with EngineDeadError: a step does not return, say. For any thread."""
        self._dead = self._dead or EngineDeadError(reason)

    def close(self) -> None:
        """Give the cache and the captured graphs back; the engine cannot run any more.

        Raises:
            RequestError: it is running.
        """
        if self._owner:
            raise RequestError("this engine is generating; finish or close that stream before closing the engine")
        self._dead = EngineDeadError("this engine is closed; make a new one")
        del self.cache, self._graph, self.decoder, self._running

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
            with self._moving():
                return self._running.step()

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Around what leaves pages and rows in disorder if it is interrupted: the next session begins anew then."""
        # `abort` may be called in the middle of a step.
        before, self._in_order = self._in_order, False
        yield
        self._in_order = before

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

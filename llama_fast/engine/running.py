"""Requests that wait and run on one cache, and a step of theirs: prompts, draws, and what becomes of a failure.

A failure is the affair of the request that caused it. What a step computes together is run again one by one where it
fails; who fails alone ends with an error, and the others go on with the bits that they would have had without it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from llama_fast.engine.decoder import Decoder, Drawn
from llama_fast.engine.outputs import FinishReason
from llama_fast.engine.prompts import pool_states, position_logprobs, run_works, score_prompt
from llama_fast.engine.request import Request, Sample
from llama_fast.engine.scheduler import Plan, Scheduler, Work
from llama_fast.engine.scheduler import Sequence as SequenceInCache
from llama_fast.errors import (
    LlamaFastError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    RequestFailedError,
    RequestTimeoutError,
    without_places,
)
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops.replay import is_fatal, is_out_of_memory
from llama_fast.ops.transfers import to_device


class Running:
    """What is queued and what runs.

    Args:
        model, ops, cache: what runs, and where it leaves K and V.
        decoder: rows for what decodes; emptied.
        scheduler: without sequences.
    """

    def __init__(
        self, model: LlamaLM, ops: ModuleType, cache: PagedKVCache, decoder: Decoder, scheduler: Scheduler
    ) -> None:
        self.model, self.ops, self.cache, self.decoder, self.scheduler = model, ops, cache, decoder, scheduler
        # Samples that have not forked yet have the first one's sequence.
        self.samples: dict[SequenceInCache, Sample] = {}
        # Of preempted sequences: what stood in their pages.
        self._on_host: dict[SequenceInCache, Tensor] = {}
        self._timed: list[Request] = []
        # Appended to by other threads.
        self.to_abort: deque[Request] = deque()
        # What a decoding step raised, and whether the one before it was looked into and found nobody's.
        self._decoding_failed: Exception | None = None
        self._nobody_failed = False
        decoder.forget()

    def add(self, request: Request) -> None:
        """Queue a request that was checked."""
        first = request.samples[0]
        self.samples[first.sequence] = first
        if request.deadline is not None:
            self._timed.append(request)
        self.scheduler.add(first.sequence)

    def abort(self, request: Request) -> None:
        """End a request, whatever it is doing; one that has ended, or was never added, stays as it is."""
        for sample in [one for one in request.samples if one.sequence in self.samples]:
            if sample.finish_reason is None:
                self._end(sample, "abort", at_rest=False)

    def step(self) -> list[Sample]:
        """A chunk of the waiting prompts, decoding steps for the device to work on, and the oldest draw read.

        Returns:
            The samples that got a token or ended.
        """
        ended = self._abort_wanted() + self._expire()
        decoder = self.decoder
        if decoder.is_ahead or (decoder.unread and (self.scheduler.must_preempt or self._decoding_failed is not None)):
            return ended + self._read()
        if self._decoding_failed is not None:
            ended += self._mend(self._decoding_failed)
            self._decoding_failed = None
        plan = self.scheduler.plan()
        ended += self._move_pages(plan)
        works = [work for work in plan.works if work.sequence in self.samples]
        # Where the decoding samples' tokens are all known, one pass over the weights may serve both.
        shared = decoder.samples if works and self.ops.ROLES_SHARE_RUNS and not decoder.unread else []
        owed = bool(decoder.samples) and not shared
        if works:
            ended += self._run_prompts(works, shared)
        if self._decoding_failed is None:
            self._decode(owed)
        return ended + (self._read() if self.decoder.unread else [])

    # --- pages --------------------------------------------------------------------------------------------------------

    def _move_pages(self, plan: Plan) -> list[Sample]:
        """What the plan says of pages; returns the samples that found no memory."""
        failed: list[Sample] = []
        for sequence, pages in plan.preempted:
            sample = self.samples.get(sequence)
            if sample is None:  # its request has failed here with another sample
                continue
            sample.request.metrics.preempted += 1
            self.decoder.leave(sample, at_rest=False)
            try:
                self._on_host[sequence] = self.cache.copy_out(pages)
            except Exception as error:
                failed += self._fail(sample.request, error)
        for sequence, places in plan.resumed:
            sample = self.samples.get(sequence)
            if sample is None:
                continue
            kept = self._on_host.pop(sequence)
            try:
                if places:
                    self.cache.copy_in(kept[places.start :], [sequence.pages[place] for place in places])
                if not sequence.is_prompt:
                    self.decoder.join([sample])
            except Exception as error:
                failed += self._fail(sample.request, error)
        for sequence in plan.grown:
            sample = self.samples.get(sequence)
            if sample is not None:
                try:
                    self.decoder.grow(sample)
                except Exception as error:
                    failed += self._fail(sample.request, error)
        return failed

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _run_prompts(self, works: list[Work], shared: list[Sample]) -> list[Sample]:
        """Run chunks of prompts and the next token of the `shared` samples, and draw for these and who is through.

        Returns:
            The samples that ended without a draw.
        """
        now = time.monotonic()
        for work in works:
            metrics = self.samples[work.sequence].request.metrics
            if metrics.started is None:
                metrics.started, metrics.shared_tokens = now, work.start
        try:
            logits = self._logits(works, shared)
        except Exception as error:
            if is_fatal(error):
                raise
            if len(works) == 1 and not shared:
                return self._fail(self.samples[works[0].sequence].request, error)
        else:
            return self._draw_first(works, shared, logits)
        # One by one: in less memory, and without whom it was. What decodes takes the next decoding step.
        ended: list[Sample] = []
        through: list[Work] = []
        parts: list[Tensor] = []
        for work in works:
            try:
                logits = self._logits([work], [])
            except Exception as error:
                ended += self._fail(self.samples[work.sequence].request, error)
            else:
                through.append(work)
                parts += [] if logits is None else [logits]
        return ended + self._draw_first(through, [], torch.cat(parts) if parts else None)

    def _logits(self, works: Sequence[Work], shared: Sequence[Sample]) -> Tensor | None:
        """Run chunks of prompts and the next token of the `shared` samples: logits of the works that draw, and theirs.

        It changes nothing that counts, so it can be called again.
        """
        ends = [len(sample.sequence.token_ids) for sample in shared]
        decoding = [Work(sample.sequence, end - 1, end) for sample, end in zip(shared, ends, strict=True)]
        hidden_states = run_works([*works, *decoding], self.model, self.ops, self.cache)
        for work, states in zip(works, hidden_states, strict=False):
            request = self.samples[work.sequence].request
            if request.pooling is not None:
                pool_states(request, work, states, self.model, self.ops)
            score_prompt(request, work, states, self.model, self.ops)
        rows = [row for row, work in enumerate(works) if self._draws(work)]
        rows += range(len(works), len(works) + len(decoding))
        if not rows:
            return None
        return self.model.logits(torch.stack([hidden_states[row][-1] for row in rows]), self.ops)

    def _draws(self, work: Work) -> bool:
        """Whether a token is drawn behind a prompt's work."""
        return work.samples and self.samples[work.sequence].request.pooling is None

    def _draw_first(self, works: Sequence[Work], shared: Sequence[Sample], logits: Tensor | None) -> list[Sample]:
        """Draw from what `_logits` returned; returns the samples that ended without a draw."""
        ended: list[Sample] = []
        for work in works:
            self.scheduler.ran(work)
            if work.samples and not self._draws(work):
                ended.append(self.samples[work.sequence])
                self._end(ended[-1], "length", at_rest=True)
        if logits is None:
            return ended
        due = [work for work in works if work.sequence in self.samples and work.samples]
        samples: list[Sample] = []
        rows: list[int] = []
        for place, work in enumerate(due):
            request = self.samples[work.sequence].request
            try:
                forked = self._fork(work)
                self.decoder.join(forked)
            except Exception as error:
                ended += self._fail(request, error)
            else:
                samples += forked
                rows += [place] * len(forked)
        samples += shared
        rows += range(len(due), len(due) + len(shared))
        try:
            if rows != list(range(len(logits))):
                logits = logits[to_device(rows, torch.int64, logits.device)]
            if samples:
                self.decoder.draw(samples, logits)
        except Exception as error:
            if is_fatal(error):
                raise
            if not due:
                self._decoding_failed = error
                return ended
            ended += self._draw_one_by_one(samples[: len(samples) - len(shared)], logits)
        return ended

    def _draw_one_by_one(self, samples: Sequence[Sample], logits: Tensor) -> list[Sample]:
        """Draw first tokens anew, a request at a time, after a draw of all of them failed.

        Returns:
            The samples that got a token or ended.
        """
        told: list[Sample] = []
        # How far rows have come is known when all that is on its way is read; what was lost they draw again.
        while self.decoder.unread:
            told += self._read()
        left = [place for place, sample in enumerate(samples) if not sample.token_ids and sample.finish_reason is None]
        for place in left:
            self.decoder.leave(samples[place], at_rest=False)
        self.decoder.join_again()
        for _, group in itertools.groupby(left, key=lambda place: id(samples[place].request)):
            places = list(group)
            own = [samples[place] for place in places]
            try:
                self.decoder.join(own)
                self.decoder.draw(own, logits[places[0] : places[-1] + 1])
                told += self._read()
            except Exception as error:
                told += self._fail(own[0].request, error)
                self.decoder.join_again()
        return told

    def _fork(self, work: Work) -> list[Sample]:
        """The samples of a prompt that is through; the further ones fork off."""
        sample = self.samples[work.sequence]
        forks, source, target = self.scheduler.fork(work.sequence)
        for other, fork in zip(sample.request.samples[1:], forks, strict=True):
            other.sequence = fork
            self.samples[fork] = other
        if source:
            self.cache.copy_pages(self.ops, source, target)
        return sample.request.samples

    # --- draws --------------------------------------------------------------------------------------------------------

    def _decode(self, owed: bool) -> None:
        """Enqueue decoding steps; `owed`: one at least, whatever was drawn for prompts."""
        try:
            while self.decoder.may_enqueue and (owed or not self.decoder.is_ahead):
                guesses = self._guesses()
                if guesses is None and not owed:
                    break
                self.decoder.enqueue(guesses)
                self._nobody_failed = owed = False
        except Exception as error:
            if is_fatal(error):
                raise
            # What is on its way is read first: then the host knows where every row stands.
            self._decoding_failed = error

    def _guesses(self) -> dict[Sample, list[int]] | None:
        """What may follow in samples that guess; None if they wait for what is on its way."""
        guessing = [sample for sample in self.decoder.samples if sample.lookup is not None]
        if not guessing:
            return {}
        if self.decoder.unread:
            return None
        idle = self.decoder.num_idle
        guesses: dict[Sample, list[int]] = {}
        for place, sample in enumerate(guessing):
            sequence = sample.sequence
            # The last token of its limit is drawn, never guessed; pages are there for as many as it may guess.
            most = min(idle // (len(guessing) - place), sequence.max_len - len(sequence.token_ids) - 1)
            guess = sample.lookup.guess(most) if sample.lookup is not None and most > 0 else []
            if guess:
                guesses[sample] = guess
                idle -= len(guess)
        return guesses

    def _mend(self, error: Exception) -> list[Sample]:
        """End the request for which a decoding step failed; every draw has been read. The others are set up anew.

        Raises:
            Exception: `error`, if it is nobody's and came twice.
        """
        samples = self.decoder.samples
        ended: list[Sample] = []
        if is_out_of_memory(error) and samples:
            ended = self._fail(max(samples, key=lambda sample: sample.sequence.order).request, error)
        for sample in [] if ended else samples:
            if sample.finish_reason is None:
                # Its K and V are written once more by the step that follows.
                end = len(sample.sequence.token_ids)
                try:
                    run_works([Work(sample.sequence, end - 1, end)], self.model, self.ops, self.cache)
                except Exception as own:
                    ended += self._fail(sample.request, own)
        if not ended and self._nobody_failed:
            raise error
        self._nobody_failed = not ended
        self.decoder.join_again()
        return ended

    def _read(self) -> list[Sample]:
        """Hand the tokens of the oldest draw to their samples."""
        drawn = self.decoder.read()
        self._decoding_failed, self.decoder.failed = self._decoding_failed or self.decoder.failed, None
        now = time.monotonic()
        told = [one.sample for one in drawn]
        for one in drawn:
            sample = one.sample
            if sample.finish_reason is None:  # else its request has failed by another sample's token
                try:
                    self._take(one, now)
                    if sample.request.on_token is not None and sample.finish_reason != "error":
                        sample.request.on_token(sample)
                except Exception as error:
                    told += [other for other in self._fail(sample.request, error) if other not in told]
        return told

    def _take(self, drawn: Drawn, now: float) -> None:
        sample, request = drawn.sample, drawn.sample.request
        if drawn.guessed and sample.lookup is not None:
            request.metrics.guessed += drawn.guessed
            request.metrics.guessed_right += drawn.right
            sample.lookup.verified(drawn.guessed, drawn.right)
        for token_id, log_probs in zip(drawn.token_ids, drawn.log_probs, strict=True):
            if token_id < 0:
                request.error = NonFiniteLogitsError(
                    f"the logits after token {len(sample.sequence.token_ids)} hold NaN or no finite value; "
                    "check the weights, or use dtype='float32'"
                )
                self._end(sample, "error", at_rest=False)
            elif request.sampling.max_tokens == 0:
                self._end(sample, "length", at_rest=True)
            else:
                request.metrics.first_token = request.metrics.first_token or now
                request.metrics.last_token = now
                sample.append(token_id)
                sample.sequence.num_computed = len(sample.sequence.token_ids) - 1
                if sample.logprobs is not None and log_probs is not None:
                    num_top = request.sampling.logprobs or 0
                    sample.logprobs.append(position_logprobs(token_id, log_probs, num_top))
                if sample.finish_reason is not None:
                    # The device knows no texts, and nothing of guesses: it goes on behind their ends.
                    self._release(sample, at_rest=not drawn.guessed and not isinstance(sample.stop_reason, str))
            if sample.finish_reason is not None:
                break

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _abort_wanted(self) -> list[Sample]:
        ended: list[Sample] = []
        while self.to_abort:
            request = self.to_abort.popleft()
            before = [sample for sample in request.samples if sample.finish_reason is None]
            self.abort(request)
            ended += [sample for sample in before if sample.finish_reason is not None]
        return ended

    def _expire(self) -> list[Sample]:
        """End the requests whose time is over."""
        if not self._timed:
            return []
        now, ended = time.monotonic(), []
        self._timed = [request for request in self._timed if not request.finished]
        for request in self._timed:
            if request.deadline is not None and now >= request.deadline:
                told = f"prompt {request.index}: not done within timeout={request.timeout:g} seconds"
                error = RequestTimeoutError(told)
                ended += self._fail(request, error)
        return ended

    def _fail(self, request: Request, error: Exception) -> list[Sample]:
        """End a request with an error; returns its samples that had not ended.

        Raises:
            Exception: `error`, if it is the device's: then nothing can go on.
        """
        if is_fatal(error):
            raise error
        request.error = _failed(request, error)
        failed = [sample for sample in request.samples if sample.finish_reason is None]
        for sample in failed:
            self._end(sample, "error", at_rest=False)
        for sample in request.samples:
            if self.samples.get(sample.sequence) is sample:  # it had just ended when this failed
                self._release(sample, at_rest=False)
        return failed

    def _end(self, sample: Sample, reason: FinishReason, at_rest: bool) -> None:
        try:
            sample.finish(reason)
        except Exception as error:
            # Its text cannot be ended; the request ends all the same.
            sample.finish_reason = "error"
            sample.request.error = sample.request.error or _failed(sample.request, error)
        self._release(sample, at_rest)

    def _release(self, sample: Sample, at_rest: bool) -> None:
        """Give up the row and the pages of a sample that ended."""
        self.decoder.leave(sample, at_rest)
        self._on_host.pop(sample.sequence, None)
        if self.samples.get(sample.sequence) is sample:
            del self.samples[sample.sequence]
            self.scheduler.finish(sample.sequence)
        if sample.request.finished:
            sample.request.metrics.finished = time.monotonic()


def _failed(request: Request, error: Exception) -> LlamaFastError:
    """What the request's caller is told."""
    if isinstance(error, LlamaFastError):
        return error
    text = without_places(" ".join(str(error).split()))[:200]
    told: LlamaFastError
    if is_out_of_memory(error):
        told = OutOfMemoryError(
            f"prompt {request.index}: a step needs more memory than there is ({text}); lower prefill_chunk, "
            "cache_bytes or max_batch"
        )
    else:
        told = RequestFailedError(f"prompt {request.index}: {type(error).__name__}: {text}")
    told.__cause__ = error
    return told

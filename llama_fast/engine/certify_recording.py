"""Engines that tell of every draw."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_fast.engine.certify_watch import Trace, Watch, digest, watched_backend
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Sample
from llama_fast.model.llama import LlamaLM


class Recorder:
    """The logits that every token was drawn from, as sha256 of their bytes, and in which rows samples were.

    A draw behind a guess is told among the others, before it is known whether the guess was right. A wrong one's is
    replaced by the draw that comes at its place later, so what stays is what the tokens were drawn from.

    Args:
        engine: is told of; it must outlive this.
        trace: gets the logits themselves of its sample.
        records: whether logits are looked at. Steps keep them then, and are not quite those of users.

    Attributes:
        rows: (sample, row) of every decoding step.
        counts: numbers of rows with a sample that decoding steps had.
        most_ahead: draws that were on their way at once.
    """

    def __init__(self, engine: Engine, trace: Trace | None, records: bool) -> None:
        # The decoder knows this object: an engine of a GPU must be gone with its last reference.
        self._decoder = weakref.proxy(engine.decoder)
        self._trace, self._records, self._device = trace, records, engine.model.device
        self._digests: dict[Sample, dict[int, bytes]] = {}
        # On a GPU: what is there is looked at when all has run, as a look makes the host wait.
        self._kept: list[tuple[list[tuple[int, Sample, int]], Tensor]] = []
        self.rows: set[tuple[Sample, int]] = set()
        self.counts: set[int] = set()
        self.most_ahead = 0
        if records:
            engine.decoder.on_logits = self._record

    def _record(self, samples: Sequence[Sample | None], logits: Tensor) -> None:
        decoder, behind = self._decoder, Counter[Sample]()
        steps = logits is decoder.graph.logits
        own = {id(row.sample): place for place, row in enumerate(decoder._rows) if row is not None}
        # The sample's own row first, the rows of its guesses in their order behind it.
        places = sorted(
            (place for place, sample in enumerate(samples) if sample is not None),
            key=lambda place: (steps and own.get(id(samples[place])) != place, place),
        )
        draws = []
        for place in places:
            sample = samples[place]
            assert sample is not None
            unread = sum(sample in draw.samples for draw in decoder._unread)
            draws.append((place, sample, len(sample.token_ids) + unread + behind[sample]))
            behind[sample] += 1
            if steps:
                self.rows.add((sample, place))
        if steps:
            self.counts.add(len(draws))
            self.most_ahead = max(self.most_ahead, decoder.unread + 1)
        if self._trace is not None:
            self._trace.keep_logits([(sample, index, logits[place]) for place, sample, index in draws])
        if self._device.type == "cuda":
            self._kept.append((draws, logits[: len(samples)].clone()))
        else:
            self._look(draws, logits)

    def _look(self, draws: list[tuple[int, Sample, int]], logits: Tensor) -> None:
        host = logits.cpu()
        for place, sample, index in draws:
            self._digests.setdefault(sample, {})[index] = digest(host[place])

    def digests(self, sample: Sample) -> tuple[bytes, ...] | None:
        """Of the logits of each of its tokens; of the one draw of a request that takes none. None if none is told."""
        if not self._records:
            return None
        for draws, logits in self._kept:
            self._look(draws, logits)
        self._kept = []
        found = self._digests.get(sample, {})
        return tuple(found.get(index, b"") for index in range(max(1, len(sample.token_ids))))


class RecordingEngine(Engine):
    """An engine of which a recorder is told, on a backend that may be watched.

    Args:
        watches: see `watched_backend`; None leaves the backend as it is.
        trace: one of them, if there is one.
        records: False tells no logits: steps then are as users run them.
        options: those of `Engine`.
    """

    def __init__(
        self,
        model: LlamaLM,
        watches: Sequence[Watch] | None,
        trace: Trace | None,
        *,
        records: bool = True,
        **options: Any,
    ) -> None:
        self._watches = watches
        super().__init__(model, **options)
        self.recorder = Recorder(self, trace, records)
        # What was never written shows if it is read.
        self.cache.pool.fill_(torch.nan)

    @property
    def ops(self) -> ModuleType:
        """The backend."""
        return self._ops

    @ops.setter
    def ops(self, ops: ModuleType) -> None:
        self._ops = ops if self._watches is None else watched_backend(ops, self._watches)

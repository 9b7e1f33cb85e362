"""Which sample has which row, the draws enqueued ahead of the host, and what of them it has yet to read.

    sizes    the smallest bucket that holds the running samples is run; rows behind it move into gaps first.
    host     reads each draw's tokens, in order, from a ring of pinned memory. A sample that has ended on the device
             rests in the steps enqueued behind; one that the host ends (a stop string) draws there what nobody takes.

    guesses  tokens that may follow run beside the row of their sample, in rows at rest; what is drawn behind a guess
             that was right is the sample's next token. Draws are keyed by position and rows know nothing of each
             other, so the tokens are those that would have come one by one.

Everything that the device is told (rows that join, rest or move) is enqueued too, so it comes between the right steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.request import Sample
from llama_fast.ops import transfers
from llama_fast.ops.shared import AT_REST

OnLogits = Callable[[Sequence[Sample | None], Tensor], None]


class _Row:
    """A sample in a row of the device, counted in draws that are enqueued.

    Attributes:
        left: tokens that it may still draw.
        forbids: tokens for which its stop ids stay forbidden.
        num_pages: pages that the device knows of.
    """

    def __init__(self, sample: Sample) -> None:
        sampling = sample.request.sampling
        self.sample = sample
        # Without new tokens one is drawn all the same, and dropped.
        self.left = max(1, sample.sequence.max_len - len(sample.sequence.token_ids))
        self.forbids = max(0, sampling.min_tokens - len(sample.token_ids)) if sampling.stop_token_ids else 0
        self.num_pages = len(sample.sequence.pages)

    @property
    def has_tables(self) -> bool:
        """Whether its next draw depends on penalties or bias."""
        sampling = self.sample.request.sampling
        return sampling.penalizes or bool(sampling.logit_bias) or self.forbids > 0

    @property
    def needs_full_step(self) -> bool:
        return self.has_tables or self.sample.logprobs is not None


@dataclass(frozen=True)
class _Draw:
    """On its way to the host: `samples` by place (None: a row at rest), their tokens in the ring, and the log
    probabilities of the places in `scored`."""

    samples: Sequence[Sample | None]
    ring_place: int
    scored: Sequence[int]
    log_probs: tuple[Tensor, ...]
    guesses: Mapping[int, _Guess]


@dataclass(frozen=True)
class _Guess:
    """Tokens guessed for the sample at a place, and the places that verify them: each draws behind one of them."""

    token_ids: Sequence[int]
    places: Sequence[int]


LogProbs = tuple[float, int, list[float], list[int]]


@dataclass(frozen=True)
class Drawn:
    """Tokens that the host has read for one sample: one, or more where guesses were right.

    Attributes:
        token_ids: the last is -1 where none could be drawn.
        log_probs: of each, if the sample wants them, as `ops.log_probs` gives them: chosen, rank, top values, top ids.
        guessed, right: tokens that were guessed, and how many of them rightly.
    """

    sample: Sample
    token_ids: list[int]
    log_probs: list[LogProbs | None]
    guessed: int = 0
    right: int = 0


class Decoder:
    """Rows of a DecodeGraph, and draws on their way.

    Args:
        graph: runs the steps.
        ops: the backend.
        device: where it runs.
        steps_ahead: draws that may be unread when the host waits for the first; default the graph's.
    """

    def __init__(
        self, graph: DecodeGraph, ops: ModuleType, device: torch.device, steps_ahead: int | None = None
    ) -> None:
        self.graph = graph
        self._ops = ops
        self.steps_ahead = graph.steps_ahead if steps_ahead is None else steps_ahead
        # And a draw of prompts that are through.
        self._ring = transfers.HostRing(self.steps_ahead + 1, graph.max_batch, device)
        # Sees the samples and logits of every draw, in tests; steps are full ones then.
        self.on_logits: OnLogits | None = None
        self.forget()

    def forget(self) -> None:
        """Drop all rows and all that is on its way."""
        self._rows: list[_Row | None] = []
        self._unread: deque[_Draw] = deque()
        # What `read` met after it had the tokens: rows must join again.
        self.failed: Exception | None = None
        self.graph.rows.rest_all()

    @property
    def samples(self) -> list[Sample]:
        """Those that have further tokens to draw."""
        return [row.sample for row in self._rows if row is not None]

    @property
    def unread(self) -> int:
        """Draws that the host has not read."""
        return len(self._unread)

    @property
    def is_ahead(self) -> bool:
        """Whether the host should read a draw before the next step."""
        return self.unread >= self.steps_ahead

    @property
    def may_enqueue(self) -> bool:
        """Whether a step would draw something."""
        if self._unread and self._unread[-1].guesses:
            return False  # where the sample's row goes on is known only then
        return any(row is not None for row in self._rows)

    @property
    def num_idle(self) -> int:
        """Rows that could verify guesses."""
        return self.graph.max_batch - len(self.samples)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def join(self, samples: Sequence[Sample]) -> None:
        """Take in samples of which all tokens but the last are in the cache.

        Those that have no token yet `draw` one next: their prompt's last token has run.
        """
        places = []
        for sample in samples:
            if None not in self._rows:
                self._rows.append(None)
            places.append(self._rows.index(None))
            self._rows[places[-1]] = _Row(sample)
        if places:
            self.graph.rows.join(places, samples)

    def join_again(self) -> None:
        """Set all rows up anew from what the host knows, which is all: nothing is unread."""
        samples = self.samples
        self.forget()
        self.join(samples)

    def grow(self, sample: Sample) -> None:
        """The sample's sequence has further pages."""
        pages = sample.sequence.pages
        for index, row in enumerate(self._rows):
            if row is not None and row.sample is sample:
                self.graph.rows.add_pages(index, row.num_pages, pages[row.num_pages :])
                row.num_pages = len(pages)

    def leave(self, sample: Sample, at_rest: bool) -> None:
        """A sample ended; `at_rest`: its row rests already."""
        for index, row in enumerate(self._rows):
            if row is not None and row.sample is sample:
                if not at_rest:
                    self.graph.rows.rest(index)
                self._rows[index] = None

    def _compact(self, more: int = 0) -> int:
        """Move rows into gaps until the smallest bucket holds them and `more`; returns its size."""
        size = self.graph.bucket(len(self.samples) + more)
        for source in range(size, len(self._rows)):
            if self._rows[source] is not None:
                target = self._rows.index(None)
                self.graph.rows.move(source, target)
                self._rows[target], self._rows[source] = self._rows[source], None
        del self._rows[size:]
        return size

    # --- draws --------------------------------------------------------------------------------------------------------

    def enqueue(self, guesses: Mapping[Sample, Sequence[int]] | None = None) -> None:
        """Enqueue a step; some row has a token to draw.

        Args:
            guesses: tokens that may follow in samples without penalties or bias, together at most `num_idle`. Each is
                run in a row of its own, as if it were the sample's: its draw counts if the draw before it was that
                token. Nothing may be unread.
        """
        guesses = guesses or {}
        size = self._compact(sum(map(len, guesses.values())))
        full = self.on_logits is not None or any(row is not None and row.needs_full_step for row in self._rows)
        samples = [None if row is None else row.sample for row in self._rows]
        indices = range(len(samples))
        placed = self._place(guesses, samples) if guesses else {}
        self.graph.run(size, full)
        self._push(samples, indices, self.graph.drawn[: len(samples)], self.graph.logits, placed)

    def _place(self, guesses: Mapping[Sample, Sequence[int]], samples: list[Sample | None]) -> dict[int, _Guess]:
        """Give guessed tokens rows at rest, and their samples these places."""
        placed, moves = {}, []
        gaps = (place for place in range(self.graph.max_batch) if place >= len(samples) or samples[place] is None)
        own = {id(sample): place for place, sample in enumerate(samples)}
        for sample, token_ids in guesses.items():
            row = own[id(sample)]
            places = [next(gaps) for _ in token_ids]
            placed[row] = _Guess(token_ids, places)
            moves += [(row, *of) for of in zip(places, token_ids, range(1, len(places) + 1), strict=True)]
            samples += [None] * (1 + places[-1] - len(samples))
            for place in places:
                samples[place] = sample
        rows, targets, token_ids, ahead = zip(*moves, strict=True)
        self.graph.rows.guess(rows, targets, token_ids, ahead)
        return placed

    def draw(self, samples: Sequence[Sample], logits: Tensor) -> None:
        """Enqueue a draw for samples that have rows from logits [len(samples), vocab_size] of a run of prompts."""
        places = {id(row.sample): index for index, row in enumerate(self._rows) if row is not None}
        indices = [places[id(sample)] for sample in samples]
        full = any(row is not None and row.has_tables for row in (self._rows[index] for index in indices))
        on_device = transfers.to_device(indices, torch.int64, logits.device)
        rows = self.graph.rows
        tokens = self._ops.sample(logits, rows.sampling_of(on_device, with_tables=full))
        self._push(samples, indices, self._ops.advance(tokens, on_device, rows, full), logits)

    def _push(
        self,
        samples: Sequence[Sample | None],
        indices: Sequence[int],
        drawn: Tensor,
        logits: Tensor,
        guesses: Mapping[int, _Guess] | None = None,
    ) -> None:
        """Send a draw to the host, and what else it wants to know; count it for the rows `indices`."""
        if self.on_logits is not None:
            self.on_logits(samples, logits)
        scored = [place for place, sample in enumerate(samples) if sample is not None and sample.logprobs is not None]
        log_probs: tuple[Tensor, ...] = ()
        if scored:
            num_top = max(_num_top(samples[place]) for place in scored)
            places = transfers.to_device(scored, torch.int64, drawn.device)
            log_probs = tuple(
                map(transfers.to_host, self._ops.log_probs(logits[places], drawn[places].clamp(min=0), num_top))
            )
        self._unread.append(_Draw(samples, self._ring.push(drawn), scored, log_probs, guesses or {}))
        for index in indices:
            row = self._rows[index]
            if row is None:
                continue
            row.left -= 1
            row.forbids -= 1  # below 0 where nothing was forbidden
            if row.forbids == 0:
                self.graph.rows.allow_stops(index, row.sample)
            if not row.left:
                # The device puts it to rest by its limit: the row is free for others behind this step.
                self._rows[index] = None

    def read(self) -> list[Drawn]:
        """Wait for the oldest draw; what of it samples take that have not ended since."""
        draw = self._unread.popleft()
        token_ids = self._ring.read(draw.ring_place, len(draw.samples))
        scores = dict(zip(draw.scored, zip(*(t.tolist() for t in draw.log_probs), strict=True), strict=True))
        if draw.guesses:
            return self._read_guesses(draw, token_ids, scores)
        return [
            Drawn(sample, [token_id], [scores.get(place)])
            for place, (sample, token_id) in enumerate(zip(draw.samples, token_ids, strict=True))
            if sample is not None and sample.finish_reason is None and token_id != AT_REST
        ]

    def _read_guesses(self, draw: _Draw, token_ids: list[int], scores: dict[int, LogProbs]) -> list[Drawn]:
        """The same where some places verified guesses."""
        verifying = {place for guess in draw.guesses.values() for place in guess.places}
        drawn, moves = [], []
        for place, sample in enumerate(draw.samples):
            if sample is None or place in verifying or token_ids[place] == AT_REST:
                continue
            places, guess = [place], draw.guesses.get(place, _Guess((), ()))
            for guessed, behind in zip(guess.token_ids, guess.places, strict=True):
                if token_ids[places[-1]] != guessed:
                    break
                places.append(behind)
            taken = [token_ids[one] for one in places]
            row = self._rows[place]
            if len(taken) > 1 and row is not None:
                row.left -= len(taken) - 1
                moves.append((place, taken[-1], len(taken) - 1))
            of_sample = [scores.get(one) for one in places]
            drawn.append(Drawn(sample, taken, of_sample, len(guess.token_ids), len(taken) - 1))
        try:
            if moves:
                self.graph.rows.go_on(*zip(*moves, strict=True))
            self.graph.rows.rest(*verifying)
        except Exception as error:
            # The tokens are known all the same.
            self.failed = error
        return drawn


def _num_top(sample: Sample | None) -> int:
    return 0 if sample is None else sample.request.sampling.logprobs or 0

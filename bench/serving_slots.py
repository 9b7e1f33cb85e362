"""llama.cpp's slots: which tokens its next batch holds. The loop around it is in serving_workers.py.

As its server fills a batch: first the last token of each sequence that generates, then tokens of prompts, in order of
arrival, until the batch is full. A slot takes the next request as soon as its own has ended.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Token(NamedTuple):
    """One token of a llama_batch; `wanted`: its logits are."""

    token_id: int
    position: int
    sequence: int
    wanted: bool


@dataclass
class _Slot:
    """A request that runs: `num_run` of its prompt's and generated tokens are in the cache, or in the next batch."""

    index: int
    prompt: Sequence[int]
    output_len: int
    num_run: int = 0
    token_ids: list[int] = field(default_factory=list)


class Slots:
    """Requests that wait, and those that run.

    Attributes:
        token_ids: of each request, what was generated.
        times: of each, when each token was there.

    Args:
        output_lens: tokens to generate for each prompt; at least 1.
        num_slots: requests that run at once.
        batch_size: the most tokens of a batch, at least num_slots.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], output_lens: Sequence[int], num_slots: int, batch_size: int
    ) -> None:
        pairs = enumerate(zip(prompts, output_lens, strict=True))
        self._waiting = deque(_Slot(index, prompt, length) for index, (prompt, length) in pairs)
        self._slots: list[_Slot | None] = [None] * num_slots
        self._batch_size = batch_size
        # Sequences whose logits the last batch gives, in its order.
        self._wanted: list[int] = []
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.times: list[list[float]] = [[] for _ in prompts]

    def next_batch(self) -> list[Token]:
        """Its tokens; none: all requests have ended."""
        for sequence, slot in enumerate(self._slots):
            if slot is None and self._waiting:
                self._slots[sequence] = self._waiting.popleft()
        running = sorted((slot.index, sequence, slot) for sequence, slot in enumerate(self._slots) if slot is not None)
        tokens = []
        for _, sequence, slot in running:
            if slot.token_ids:
                tokens.append(Token(slot.token_ids[-1], slot.num_run, sequence, True))
                slot.num_run += 1
        for _, sequence, slot in running:
            if not slot.token_ids:
                end = min(len(slot.prompt), slot.num_run + self._batch_size - len(tokens))
                for position in range(slot.num_run, end):
                    wanted = position == len(slot.prompt) - 1
                    tokens.append(Token(slot.prompt[position], position, sequence, wanted))
                slot.num_run = end
        self._wanted = [token.sequence for token in tokens if token.wanted]
        return tokens

    @property
    def num_wanted(self) -> int:
        """Rows of logits that the last batch gives."""
        return len(self._wanted)

    def take(self, chosen: Sequence[int], now: float) -> list[int]:
        """What was chosen from these rows; returns the sequences that ended, whose cells are free."""
        ended = []
        for sequence, token_id in zip(self._wanted, chosen, strict=True):
            slot = self._slots[sequence]
            assert slot is not None
            slot.token_ids.append(token_id)
            self.times[slot.index].append(now)
            if len(slot.token_ids) == slot.output_len:
                self.token_ids[slot.index] = slot.token_ids
                self._slots[sequence] = None
                ended.append(sequence)
        return ended

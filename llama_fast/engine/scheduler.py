"""Which tokens run in the next step. No torch here: lists of numbers, tested in milliseconds.

First come, first served: a request is admitted when its samples fit the batch and all the pages it can ever need are
free, so that a running request never waits for memory. Prompts are worked on in chunks beside the generated tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from llama_fast.engine.page_allocator import PageAllocator


@dataclass(eq=False)
class Sequence:
    """One sample's tokens and their place in the cache.

    Attributes:
        token_ids: prompt and generated ids.
        prompt_len: how many of them are prompt.
        max_len: prompt_len + the most tokens to generate.
        num_samples: samples of the request; they fork off this sequence when its prompt has run.
        num_computed: tokens whose K and V are in the cache.
        pages: its pages in slot order.
        fork_pages: pages kept for each further sample.
    """

    token_ids: list[int]
    prompt_len: int
    max_len: int
    num_samples: int = 1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    fork_pages: list[list[int]] = field(default_factory=list)

    @property
    def cache_len(self) -> int:
        """Slots it can ever fill: the last generated token is never run."""
        return max(self.max_len - 1, self.prompt_len)


@dataclass(frozen=True)
class Work:
    """Tokens [start, end) of a sequence to run next."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens predicts a new one."""
        return self.end == len(self.sequence.token_ids)


class Scheduler:
    """Waiting and running sequences over one page allocator.

    Args:
        num_pages, page_size: of the cache.
        max_batch: sequences that may run at once.
        prefill_chunk: prompt tokens run in one step, over all prompts.
    """

    def __init__(self, num_pages: int, page_size: int, max_batch: int, prefill_chunk: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.page_size = page_size
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_needed(self, sequence: Sequence) -> int:
        """Pages of all its samples: the prompt's full pages once, the rest for each."""
        total = -(-sequence.cache_len // self.page_size)
        shared = sequence.prompt_len // self.page_size
        return total + (sequence.num_samples - 1) * (total - shared)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits an empty engine."""
        self.waiting.append(sequence)

    def plan(self) -> list[Work]:
        """Admit what fits, then choose the next chunks of prompts, up to the budget; what decodes needs no plan."""
        self._admit()
        works = []
        budget = self.prefill_chunk
        for sequence in self.running:
            start = sequence.num_computed
            if budget and start < sequence.prompt_len:
                end = min(sequence.prompt_len, start + budget)
                budget -= end - start
                works.append(Work(sequence, start, end))
        return works

    def _admit(self) -> None:
        # A sequence whose samples have not forked yet holds the batch places of all of them.
        places = self.max_batch - sum(1 + len(sequence.fork_pages) for sequence in self.running)
        while self.waiting:
            sequence = self.waiting[0]
            if sequence.num_samples > places or self.pages_needed(sequence) > self.allocator.num_free:
                return
            self.waiting.popleft()
            places -= sequence.num_samples
            total = -(-sequence.cache_len // self.page_size)
            shared = sequence.prompt_len // self.page_size
            sequence.pages = self.allocator.allocate(total)
            sequence.fork_pages = [self.allocator.allocate(total - shared) for _ in range(sequence.num_samples - 1)]
            self.running.append(sequence)

    def fork(self, sequence: Sequence) -> tuple[list[Sequence], list[int], list[int]]:
        """Split off the further samples once the prompt has run.

        Returns:
            The new sequences, and pages to copy: from, to. Full prompt pages are shared, a partly filled one is copied.
        """
        shared = sequence.pages[: sequence.prompt_len // self.page_size]
        forks, source, target = [], [], []
        for own_pages in sequence.fork_pages:
            self.allocator.share(shared)
            forks.append(
                Sequence(
                    token_ids=list(sequence.token_ids),
                    prompt_len=sequence.prompt_len,
                    max_len=sequence.max_len,
                    num_computed=sequence.num_computed,
                    pages=[*shared, *own_pages],
                )
            )
            if sequence.prompt_len % self.page_size:
                source.append(sequence.pages[len(shared)])
                target.append(own_pages[0])
        sequence.fork_pages = []
        self.running.extend(forks)
        return forks, source, target

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and release its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        for pages in (sequence.pages, *sequence.fork_pages):
            self.allocator.release(pages)
        sequence.pages, sequence.fork_pages = [], []

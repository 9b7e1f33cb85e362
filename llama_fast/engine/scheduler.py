"""What runs in the next step, and where its tokens lie. No torch here: lists of numbers, tested in milliseconds.

order      by priority, then first come, first served. Only the head of the queue is admitted: nothing overtakes it.
budget     a step runs at most `token_budget` tokens: one for each sequence that decodes, the rest are prompts' chunks.
           So a generated token never waits for more than one chunk.
pages      are taken as sequences grow. Where none is free the last of the running sequences in order gives all of its
           pages up: their content waits in the host's memory (preempted), until it is the sequence's turn again.
sharing    full pages of prompts that were run before are used again (prefix_cache.py). A prompt waits a step where
           another one is just running the page it needs next.

The first sequence in order can always go on: all others would give up their pages for it, and what could not run alone
is refused beforehand. So every request ends, after no more steps than those before it in order take one by one.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field

from llama_fast.engine.page_allocator import PageAllocator
from llama_fast.engine.prefix_cache import Prefix, PrefixCache


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
        priority: lower ones run first.
        guesses: tokens that may be verified at once behind its last one.
        root: what its pages depend on besides tokens (see prefix_cache.py); None: it takes no page of others.
        order: its place among all sequences, given by `Scheduler.add`.
        preempted: its content is in the host's memory.
        prefix: how far its pages are known.
    """

    token_ids: list[int]
    prompt_len: int
    max_len: int
    num_samples: int = 1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    fork_pages: list[list[int]] = field(default_factory=list)
    priority: int = 0
    guesses: int = 0
    root: Hashable = None
    order: tuple[int, int, int] = (0, 0, 0)
    preempted: bool = False
    prefix: Prefix | None = None

    @property
    def cache_len(self) -> int:
        """Slots it can ever fill: the last generated token is never run."""
        return max(self.max_len - 1, self.prompt_len)

    @property
    def is_prompt(self) -> bool:
        """Whether tokens of its prompt are still to be run."""
        return self.num_computed < self.prompt_len

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


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


@dataclass
class Plan:
    """What to do in a step, in this order.

    Attributes:
        preempted: sequences and the pages whose content must go to the host before anything else is written.
        resumed: sequences and the pages of theirs, by place, whose content must come back; the others are there.
        grown: sequences that decode and have further pages.
        works: chunks of prompts.
    """

    preempted: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    resumed: list[tuple[Sequence, range]] = field(default_factory=list)
    grown: list[Sequence] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)


@dataclass
class SchedulerCounts:
    """Since the scheduler was made.

    Attributes:
        preempted: times that a sequence gave up its pages.
        prompt_tokens: of the requests whose prompts began to run, in all.
        shared_tokens: of these, those that were not run, as a page held them.
    """

    preempted: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0


class Scheduler:
    """Waiting and running sequences over one page allocator.

    Args:
        num_pages, page_size: of the cache.
        max_batch: sequences that may run at once.
        token_budget: tokens run in one step, of prompts and of sequences that decode.
        lookahead: tokens that a sequence may draw before the next plan.
        share_prefixes: whether pages are used again.
        share_generated: whether pages with generated tokens are, too: where they have the bits of a prompt's.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_batch: int,
        token_budget: int,
        *,
        lookahead: int = 1,
        share_prefixes: bool = False,
        share_generated: bool = False,
    ) -> None:
        self.allocator = PageAllocator(num_pages)
        self.prefixes = PrefixCache(self.allocator) if share_prefixes else None
        self.page_size = page_size
        self.max_batch = max_batch
        self.token_budget = token_budget
        self.lookahead = lookahead
        self.share_generated = share_generated
        # A heap: the first in order is waiting[0].
        self.waiting: list[Sequence] = []
        # In order.
        self.running: list[Sequence] = []
        self.counts = SchedulerCounts()
        # The head of the queue that found too few pages, and how many it wanted: not to look at its prompt every step.
        self._blocked: tuple[Sequence, int] | None = None
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def pages_needed(self, sequence: Sequence) -> int:
        """Pages of all its samples at their end: the prompt's full pages once, the rest for each."""
        total = self._pages_of(sequence.cache_len)
        shared = sequence.prompt_len // self.page_size
        return total + (sequence.num_samples - 1) * (total - shared)

    def stats(self) -> dict[str, int]:
        """Counts, as EngineStats has them."""
        return {
            "waiting": len(self.waiting),
            "running": len(self.running),
            "pages": self.allocator.num_pages,
            "free_pages": self.allocator.num_free,
            "shared_pages": 0 if self.prefixes is None else len(self.prefixes),
            **vars(self.counts),
        }

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits an empty engine."""
        sequence.order = (sequence.priority, next(self._arrivals), 0)
        if self.prefixes is not None and sequence.root is not None:
            sequence.prefix = Prefix(sequence.root, sequence.token_ids, self.page_size)
        heapq.heappush(self.waiting, sequence)

    # --- a step -------------------------------------------------------------------------------------------------------

    @property
    def must_preempt(self) -> bool:
        """Whether the next plan will take pages from a running sequence. All its tokens must be known by then."""
        growth = sum(len(self._missing(sequence)) for sequence in self.running if not sequence.is_prompt)
        return growth > self.allocator.num_free

    def plan(self) -> Plan:
        """Give what decodes its pages, admit what fits, then choose the next chunks of prompts, up to the budget."""
        plan = Plan()
        self._grow(plan)
        if not plan.preempted:
            self._admit(plan)
        self._choose_chunks(plan)
        return plan

    def _pages_of(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def _wanted(self, sequence: Sequence) -> int:
        """Pages that it may fill before the next plan."""
        ahead = max(self.lookahead, 1 + sequence.guesses)
        return self._pages_of(min(sequence.cache_len, len(sequence.token_ids) - 1 + ahead))

    def _missing(self, sequence: Sequence) -> range:
        return range(len(sequence.pages), self._wanted(sequence))

    def _grow(self, plan: Plan) -> None:
        for sequence in [s for s in self.running if not s.is_prompt and self._missing(s)]:
            while not sequence.preempted and len(self._missing(sequence)) > self.allocator.num_free:
                self._preempt(self.running[-1], plan)
            if not sequence.preempted:
                sequence.pages += self.allocator.allocate(len(self._missing(sequence)))
                plan.grown.append(sequence)

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        if self.share_generated and not sequence.is_prompt:
            self._make_known(sequence, sequence.num_computed)
        pages = sequence.pages[: self._pages_of(sequence.num_computed)]
        plan.preempted.append((sequence, pages))
        plan.grown = [other for other in plan.grown if other is not sequence]
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted = True
        self.counts.preempted += 1
        heapq.heappush(self.waiting, sequence)

    def _admit(self, plan: Plan) -> None:
        # A sequence whose samples have not forked yet holds the batch places of all of them.
        places = self.max_batch - sum(1 + len(sequence.fork_pages) for sequence in self.running)
        while self.waiting and self._samples_of(self.waiting[0]) <= places:
            if not self._start(self.waiting[0], plan):
                return
            sequence = heapq.heappop(self.waiting)
            places -= 1 + len(sequence.fork_pages)
            self.running.append(sequence)
            self.running.sort()

    def _samples_of(self, sequence: Sequence) -> int:
        return sequence.num_samples if sequence.is_prompt else 1

    def _start(self, sequence: Sequence, plan: Plan) -> bool:
        """Take pages for a waiting sequence, if there are enough."""
        # What runs may want a page each before it is anybody's turn again: giving them up at once would be in vain.
        spare = sum(len(other.pages) < self._pages_of(other.cache_len) for other in self.running)
        if self._blocked is not None and self._blocked[0] is sequence:
            if self._blocked[1] + spare > self.allocator.num_free:
                return False
            self._blocked = None
        computed = self._pages_of(sequence.num_computed)
        known = self._take_known(sequence, sequence.num_computed if sequence.preempted else sequence.prompt_len - 1)
        total = self._wanted(sequence)
        forks = self._samples_of(sequence) - 1
        own = total - sequence.prompt_len // self.page_size
        wanted = total - known + forks * own
        if wanted + spare > self.allocator.num_free:
            self._release(sequence)
            self._blocked = (sequence, wanted)
            return False
        sequence.pages += self.allocator.allocate(total - known)
        sequence.fork_pages = [self.allocator.allocate(own) for _ in range(forks)]
        if sequence.preempted:
            sequence.preempted = False
            plan.resumed.append((sequence, range(known, computed)))
        else:
            self.counts.prompt_tokens += sequence.prompt_len
            self._skip_known(sequence, known)
        return True

    def _take_known(self, sequence: Sequence, most: int) -> int:
        """Share pages that hold the sequence's first tokens, at most `most` of them; how many pages."""
        prefix = sequence.prefix
        count = 0
        while prefix is not None and self.prefixes is not None and (count + 1) * self.page_size <= most:
            page = self.prefixes.find(prefix, count)
            if page is None:
                break
            self.prefixes.enter(prefix, count)
            self.allocator.share([page])
            sequence.pages.append(page)
            count += 1
        return count

    def _skip_known(self, sequence: Sequence, num_pages: int) -> None:
        sequence.num_computed += num_pages * self.page_size
        self.counts.shared_tokens += num_pages * self.page_size

    def _choose_chunks(self, plan: Plan) -> None:
        budget = max(1, self.token_budget - sum(not sequence.is_prompt for sequence in self.running))
        # Pages that this step will fill: who needs one of them next waits for it.
        coming: set[bytes] = set()
        for sequence in self.running:
            if not sequence.is_prompt:
                continue
            if not budget:
                return
            self._share_next(sequence)
            start = sequence.num_computed
            prefix, next_page = sequence.prefix, start // self.page_size
            may_share = prefix is not None and self._may_share(sequence, next_page)
            if may_share and prefix is not None and prefix.key(next_page) in coming:
                continue
            end = min(sequence.prompt_len, start + budget)
            budget -= end - start
            plan.works.append(Work(sequence, start, end))
            if prefix is not None:
                coming |= {prefix.key(page) for page in range(next_page, end // self.page_size)}

    def _may_share(self, sequence: Sequence, page: int) -> bool:
        """Whether a page of others may stand for the sequence's page; its last prompt token is always run."""
        at_border = sequence.num_computed == page * self.page_size
        return at_border and sequence.num_computed + self.page_size < sequence.prompt_len

    def _share_next(self, sequence: Sequence) -> None:
        """Take pages that others have filled since the sequence was admitted, in the place of its own."""
        prefix = sequence.prefix
        while prefix is not None and self.prefixes is not None:
            index = sequence.num_computed // self.page_size
            page = self.prefixes.find(prefix, index) if self._may_share(sequence, index) else None
            if page is None:
                return
            self.allocator.share([page])
            self.allocator.release([sequence.pages[index]])
            sequence.pages[index] = page
            self.prefixes.enter(prefix, index)
            self._skip_known(sequence, 1)

    # --- what happened ------------------------------------------------------------------------------------------------

    def ran(self, work: Work) -> None:
        """The work is done: its K and V are in the cache."""
        sequence = work.sequence
        sequence.num_computed = work.end
        self._make_known(sequence, min(work.end, sequence.prompt_len))

    def _make_known(self, sequence: Sequence, num_tokens: int) -> None:
        prefix = sequence.prefix
        if prefix is None or self.prefixes is None:
            return
        for index in range(len(prefix.entries), num_tokens // self.page_size):
            self.prefixes.add(prefix, index, sequence.pages[index])

    def fork(self, sequence: Sequence) -> tuple[list[Sequence], list[int], list[int]]:
        """Split off the further samples once the prompt has run.

        Returns:
            The new sequences, and pages to copy: from, to. Full prompt pages are shared, a partly filled one is copied.
        """
        shared = sequence.pages[: sequence.prompt_len // self.page_size]
        forks, source, target = [], [], []
        priority, arrival, _ = sequence.order
        for number, own_pages in enumerate(sequence.fork_pages, start=1):
            self.allocator.share(shared)
            fork = Sequence(
                token_ids=list(sequence.token_ids),
                prompt_len=sequence.prompt_len,
                max_len=sequence.max_len,
                num_computed=sequence.num_computed,
                pages=[*shared, *own_pages],
                priority=sequence.priority,
                guesses=sequence.guesses,
                root=sequence.root,
                order=(priority, arrival, number),
            )
            if sequence.prefix is not None:
                fork.prefix = Prefix(sequence.root, fork.token_ids, self.page_size)
                fork.prefix.entries = list(sequence.prefix.entries)
            forks.append(fork)
            if sequence.prompt_len % self.page_size:
                source.append(sequence.pages[len(shared)])
                target.append(own_pages[0])
        sequence.fork_pages = []
        self.running += forks
        self.running.sort()
        return forks, source, target

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and release its pages."""
        if sequence in self.running:
            if self.share_generated and not sequence.is_prompt:
                self._make_known(sequence, sequence.num_computed)
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            heapq.heapify(self.waiting)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        for pages in (sequence.pages, *sequence.fork_pages):
            self.allocator.release(pages)
        sequence.pages, sequence.fork_pages = [], []
        if sequence.prefix is not None:
            sequence.prefix.entries.clear()

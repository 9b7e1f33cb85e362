"""The queue: order, budget, pages on demand, preemption, shared prefixes, forks. No model, no torch.

`Driver` does what the engine does with a plan, and keeps what a device would hold: for every page and slot the tokens
that were written there. Each step it checks that all a sequence reads is what it should be.
"""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_fast.engine import prefix_cache
from llama_fast.engine.scheduler import Scheduler, Sequence


class Driver:
    """A scheduler and a cache that holds, for each slot, the tokens it was computed from."""

    def __init__(self, num_pages, page_size, max_batch, budget, *, lookahead=1, **sharing):
        self.scheduler = Scheduler(num_pages, page_size, max_batch, budget, lookahead=lookahead, **sharing)
        self.lookahead, self.budget = lookahead, budget
        self.pool = [[None] * page_size for _ in range(num_pages)]
        self.host = {}
        self.finished, self.started, self.steps = [], [], 0
        # Of sequences that decode: tokens drawn and not told to the host yet.
        self.unread = {}

    def add(self, prompt, max_tokens, num_samples=1, priority=0, root=()):
        sequence = Sequence(list(prompt), len(prompt), len(prompt) + max_tokens, num_samples, priority=priority)
        sequence.root = root
        assert self.scheduler.pages_needed(sequence) <= self.scheduler.allocator.num_pages
        assert num_samples <= self.scheduler.max_batch
        self.scheduler.add(sequence)
        return sequence

    # --- the cache ----------------------------------------------------------------------------------------------------

    def _write(self, sequence, start, end):
        size = self.scheduler.page_size
        tokens = (sequence.root, *sequence.token_ids)
        for slot in range(start, end):
            page = sequence.pages[slot // size]
            assert self.scheduler.allocator.holders(page) == 1, "a shared page is written"
            self.pool[page][slot % size] = hash(tokens[: slot + 2])

    def _check_reads(self, sequence, end):
        """All slots before `end` hold what this sequence would have written."""
        size = self.scheduler.page_size
        tokens = (sequence.root, *sequence.token_ids)
        for slot in range(end):
            found = self.pool[sequence.pages[slot // size]][slot % size]
            assert found == hash(tokens[: slot + 2]), f"slot {slot} holds another token's K and V"

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self):
        """As Running.step, with a device that draws `lookahead` tokens before the host reads the first."""
        scheduler = self.scheduler
        self.steps += 1
        if scheduler.must_preempt and any(self.unread.values()):
            self._read()
            return []
        decoding = [s for s in scheduler.running if not s.is_prompt]
        plan = scheduler.plan()
        for sequence, pages in plan.preempted:
            assert not self.unread.get(sequence), "a sequence is preempted whose tokens are not all known"
            self.host[sequence] = [list(self.pool[page]) for page in pages]
            assert not sequence.pages and not sequence.fork_pages
        for sequence, places in plan.resumed:
            kept = self.host.pop(sequence)
            for place in places:
                self.pool[sequence.pages[place]] = list(kept[place])
            self._check_reads(sequence, sequence.num_computed)
        self._check_plan(plan, decoding)
        for work in plan.works:
            self._check_reads(work.sequence, work.start)
            self._write(work.sequence, work.start, work.end)
            if work.start == 0 or not self.started or work.sequence not in self.started:
                self.started.append(work.sequence)
        for work in plan.works:
            scheduler.ran(work)
        for work in plan.works:
            if work.end == work.sequence.prompt_len:
                forks, source, target = scheduler.fork(work.sequence)
                for page, copy in zip(source, target, strict=True):
                    self.pool[copy] = list(self.pool[page])
                for sequence in [work.sequence, *forks]:
                    self.unread[sequence] = 1
        for sequence in [s for s in scheduler.running if not s.is_prompt]:
            self._decode(sequence)
        if any(self.unread.values()):
            self._read()
        return plan.works

    def _decode(self, sequence):
        """The device goes on by itself until `lookahead` tokens are unread."""
        while self.unread.setdefault(sequence, 0) < self.lookahead:
            slot = len(sequence.token_ids) - 1 + self.unread[sequence]
            if slot + 1 >= sequence.max_len:
                break
            assert slot < len(sequence.pages) * self.scheduler.page_size, "no page for an enqueued step"
            page = sequence.pages[slot // self.scheduler.page_size]
            assert self.scheduler.allocator.holders(page) == 1, "a shared page is written"
            self.unread[sequence] += 1

    def _read(self):
        for sequence in [s for s in self.scheduler.running if self.unread.get(s)]:
            self.unread[sequence] -= 1
            length = len(sequence.token_ids)
            if sequence.num_computed < length:
                # The step that drew this token ran the one before it.
                self._write(sequence, sequence.num_computed, length)
            self._check_reads(sequence, length)
            sequence.num_computed = length
            sequence.token_ids.append((sequence.order[2] + 7 * length) % 5)
            if len(sequence.token_ids) >= sequence.max_len:
                self.drop(sequence)
                self.finished.append(sequence)

    def drop(self, sequence):
        self.scheduler.finish(sequence)
        self.unread.pop(sequence, None)
        self.host.pop(sequence, None)

    def _check_plan(self, plan, decoding):
        scheduler = self.scheduler
        going_on = [s for s in decoding if not s.preempted]
        tokens = sum(work.end - work.start for work in plan.works)
        assert tokens <= max(1, self.budget - len(going_on)), "a generated token waits for more than one chunk"
        assert sum(1 + len(s.fork_pages) for s in scheduler.running) <= scheduler.max_batch
        assert plan.works or going_on or any(not s.is_prompt for s in scheduler.running), "nothing would ever happen"
        for work in plan.works:
            assert work.start == work.sequence.num_computed < work.end <= work.sequence.prompt_len
            assert work.end <= len(work.sequence.pages) * scheduler.page_size

    def audit(self):
        """Every page is counted exactly as often as it is held."""
        scheduler = self.scheduler
        held = [0] * scheduler.allocator.num_pages
        for sequence in scheduler.running:
            for page in [*sequence.pages, *(page for fork in sequence.fork_pages for page in fork)]:
                held[page] += 1
        assert [scheduler.allocator.holders(page) for page in range(len(held))] == held
        assert scheduler.allocator.num_free == held.count(0)
        assert all(not s.pages and not s.fork_pages for s in scheduler.waiting)
        assert {s for s in scheduler.waiting if s.preempted} == set(self.host)
        assert scheduler.running == sorted(scheduler.running)

    def run(self, most=100_000):
        while self.scheduler.has_work:
            self.step()
            self.audit()
            assert self.steps < most, "it never ends"
        assert self.scheduler.allocator.num_free == self.scheduler.allocator.num_pages


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=40)
SHARING = st.sampled_from([{}, {"share_prefixes": True}, {"share_prefixes": True, "share_generated": True}])


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(PROMPTS, st.integers(1, 12), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=12
    ),
    page_size=st.sampled_from([1, 4, 16]),
    max_batch=st.integers(3, 6),
    budget=st.integers(1, 50),
    lookahead=st.integers(1, 3),
    spare_pages=st.integers(0, 30),
    sharing=SHARING,
)
def test_every_request_finishes_and_no_page_leaks(
    requests, page_size, max_batch, budget, lookahead, spare_pages, sharing
):
    probe = Scheduler(1, page_size, max_batch, budget)
    most = max(probe.pages_needed(Sequence(p, len(p), len(p) + m, n)) for p, m, n, _ in requests)
    driver = Driver(most + spare_pages, page_size, max_batch, budget, lookahead=lookahead, **sharing)
    added = [driver.add(*request) for request in requests]
    driver.run()
    assert len(driver.finished) == sum(n for _, _, n, _ in requests)
    # First come, first served within a priority, up to the step in which a prompt waits for a page that it will share.
    if not sharing and len({priority for *_, priority in requests}) == 1:
        firsts = [sequence for sequence in dict.fromkeys(driver.started) if sequence in added]
        assert firsts == added


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(PROMPTS, st.integers(1, 12)), min_size=1, max_size=10),
    budget=st.integers(5, 30),
    spare_pages=st.integers(0, 10),
    sharing=SHARING,
)
def test_a_request_ends_no_later_than_those_before_it_one_by_one(requests, budget, spare_pages, sharing):
    """The bound on waiting: the first in order goes on in every step, whatever the others do."""
    probe = Scheduler(1, 4, 4, budget)
    most = max(probe.pages_needed(Sequence(p, len(p), len(p) + m)) for p, m in requests)
    driver = Driver(most + spare_pages, 4, 4, budget, **sharing)
    added, bound = [], 0
    for prompt, max_tokens in requests:
        added.append(driver.add(prompt, max_tokens))
        # A chunk is one token at least, and at most three others take part of the budget.
        bound += -(-len(prompt) // max(1, budget - 3)) + max_tokens
        added[-1].bound = bound
    while driver.scheduler.has_work:
        driver.step()
        for sequence in driver.finished:
            sequence.ended = getattr(sequence, "ended", driver.steps)
    for sequence in added:
        assert sequence.ended <= sequence.bound


class Requests(RuleBasedStateMachine):
    """Requests come, are aborted in any state, and end; the pool is short."""

    @initialize(num_pages=st.integers(14, 22), lookahead=st.integers(1, 3), budget=st.integers(1, 20), sharing=SHARING)
    def start(self, num_pages, lookahead, budget, sharing):
        self.driver = Driver(num_pages, 4, 4, budget, lookahead=lookahead, **sharing)

    @precondition(lambda self: len(self.driver.scheduler.waiting) < 12)
    @rule(
        prompt=PROMPTS.map(lambda ids: ids[:20]),
        max_tokens=st.integers(1, 16),
        num_samples=st.integers(1, 2),
        priority=st.integers(-1, 1),
        salt=st.sampled_from(["", "other", None]),
    )
    def add(self, prompt, max_tokens, num_samples, priority, salt):
        self.driver.add(prompt, max_tokens, num_samples, priority, salt)

    @precondition(lambda self: self.driver.scheduler.has_work)
    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            if self.driver.scheduler.has_work:
                self.driver.step()
                self.driver.audit()

    @precondition(lambda self: self.driver.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data):
        scheduler = self.driver.scheduler
        self.driver.drop(data.draw(st.sampled_from([*scheduler.waiting, *scheduler.running])))

    @precondition(lambda self: self.driver.scheduler.prefixes is not None)
    @rule()
    def weights_change(self):
        self.driver.scheduler.prefixes.clear()

    @invariant()
    def pages_are_counted(self):
        if hasattr(self, "driver"):
            self.driver.audit()

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.run()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_driver_finds_a_page_that_is_taken_too_early():
    """The negative control: pages given back while their content is still wanted."""
    driver = Driver(num_pages=6, page_size=4, max_batch=4, budget=64)
    driver.add([1] * 9, 8)
    driver.step()
    (sequence,) = driver.scheduler.running
    driver.scheduler.allocator.release(sequence.pages[:1])
    other = driver.add([0] * 5, 3)
    with pytest.raises(AssertionError):
        driver.run()
    assert other.pages or other in driver.finished


# --- order ------------------------------------------------------------------------------------------------------------


def test_head_of_the_queue_is_not_overtaken():
    driver = Driver(num_pages=4, page_size=4, max_batch=8, budget=64)
    running = driver.add([0] * 8, 4)
    driver.step()
    large, small = driver.add([0] * 12, 4), driver.add([0], 1)
    driver.step()
    assert driver.scheduler.running == [running]  # `small` would fit, but `large` is first
    assert sorted(driver.scheduler.waiting) == [large, small]
    driver.run()


def test_lower_priorities_go_first_and_equal_ones_in_order():
    driver = Driver(num_pages=40, page_size=4, max_batch=1, budget=64)
    added = [driver.add([index] * 3, 2, priority=priority) for index, priority in enumerate([1, 0, 1, -5, 0])]
    driver.run()
    assert driver.finished == [added[index] for index in (3, 1, 4, 0, 2)]


def test_the_last_in_order_gives_its_pages_up_and_gets_them_back():
    driver = Driver(num_pages=6, page_size=4, max_batch=4, budget=64)
    first, second = driver.add([0] * 6, 14), driver.add([1] * 6, 14)
    preempted = []
    while driver.scheduler.has_work:
        driver.step()
        preempted += [s for s in driver.scheduler.waiting if s.preempted]
    assert set(preempted) == {second}
    assert driver.finished == [first, second]
    assert driver.scheduler.counts.preempted >= 1


def test_a_request_of_lower_priority_makes_room_even_if_it_came_first():
    driver = Driver(num_pages=6, page_size=4, max_batch=4, budget=64)
    early, urgent = driver.add([0] * 6, 14, priority=1), driver.add([1] * 6, 14, priority=0)
    driver.run()
    assert driver.finished == [urgent, early]


# --- forks ------------------------------------------------------------------------------------------------------------


def test_fork_shares_full_pages_and_copies_the_partial_one():
    scheduler = Scheduler(num_pages=16, page_size=4, max_batch=4, token_budget=64)
    sequence = Sequence(list(range(10)), 10, 15, 3)
    scheduler.add(sequence)
    scheduler.plan()
    sequence.num_computed = 10
    forks, source, target = scheduler.fork(sequence)
    assert len(forks) == 2
    for fork in forks:
        assert fork.pages[:2] == sequence.pages[:2]
        assert not set(fork.pages[2:]) & set(sequence.pages)
        assert fork.num_computed == 10
    assert source == [sequence.pages[2]] * 2
    assert target == [fork.pages[2] for fork in forks]


def test_H03_prompt_that_ends_on_a_page_border_copies_nothing():
    scheduler = Scheduler(num_pages=16, page_size=4, max_batch=4, token_budget=64)
    sequence = Sequence(list(range(8)), 8, 11, 2)
    scheduler.add(sequence)
    scheduler.plan()
    forks, source, target = scheduler.fork(sequence)
    assert (source, target) == ([], [])
    assert forks[0].pages[:2] == sequence.pages[:2]


# --- shared prefixes --------------------------------------------------------------------------------------------------

SYSTEM = [index * 7 % 11 for index in range(18)]  # four full pages of four and two tokens more


def _shared(driver, prompt, **request):
    """Tokens of a prompt that are not run."""
    before = driver.scheduler.counts.shared_tokens
    driver.add(prompt, 2, **request)
    driver.run()
    return driver.scheduler.counts.shared_tokens - before


def _sharing(**options):
    return Driver(num_pages=40, page_size=4, max_batch=4, budget=64, share_prefixes=True, **options)


def test_full_pages_of_an_equal_beginning_are_used_again():
    driver = _sharing()
    assert _shared(driver, SYSTEM) == 0
    assert _shared(driver, [*SYSTEM, 1]) == 16
    assert _shared(driver, SYSTEM[:9] + [10] * 9) == 8
    assert _shared(driver, [5, *SYSTEM[1:]]) == 0


def test_a_hit_never_covers_the_last_prompt_token():
    driver = _sharing()
    _shared(driver, SYSTEM[:16])
    assert _shared(driver, SYSTEM[:16]) == 12
    assert _shared(driver, SYSTEM[:17]) == 16


def test_H05_salts_and_rotary_states_share_nothing():
    driver = _sharing()
    _shared(driver, SYSTEM, root=("", 1))
    assert _shared(driver, SYSTEM, root=("other", 1)) == 0
    assert _shared(driver, SYSTEM, root=("", 2)) == 0
    assert _shared(driver, SYSTEM, root=None) == 0
    assert _shared(driver, SYSTEM, root=("", 1)) == 16


@pytest.mark.parametrize("bits", [0, 1, 2])
@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=30), min_size=2, max_size=12))
def test_H05_colliding_keys_give_nobody_anothers_pages(bits, prompts):
    """Keys of 0 to 2 bits: the driver finds a page that holds other tokens."""

    def tiny(content):
        return bytes([hashlib.sha256(content).digest()[0] & ((1 << bits) - 1)])

    original, prefix_cache.hash_of = prefix_cache.hash_of, tiny
    try:
        driver = _sharing(share_generated=True)
        for prompt in prompts:
            driver.add(prompt, 3)
        driver.run()
    finally:
        prefix_cache.hash_of = original


def test_pages_in_use_longest_ago_are_overwritten_first_and_ends_before_beginnings():
    driver = Driver(num_pages=8, page_size=4, max_batch=1, budget=64, share_prefixes=True)
    old, new = [1] * 13, [2] * 13
    _shared(driver, old)
    _shared(driver, new)  # together 6 known pages, 2 blank
    assert driver.scheduler.stats()["shared_pages"] == 6
    _shared(driver, [3] * 11)  # takes the blank ones and the end of `old`
    assert _shared(driver, old) == 8
    driver = Driver(num_pages=8, page_size=4, max_batch=1, budget=64, share_prefixes=True)
    _shared(driver, old)
    _shared(driver, new)
    _shared(driver, [3] * 11)
    assert _shared(driver, new) == 12


def test_prompts_that_arrive_together_run_their_common_beginning_once():
    driver = Driver(num_pages=80, page_size=4, max_batch=8, budget=8, share_prefixes=True)
    for last in range(6):
        driver.add([*SYSTEM[:16], last], 3)
    driver.run()
    assert driver.scheduler.counts.shared_tokens == 5 * 16
    assert driver.scheduler.counts.prompt_tokens == 6 * 17


def test_generated_pages_are_shared_only_where_that_is_allowed():
    for share_generated, expected in ((False, 4), (True, 8)):
        driver = _sharing(share_generated=share_generated)
        sequence = driver.add([3] * 5, 8)
        driver.run()
        assert len(sequence.token_ids) == 13
        assert _shared(driver, [*sequence.token_ids, 1]) == (12 if share_generated else expected)


def test_new_weights_forget_all():
    driver = _sharing()
    _shared(driver, SYSTEM)
    driver.scheduler.prefixes.clear()
    assert driver.scheduler.stats()["shared_pages"] == 0
    assert _shared(driver, SYSTEM) == 0


def test_a_resumed_sequence_takes_what_is_still_there():
    driver = Driver(num_pages=7, page_size=4, max_batch=4, budget=64, share_prefixes=True)
    driver.add([0] * 9, 12)
    second = driver.add([1] * 9, 12)
    resumed = []
    plan = driver.scheduler.plan

    def planning():
        made = plan()
        resumed.extend(made.resumed)
        return made

    driver.scheduler.plan = planning
    driver.run()
    assert [sequence for sequence, _ in resumed] == [second]

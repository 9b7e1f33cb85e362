"""The queue: order, page budget, forks. No model, no torch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast.engine.scheduler import Scheduler, Sequence


def _sequence(prompt_len, max_tokens, num_samples=1):
    return Sequence(list(range(prompt_len)), prompt_len, prompt_len + max_tokens, num_samples)


def _advance(scheduler, sequence):
    """One token more, as the engine would add it."""
    sequence.token_ids.append(0)
    if len(sequence.token_ids) >= sequence.max_len:
        scheduler.finish(sequence)


def _run_step(scheduler):
    """Run a plan, and a token of all that decode; returns the works. Forks are made and finished samples leave."""
    works = scheduler.plan()
    decoding = [sequence for sequence in scheduler.running if sequence.num_computed >= sequence.prompt_len]
    assert works or decoding, "a step without work would never end"
    for sequence in decoding:
        assert len(sequence.token_ids) <= len(sequence.pages) * scheduler.page_size
        _advance(scheduler, sequence)
    for work in works:
        assert work.start == work.sequence.num_computed
        assert work.end <= len(work.sequence.pages) * scheduler.page_size
        work.sequence.num_computed = work.end
        if not work.samples:
            continue
        forks = scheduler.fork(work.sequence)[0] if work.end == work.sequence.prompt_len else []
        for sequence in [work.sequence, *forks]:
            _advance(scheduler, sequence)
    return works


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3)), min_size=1, max_size=12),
    page_size=st.sampled_from([1, 4, 16]),
    max_batch=st.integers(3, 6),
    prefill_chunk=st.integers(1, 50),
    spare_pages=st.integers(0, 30),
)
def test_every_request_finishes_and_no_page_leaks(requests, page_size, max_batch, prefill_chunk, spare_pages):
    sequences = [_sequence(*request) for request in requests]
    probe = Scheduler(1, page_size, max_batch, prefill_chunk)
    num_pages = max(probe.pages_needed(sequence) for sequence in sequences) + spare_pages
    scheduler = Scheduler(num_pages, page_size, max_batch, prefill_chunk)
    for sequence in sequences:
        scheduler.add(sequence)
    started = []
    while scheduler.has_work:
        works = _run_step(scheduler)
        assert sum(w.end - w.start for w in works if w.start < w.sequence.prompt_len) <= prefill_chunk
        assert len(scheduler.running) <= max_batch
        started += [w.sequence for w in works if w.start == 0]
        for page in range(num_pages):
            holders = [s for s in scheduler.running if page in s.pages]
            extra = sum(page in fork for s in scheduler.running for fork in s.fork_pages)
            assert scheduler.allocator.holders(page) == len(holders) + extra
            # A shared page is never written: every holder has all of it behind the prompt's full pages.
            if len(holders) > 1:
                assert all((s.pages.index(page) + 1) * page_size <= s.prompt_len for s in holders)
    assert started == sequences  # first come, first served
    assert scheduler.allocator.num_free == num_pages


def test_head_of_the_queue_is_not_overtaken():
    scheduler = Scheduler(num_pages=4, page_size=4, max_batch=8, prefill_chunk=64)
    running, large, small = _sequence(8, 4), _sequence(12, 4), _sequence(1, 1)
    for sequence in (running, large, small):
        scheduler.add(sequence)
    scheduler.plan()
    assert scheduler.running == [running]  # `small` would fit, but `large` is first
    assert list(scheduler.waiting) == [large, small]


def test_fork_shares_full_pages_and_copies_the_partial_one():
    scheduler = Scheduler(num_pages=16, page_size=4, max_batch=4, prefill_chunk=64)
    sequence = _sequence(10, 5, num_samples=3)
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
    scheduler = Scheduler(num_pages=16, page_size=4, max_batch=4, prefill_chunk=64)
    sequence = _sequence(8, 3, num_samples=2)
    scheduler.add(sequence)
    scheduler.plan()
    forks, source, target = scheduler.fork(sequence)
    assert (source, target) == ([], [])
    assert forks[0].pages[:2] == sequence.pages[:2]

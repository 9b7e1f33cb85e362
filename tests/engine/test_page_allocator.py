"""The allocator against a plain model of it."""

import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llama_fast.engine.page_allocator import PageAllocator

_NUM_PAGES = 13


class Allocations(RuleBasedStateMachine):
    """Every holder keeps a list of pages; the allocator must count exactly those."""

    holders = Bundle("holders")

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(_NUM_PAGES)
        self.held: list[list[int]] = []

    @rule(target=holders, count=st.integers(0, 5))
    def allocate(self, count):
        count = min(count, self.allocator.num_free)
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == count
        assert not set(pages) & {page for other in self.held for page in other}
        self.held.append(pages)
        return pages

    @rule(target=holders, pages=holders)
    def share(self, pages):
        if pages not in self.held:
            return []
        self.allocator.share(pages)
        copy = list(pages)
        self.held.append(copy)
        return copy

    @rule(pages=consumes(holders))
    def release(self, pages):
        if any(pages is other for other in self.held):
            self.held = [other for other in self.held if other is not pages]
            self.allocator.release(pages)

    @invariant()
    def counts_are_the_holders(self):
        flat = [page for pages in self.held for page in pages]
        assert [self.allocator.holders(page) for page in range(_NUM_PAGES)] == [
            flat.count(page) for page in range(_NUM_PAGES)
        ]
        assert self.allocator.num_free == _NUM_PAGES - len(set(flat))


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_H08_double_release_and_sharing_a_free_page_are_caught():
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.release([page])
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release([page])
    with pytest.raises(AssertionError, match="is free"):
        allocator.share([page])


def test_scheduler_and_allocator_import_no_torch():
    code = "import sys, llama_fast.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Pages of the static cache, counted. No torch here: a page is a number."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0 .. num_pages-1 and counts who holds them.

    A page with a count above one is shared and must not be written; the last release frees it.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # The lowest free page last, so that pop() hands out pages in ascending order from a fresh pool.
        self._free = list(range(num_pages - 1, -1, -1))
        self._counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages, each with a count of one; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} pages asked of {len(self._free)} free ones"
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is free and cannot be shared"
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less; a page without holders is free."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is released twice"
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many hold `page`; 0 when it is free."""
        return self._counts[page]

"""Pages of the static cache, counted. No torch here: a page is a number."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class PageAllocator:
    """Hands out page numbers 0 .. num_pages-1 and counts who holds them.

    A page with a count above one is shared and must not be written; the last release frees it. What is in a free page
    may still be known to somebody (`keep`): such pages are handed out last, the one freed longest ago first, and
    `share` takes them back as they are.

    Args:
        num_pages: how many there are.
        forget: called with a kept page just before it is handed out for something else.
    """

    def __init__(self, num_pages: int, forget: Callable[[int], None] | None = None) -> None:
        self.num_pages = num_pages
        self.forget = forget
        # The lowest free page last, so that pop() hands out pages in ascending order from a fresh pool.
        self._blank = list(range(num_pages - 1, -1, -1))
        # Free ones that are kept, as an ordered set.
        self._idle: dict[int, None] = {}
        self._kept = [False] * num_pages
        self._counts = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Free pages whose content somebody still knows."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` pages, each with a count of one; the caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} pages asked of {self.num_free} free ones"
        pages = [self._blank.pop() if self._blank else self._oldest() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def _oldest(self) -> int:
        page = next(iter(self._idle))
        del self._idle[page]
        self._kept[page] = False
        if self.forget is not None:
            self.forget(page)
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page; a free one must be kept."""
        for page in pages:
            assert self._counts[page] > 0 or self._kept[page], f"page {page} is free and cannot be shared"
            self._idle.pop(page, None)
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Count one holder less; a page without holders is free. Of kept pages the last is handed out first."""
        for page in reversed(list(pages)):
            assert self._counts[page] > 0, f"page {page} is released twice"
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free(page)

    def _free(self, page: int) -> None:
        if self._kept[page]:
            self._idle[page] = None
        else:
            self._blank.append(page)

    def keep(self, page: int, kept: bool = True) -> None:
        """Whether the content of a page is worth finding again once it is free."""
        self._kept[page] = kept
        if not kept and page in self._idle:
            del self._idle[page]
            self._blank.append(page)

    def holders(self, page: int) -> int:
        """How many hold `page`; 0 when it is free."""
        return self._counts[page]

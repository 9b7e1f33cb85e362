"""Full pages of tokens that were run before, found again by what stands in them. No torch here.

A page's K and V depend on its tokens, on all tokens before them and on the state of their rotation. So its key is a
chain: sha256 of the key of the page before and of its own ids; the first page's chain begins with a root, which holds
the rotary state and the request's salt. Requests of different salts share nothing, so that nobody can learn from the
time to a first token what others have asked.

A key alone is not trusted: what it leads to is compared, ids, root and the page before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llama_fast.engine.page_allocator import PageAllocator


@dataclass(frozen=True, eq=False)
class _Entry:
    """A page that can be found. `before`: the page before it, or the root."""

    key: bytes
    page: int
    token_ids: tuple[int, ...]
    before: _Entry | Hashable


class Prefix:
    """The pages of one sequence's tokens, as far as they are known: its way through the cache.

    Args:
        root: what the pages depend on besides their tokens.
        token_ids: of the sequence; they may grow.
    """

    def __init__(self, root: Hashable, token_ids: Sequence[int], page_size: int) -> None:
        self._root, self._token_ids, self._page_size = root, token_ids, page_size
        self._keys: list[bytes] = []
        self.entries: list[_Entry] = []

    def ids(self, index: int) -> tuple[int, ...]:
        """Token ids of its full page `index`."""
        return tuple(self._token_ids[index * self._page_size : (index + 1) * self._page_size])

    def before(self, index: int) -> _Entry | Hashable:
        """What page `index` comes after; the pages before it are known."""
        return self.entries[index - 1] if index else self._root

    def key(self, index: int) -> bytes:
        """Of its full page `index`."""
        while len(self._keys) <= index:
            number = len(self._keys)
            before = self._keys[-1] if number else hash_of(repr(self._root).encode())
            self._keys.append(hash_of(before + array("q", self.ids(number)).tobytes()))
        return self._keys[index]


def hash_of(content: bytes) -> bytes:
    """sha256."""
    return hashlib.sha256(content).digest()


class PrefixCache:
    """Which page holds which tokens. The allocator keeps the pages while they are free, and says when one goes."""

    def __init__(self, allocator: PageAllocator) -> None:
        self._allocator = allocator
        allocator.forget = self._forget
        self._entries: dict[bytes, _Entry] = {}
        self._of_page: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prefix: Prefix, index: int) -> int | None:
        """The page that holds the tokens of the sequence's full page `index`; those before it are known."""
        entry = self._entries.get(prefix.key(index))
        if entry is None or not _is_same(entry, prefix, index):
            return None
        return entry.page

    def enter(self, prefix: Prefix, index: int) -> None:
        """The sequence goes on behind its page `index`, which `find` has found."""
        del prefix.entries[index:]
        prefix.entries.append(self._entries[prefix.key(index)])

    def add(self, prefix: Prefix, index: int, page: int) -> None:
        """`page` holds the sequence's full page `index`; those before it are known."""
        entry = self._entries.get(prefix.key(index))
        if entry is None or not _is_same(entry, prefix, index):
            if entry is not None:
                # Another one's page behind the same key, or one whose own beginning is gone: nobody would find it.
                self._drop(entry)
            entry = _Entry(prefix.key(index), page, prefix.ids(index), prefix.before(index))
            self._entries[entry.key] = self._of_page[page] = entry
            self._allocator.keep(page)
        self.enter(prefix, index)

    def clear(self) -> None:
        """Forget all: the weights have changed."""
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        self._forget(entry.page)
        self._allocator.keep(entry.page, False)

    def _forget(self, page: int) -> None:
        del self._entries[self._of_page.pop(page).key]


def _is_same(entry: _Entry, prefix: Prefix, index: int) -> bool:
    before = prefix.before(index)
    same_before = entry.before is before if isinstance(before, _Entry) else entry.before == before
    return same_before and entry.token_ids == prefix.ids(index)

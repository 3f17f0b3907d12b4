"""Which page of KV memory belongs to whom: reference counts, and a prefix cache that is a hash chain.

    page     0  1  2  3  4  5        page n of a prompt is found again by
    held by  A  A  AB B  -  cached    digest_n = H(digest_{n-1}, its token ids)

A page is in exactly one state: held (references > 0), cached (nobody holds it, its content can be found by
digest, evicted least recently used first) or free. Numbers only; the memory is the ranks'.

Consecutive pages are read as one piece, so a sequence's pages are kept in long runs: a new run starts where there
is room for what the sequence may still need, and the next new run starts behind that room.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

FREE = b"\x01"


class PagePool:
    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool, key: bytes) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self._key = key  # secret of this engine: nobody outside can aim at a collision
        self._references = [0] * num_pages
        self._free = bytearray(FREE * num_pages)  # one byte per page, so that find() searches runs at memory speed
        self._num_free = num_pages
        self._cursor = 0  # where the next new run is looked for
        self._cached: dict[int, None] = {}  # pages nobody holds but whose content is known; oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        return self._num_free + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """`count` pages: the ones behind page `after` where they are free, then new runs with `room` to grow."""
        assert count <= self.num_available
        while self._num_free < count:
            self._evict()
        pages: list[int] = []
        following = self.num_pages if after is None else after + 1
        while len(pages) < count:
            if following >= self.num_pages or not self._free[following]:
                following = self._start_run(count - len(pages), room)
            self._free[following] = 0
            self._references[following] = 1
            pages.append(following)
            following += 1
        self._num_free -= count
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder of pages whose content is of use: held ones, or cached ones that find() has named."""
        for page in pages:
            assert self._references[page] > 0 or page in self._cached
            self._references[page] += 1
            self._cached.pop(page, None)

    def num_available_beside(self, pages: Sequence[int]) -> int:
        """What would be left for whoever holds these pages."""
        return self.num_available - sum(1 for page in pages if not self._references[page])

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference of each page. The tail of a chain is evicted before its head."""
        for page in reversed(pages):
            assert self._references[page] > 0
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._free[page] = 1
                    self._num_free += 1

    def next_digest(self, previous: bytes, token_ids: Sequence[int]) -> bytes:
        """The name of a full page's content, given everything before it. A chain begins with its salt's bytes."""
        return blake2b(previous + array("q", token_ids).tobytes(), key=self._key, digest_size=16).digest()

    def extend(self, digests: list[bytes], token_ids: Sequence[int], salt: str = "") -> None:
        """Name the full pages of token_ids that have no name in `digests` yet."""
        size = self.page_size
        for start in range(len(digests) * size, len(token_ids) - size + 1, size):
            previous = digests[-1] if digests else salt.encode()
            digests.append(self.next_digest(previous, token_ids[start : start + size]))

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest beginning of this chain. Whoever wants them must hold() them."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def remember(self, page: int, digest: bytes) -> None:
        """From now on the held page can be found by its content. The first page of a content keeps its name."""
        if self.prefix_caching and digest not in self._page_of:
            assert self._references[page] > 0
            assert page not in self._digest_of
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def references(self) -> dict[int, int]:
        """How many hold each page that is held."""
        return {page: count for page, count in enumerate(self._references) if count}

    def forget(self) -> None:
        """No page holds what it held: nothing can be found any more. Held pages stay held."""
        for page in self._cached:
            self._free[page] = 1
        self._num_free += len(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def check_integrity(self) -> None:
        held = {page for page, references in enumerate(self._references) if references}
        free = {page for page in range(self.num_pages) if self._free[page]}
        cached = set(self._cached)
        assert all(references >= 0 for references in self._references)
        assert not held & free
        assert not held & cached
        assert not free & cached
        assert len(held) + len(free) + len(cached) == self.num_pages
        assert len(free) == self._num_free
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
        assert cached <= set(self._digest_of)
        assert not free & set(self._digest_of)

    def _start_run(self, count: int, room: int) -> int:
        """Where a run of `count` pages begins: with room behind it, or without, or wherever a page is free."""
        for length in (count + room, count, 1):
            wanted = FREE * length
            start = self._free.find(wanted, self._cursor)
            if start < 0:
                start = self._free.find(wanted)
            if start >= 0:
                self._cursor = start + length
                return start
        raise AssertionError("no page is free, but the count says so")

    def _evict(self) -> None:
        page = next(iter(self._cached))
        del self._cached[page]
        del self._page_of[self._digest_of.pop(page)]
        self._free[page] = 1
        self._num_free += 1

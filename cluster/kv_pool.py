"""Which page of KV memory belongs to whom: reference counts, and a prefix cache that is a hash chain.

    page     0  1  2  3  4  5        page n of a prompt is found again by
    held by  A  A  AB B  -  cached    digest_n = H(digest_{n-1}, its token ids)

A page is in exactly one state: held (references > 0), cached (nobody holds it, its content can be found by
digest, evicted least recently used first) or free. Numbers only; the memory is the ranks'.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


class PagePool:
    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool, key: bytes) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._prefix_caching = prefix_caching
        self._key = key  # secret of this engine: nobody outside can aim at a collision
        self._references = [0] * num_pages
        self._free: dict[int, None] = dict.fromkeys(range(num_pages))  # an ordered set
        self._cached: dict[int, None] = {}  # pages nobody holds but whose content is known; oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages, continuing the run that ends with page `after` where that is free."""
        assert count <= self.num_available
        pages: list[int] = []
        for _ in range(count):
            wanted = -1 if after is None else after + 1
            page = wanted if wanted in self._free else self._take_any()
            self._free.pop(page, None)
            self._references[page] = 1
            pages.append(page)
            after = page
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give back one reference of each page. The tail of a chain is evicted before its head."""
        for page in reversed(pages):
            assert self._references[page] > 0
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._digest_of:
                    self._cached[page] = None
                else:
                    self._free[page] = None

    def next_digest(self, previous: bytes, token_ids: Sequence[int]) -> bytes:
        """The name of a full page's content, given everything before it."""
        return blake2b(previous + array("q", token_ids).tobytes(), key=self._key, digest_size=16).digest()

    def find_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Hold the longest cached chain of full pages that begins token_ids; its pages and digests.

        At least one token is left to compute: somebody must produce the next token's logits.
        """
        pages: list[int] = []
        digests: list[bytes] = []
        if not self._prefix_caching:
            return pages, digests
        digest = b""
        for start in range(0, len(token_ids) - self.page_size, self.page_size):
            digest = self.next_digest(digest, token_ids[start : start + self.page_size])
            page = self._page_of.get(digest)
            if page is None:
                break
            self._references[page] += 1
            self._cached.pop(page, None)
            pages.append(page)
            digests.append(digest)
        return pages, digests

    def remember(self, page: int, digest: bytes) -> None:
        """From now on the held page can be found by its content. The first page of a content keeps its name."""
        if self._prefix_caching and digest not in self._page_of:
            assert self._references[page] > 0
            assert page not in self._digest_of
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def check_integrity(self) -> None:
        held = {page for page, references in enumerate(self._references) if references}
        free, cached = set(self._free), set(self._cached)
        assert all(references >= 0 for references in self._references)
        assert not held & free
        assert not held & cached
        assert not free & cached
        assert len(held) + len(free) + len(cached) == self.num_pages
        assert {digest: page for page, digest in self._digest_of.items()} == self._page_of
        assert cached <= set(self._digest_of)
        assert not free & set(self._digest_of)

    def _take_any(self) -> int:
        if self._free:
            return next(iter(self._free))
        page = next(iter(self._cached))
        del self._cached[page]
        del self._page_of[self._digest_of.pop(page)]
        return page

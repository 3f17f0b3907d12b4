from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.kv_pool import PagePool


def pool(num_pages: int = 8, page_size: int = 4, prefix_caching: bool = True) -> PagePool:
    return PagePool(num_pages, page_size, prefix_caching=prefix_caching, key=b"k")


def found(pages: PagePool, token_ids: list[int], salt: str = "") -> list[int]:
    digests: list[bytes] = []
    pages.extend(digests, token_ids, salt)
    return pages.find(digests)


def fill(pages: PagePool, token_ids: list[int]) -> list[int]:
    """Hold pages for token_ids as a sequence would that computes them all."""
    digests: list[bytes] = []
    pages.extend(digests, token_ids)
    held = pages.find(digests)
    known = len(held)
    pages.hold(held)
    held += pages.allocate(pages.pages_for(len(token_ids)) - known)
    for page, digest in list(zip(held, digests, strict=False))[known:]:
        pages.remember(page, digest)
    return held


def test_allocate_continues_the_run() -> None:
    pages = pool()
    assert pages.allocate(2) == [0, 1]
    assert pages.allocate(1, after=4) == [5]
    assert pages.allocate(2, after=1) == [2, 3]
    pages.check_integrity()


def test_a_new_run_leaves_room_behind_the_one_before() -> None:
    pages = pool(num_pages=16)
    assert pages.allocate(1, room=3) == [0]
    assert pages.allocate(1, room=3) == [4]
    assert pages.allocate(1, after=0) == [1]
    assert pages.allocate(1, room=100) == [8], "less room where there is not so much"
    pages.check_integrity()


def test_scattered_pages_are_used_when_nothing_else_is_left() -> None:
    pages = pool()
    held = pages.allocate(8)
    pages.release([held[1], held[4], held[6]])
    assert sorted(pages.allocate(3)) == [1, 4, 6]
    pages.check_integrity()


def test_a_prefix_is_found_again() -> None:
    pages = pool()
    prompt = list(range(8))
    held = fill(pages, prompt)
    pages.release(held)
    assert pages.num_held == 0
    assert found(pages, prompt) == held
    assert found(pages, [*prompt, 9]) == held
    assert found(pages, prompt[:-1]) == held[:1]
    assert found(pages, prompt, "somebody else's") == []
    assert found(pages, [7, *prompt]) == []  # same tokens elsewhere are another prefix
    pages.check_integrity()


def test_prefix_caching_off_finds_nothing() -> None:
    pages = pool(prefix_caching=False)
    pages.release(fill(pages, list(range(8))))
    assert found(pages, list(range(9))) == []
    pages.check_integrity()


def test_eviction_takes_the_least_recently_used_and_the_tail_before_its_head() -> None:
    pages = pool(num_pages=4)
    old = fill(pages, [1] * 8)
    new = fill(pages, [2] * 8)
    pages.release(old)
    pages.release(new)
    pages.allocate(1)
    assert found(pages, [1] * 9) == old[:1]
    assert found(pages, [2] * 9) == new
    pages.check_integrity()


def test_keys_differ_between_engines() -> None:
    one = PagePool(1, 4, prefix_caching=True, key=b"one")
    two = PagePool(1, 4, prefix_caching=True, key=b"two")
    assert one.next_digest(b"", [1, 2]) != two.next_digest(b"", [1, 2])
    assert len(one.next_digest(b"", [1])) == 16


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 14)), max_size=40))
def test_random_holders_keep_every_page_in_one_state(operations: list[tuple[int, int, int]]) -> None:
    pages = pool(num_pages=12)
    holders: dict[int, list[int]] = {}
    for holder, token, length in operations:
        if holder in holders:
            pages.release(holders.pop(holder))
        elif pages.pages_for(length) <= pages.num_available:
            holders[holder] = fill(pages, [token] * length)
        pages.check_integrity()
    for held in holders.values():
        pages.release(held)
    assert pages.num_held == 0

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.waiting import MAX_OUTDATED, WaitingQueue


@dataclass(eq=False)
class Waiter:
    number: int
    user: str = ""
    priority: int = 0
    has_run: bool = False


def drain(queue: WaitingQueue[Waiter], cost: int = 1) -> list[int]:
    """Admit everybody, charging each the same."""
    order = []
    while (first := queue.peek()) is not None:
        queue.remove(first)
        queue.admitted(first)
        queue.charge(first, cost)
        order.append(first.number)
    assert len(queue) == 0
    return order


def queue_of(*waiters: Waiter) -> WaitingQueue[Waiter]:
    queue: WaitingQueue[Waiter] = WaitingQueue()
    for waiter in waiters:
        queue.push(waiter)
    assert len(queue) == len(list(queue)) == len(waiters)
    return queue


def test_first_come_first_served() -> None:
    assert drain(queue_of(*(Waiter(n) for n in range(5)))) == [0, 1, 2, 3, 4]


def test_lower_priority_numbers_first() -> None:
    assert drain(queue_of(Waiter(0, priority=2), Waiter(1, priority=-1), Waiter(2, priority=2))) == [1, 0, 2]


def test_within_a_user_first_come_first_served_whoever_joins_the_line_late() -> None:
    queue = queue_of(Waiter(3), Waiter(5))
    queue.push(Waiter(4))
    assert drain(queue) == [3, 4, 5]


def test_whoever_has_run_goes_on_first_whatever_was_computed_for_its_user() -> None:
    queue = queue_of(Waiter(2, "new"), Waiter(1, "busy", has_run=True), Waiter(0, "busier", has_run=True))
    queue.charge(Waiter(0, "busier"), 1000)
    queue.push(Waiter(3, "important", priority=-1))
    assert drain(queue) == [3, 0, 1, 2]


def test_whoever_goes_on_does_not_hold_up_those_who_come_after() -> None:
    heavy = Waiter(0, "heavy", has_run=True)
    queue = queue_of(heavy)
    queue.charge(heavy, 1000)
    queue.remove(heavy)
    queue.admitted(heavy)
    for waiter in (Waiter(1, "heavy"), Waiter(2, "light"), Waiter(3, "light")):
        queue.push(waiter)
    assert drain(queue, cost=100) == [2, 3, 1]


def test_users_take_turns() -> None:
    waiters = [Waiter(n, "many") for n in range(4)] + [Waiter(n, "few") for n in (10, 11)]
    assert drain(queue_of(*waiters)) == [0, 10, 1, 11, 2, 3]


def test_shares_are_of_tokens_not_of_requests() -> None:
    queue = queue_of(*(Waiter(n, "long") for n in range(3)), *(Waiter(n, "short") for n in range(10, 16)))
    order = []
    while (first := queue.peek()) is not None:
        queue.remove(first)
        queue.admitted(first)
        queue.charge(first, 30 if first.user == "long" else 10)
        order.append(first.user)
    assert order[:8].count("long") == 2


def test_being_away_saves_nothing_up() -> None:
    queue = queue_of(*(Waiter(n, "busy") for n in range(10)))
    for _ in range(6):
        first = queue.peek()
        assert first is not None
        queue.remove(first)
        queue.admitted(first)
        queue.charge(first, 100)
    for n in (20, 21, 22, 23):
        queue.push(Waiter(n, "back"))
    order = drain(queue, cost=100)
    assert order[:4] in ([20, 6, 21, 7], [20, 21, 6, 22]), order


def test_removing_from_the_middle() -> None:
    middle = Waiter(1)
    queue = queue_of(Waiter(0), middle, Waiter(2))
    queue.remove(middle)
    assert drain(queue) == [0, 2]


def least_served(waiters: Iterable[Waiter], served: dict[str, float]) -> Waiter | None:
    """The rule without the heaps."""
    return min(
        waiters, key=lambda w: (w.priority, not w.has_run, 0 if w.has_run else served[w.user], w.number), default=None
    )


@given(
    st.lists(st.tuples(st.sampled_from(["push", "admit", "charge", "abort", "again"]), st.integers(0, 30)), max_size=60)
)
def test_whatever_happens_the_least_served_is_next(steps: list[tuple[str, int]]) -> None:
    queue: WaitingQueue[Waiter] = WaitingQueue()
    waiting: dict[int, Waiter] = {}
    running: list[Waiter] = []
    served: dict[str, float] = {}
    level = 0.0
    number = 0
    for what, drawn in steps:
        if what == "push" or (what == "again" and running):
            if what == "push":
                number += 1
                waiter = Waiter(number, "abc"[drawn % 3], drawn % 2)
            else:
                waiter = running.pop(drawn % len(running))
                waiter.has_run = True
            if not waiter.has_run:
                served[waiter.user] = max(served.get(waiter.user, 0.0), level)
            waiting[waiter.number] = waiter
            queue.push(waiter)
        elif what == "charge" and running:
            waiter = running[drawn % len(running)]
            served[waiter.user] += drawn
            queue.charge(waiter, drawn)
        elif what == "abort" and waiting:
            queue.remove(waiting.pop(sorted(waiting)[drawn % len(waiting)]))
        elif what == "admit" and waiting:
            first = queue.peek()
            assert first is not None
            queue.remove(waiting.pop(first.number))
            queue.admitted(first)
            if not first.has_run:
                level = max(level, served[first.user])
            running.append(first)
        assert queue.peek() is least_served(waiting.values(), served)
        assert len(queue) == len(waiting)


def test_looking_does_not_pass_by_everybody() -> None:
    seen = 0

    class Watched(Waiter):
        def __getattribute__(self, name: str) -> object:
            nonlocal seen
            seen += name == "number"
            return super().__getattribute__(name)

    queue = queue_of(*(Watched(n, f"user {n}") for n in range(1000)))
    for _ in range(100):
        first = queue.peek()
        assert first is not None
        queue.charge(first, 5)
    seen = 0
    queue.peek()
    assert seen < 5


@pytest.mark.parametrize("others", [0, 50])
def test_those_who_come_and_go_leave_nothing_behind(others: int) -> None:
    queue = queue_of(Waiter(0, "first"), *(Waiter(n, f"user {n}", priority=2) for n in range(1, others + 1)))
    for number in range(1000, 2000):
        passing = Waiter(number, f"user {number}", priority=1)
        queue.push(passing)
        queue.remove(passing)
        passing.has_run = True
        queue.push(passing)
        queue.remove(passing)
    assert len(queue._heap) <= 2 * (others + 2) + MAX_OUTDATED
    assert len(queue._return_heap) <= MAX_OUTDATED + 2
    assert [queue.peek() is not None, len(queue)] == [True, others + 1]

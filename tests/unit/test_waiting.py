from __future__ import annotations

from dataclasses import dataclass

from cluster.waiting import WaitingQueue


@dataclass(eq=False)
class Waiter:
    number: int
    user: str = ""
    priority: int = 0


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


def test_whoever_was_preempted_comes_before_whoever_never_ran() -> None:
    queue = queue_of(Waiter(3), Waiter(5))
    queue.push(Waiter(4))
    assert drain(queue) == [3, 4, 5]


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

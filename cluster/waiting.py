"""Who is admitted next. Plain Python; knows sequences only by priority, user and arrival.

Lower priority numbers go first. Within one, users take turns so that each gets the same share of computed tokens
while they compete (start-time fair queueing: the user who has been served least is next; one who was away comes
back level with the others, not ahead). Within a user, first come, first served.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

MAX_REMEMBERED_USERS = 4096


class Waits(Protocol):
    @property
    def number(self) -> int:
        """Order of arrival."""

    @property
    def priority(self) -> int: ...

    @property
    def user(self) -> str: ...


T = TypeVar("T", bound=Waits)


class WaitingQueue(Generic[T]):
    def __init__(self) -> None:
        self._queues: dict[int, dict[str, deque[T]]] = {}  # priority -> user -> those who wait; no empty ones
        self._served: dict[str, float] = {}  # tokens computed for a user, as far as that matters
        self._level = 0.0  # what the user admitted last had been served
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        for users in self._queues.values():
            for queue in users.values():
                yield from queue

    def push(self, sequence: T) -> None:
        """By arrival among the user's own: whoever was preempted came before whoever was never admitted."""
        users = self._queues.setdefault(sequence.priority, {})
        queue = users.setdefault(sequence.user, deque())
        self._served[sequence.user] = max(self._served.get(sequence.user, 0.0), self._level)
        position = len(queue)
        while position and queue[position - 1].number > sequence.number:
            position -= 1
        queue.insert(position, sequence)
        self._length += 1

    def peek(self) -> T | None:
        if not self._queues:
            return None
        users = self._queues[min(self._queues)]
        if len(users) == 1:
            (queue,) = users.values()
        else:
            queue = min(users.values(), key=lambda queue: (self._served[queue[0].user], queue[0].number))
        return queue[0]

    def remove(self, sequence: T) -> None:
        users = self._queues[sequence.priority]
        queue = users[sequence.user]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._length -= 1
        if not queue:
            del users[sequence.user]
            if not users:
                del self._queues[sequence.priority]

    def charge(self, sequence: T, tokens: int) -> None:
        """So many tokens are computed for the sequence's user."""
        self._served[sequence.user] = self._served.get(sequence.user, self._level) + tokens

    def admitted(self, sequence: T) -> None:
        """The sequence was taken from here to run: the level of those who compete rises to its user's."""
        self._level = max(self._level, self._served.get(sequence.user, 0.0))
        if len(self._served) > MAX_REMEMBERED_USERS:
            waiting = {user for users in self._queues.values() for user in users}
            self._served = {u: s for u, s in self._served.items() if u in waiting or s > self._level}

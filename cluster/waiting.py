"""Who is admitted next. Plain Python; knows sequences only by priority, user and arrival.

Lower priority numbers go first. Within one, whoever has run already goes on first, the oldest at the head: it lost its
pages, not its turn. Then users take turns so that each gets the same share of computed tokens while they compete
(start-time fair queueing: the user who has been served least is next; one who was away comes back level with the
others, not ahead). Within a user, first come, first served.

Looking costs nothing for those who do not come up: each line, one user's of one priority, stands in a heap by its
place when it was last looked at. A place only gets worse while others are looked at, so the best of the heap is put
right until it is right.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

MAX_REMEMBERED_USERS = 4096
MAX_OUTDATED = 64  # entries of a heap beyond twice those that count


class Waits(Protocol):
    @property
    def number(self) -> int:
        """Order of arrival."""

    @property
    def priority(self) -> int: ...

    @property
    def user(self) -> str: ...

    @property
    def has_run(self) -> bool: ...


T = TypeVar("T", bound=Waits)
Place = tuple[int, float, int, str]  # priority, what the user has been served, number of the line's first, user


class WaitingQueue(Generic[T]):
    def __init__(self) -> None:
        self._returned: dict[tuple[int, int], T] = {}  # those who have run, by priority and number
        self._return_heap: list[tuple[int, int]] = []  # their keys, and outdated ones
        self._lines: dict[tuple[int, str], deque[T]] = {}  # by priority and user; no empty ones
        self._places: dict[tuple[int, str], Place] = {}  # of each line, as it is in the heap
        self._heap: list[Place] = []  # those, and outdated ones that nobody has come across yet
        self._served: dict[str, float] = {}  # tokens computed for a user, as far as that matters
        self._level = 0.0  # what the user admitted last had been served
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        yield from self._returned.values()
        for line in self._lines.values():
            yield from line

    def push(self, sequence: T) -> None:
        self._length += 1
        if sequence.has_run:
            self._returned[sequence.priority, sequence.number] = sequence
            heapq.heappush(self._return_heap, (sequence.priority, sequence.number))
        else:
            self._join_line(sequence)
        self._drop_outdated()

    def peek(self) -> T | None:
        while self._return_heap and self._return_heap[0] not in self._returned:
            heapq.heappop(self._return_heap)
        first = self._first_in_line()
        if self._return_heap and (first is None or self._return_heap[0][0] <= first.priority):
            return self._returned[self._return_heap[0]]
        return first

    def remove(self, sequence: T) -> None:
        self._length -= 1
        if self._returned.pop((sequence.priority, sequence.number), None) is not None:
            return
        line = self._lines[sequence.priority, sequence.user]
        if line[0] is sequence:
            line.popleft()
        else:
            line.remove(sequence)
        if not line:
            del self._lines[sequence.priority, sequence.user]
            del self._places[sequence.priority, sequence.user]

    def charge(self, sequence: T, tokens: int) -> None:
        """So many tokens are computed for the sequence's user."""
        self._served[sequence.user] = self._served.get(sequence.user, self._level) + tokens

    def admitted(self, sequence: T) -> None:
        """The sequence was taken from here to run. If it was its turn, the level of those who compete rises to it."""
        if not sequence.has_run:
            self._level = max(self._level, self._served.get(sequence.user, 0.0))
        if len(self._served) > MAX_REMEMBERED_USERS:
            waiting = {user for _, user in self._lines}
            self._served = {u: s for u, s in self._served.items() if u in waiting or s > self._level}

    def _join_line(self, sequence: T) -> None:
        """By arrival among the user's own."""
        line = self._lines.setdefault((sequence.priority, sequence.user), deque())
        self._served[sequence.user] = max(self._served.get(sequence.user, 0.0), self._level)
        position = len(line)
        while position and line[position - 1].number > sequence.number:
            position -= 1
        line.insert(position, sequence)
        if position == 0:
            heapq.heappush(self._heap, self._note_place(line))

    def _first_in_line(self) -> T | None:
        while self._heap:
            known = self._heap[0]
            line = self._lines.get((known[0], known[3]))
            if line is None or self._places[known[0], known[3]] is not known:
                heapq.heappop(self._heap)
            elif self._place(line) == known:
                return line[0]
            else:
                heapq.heapreplace(self._heap, self._note_place(line))
        return None

    def _place(self, line: deque[T]) -> Place:
        first = line[0]
        return first.priority, self._served[first.user], first.number, first.user

    def _note_place(self, line: deque[T]) -> Place:
        place = self._places[line[0].priority, line[0].user] = self._place(line)
        return place

    def _drop_outdated(self) -> None:
        if len(self._heap) > 2 * len(self._lines) + MAX_OUTDATED:
            self._heap = sorted(self._places.values())
        if len(self._return_heap) > 2 * len(self._returned) + MAX_OUTDATED:
            self._return_heap = sorted(self._returned)

"""model/comm.py through one shared file: ranks on one machine, x86-64 Linux. A collective costs microseconds.

    file   | words of rank 0 | words of rank 1 | ... | area of rank 0: even, odd | area of rank 1: even, odd | ...
    words  progress, aborted, process id; the rows sent to each rank in the even and in the odd collective

Collective k, on every rank:
  1. write my rows into the half k % 2 of my area, then set my progress to k
  2. wait until every rank's progress is at least k
  3. read what is for me from the others' halves

One wait is enough. Somebody may still read half k % 2 only from collective k - 2, and whoever has set its
progress to k - 1 has left that one; for k - 1 we have waited. The order of step 1 holds because x86-64 never
reorders stores; other processors use gloo.

Rows too many for an area go in several rounds of fewer bytes of each row, which leaves the row counts as they are.
The file has no name once every rank has mapped it: however the processes die, nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from time import monotonic, sleep

import torch
from torch import Tensor

from cluster.rendezvous import SHARED_DIRECTORY

AREA_BYTES = 4 << 20  # a container's default /dev/shm is 64 MB; touched only as far as steps need
WORD = 8
PROGRESS, ABORTED, PROCESS, COUNTS = 0, 1, 2, 8  # words of a rank; COUNTS on a cache line of its own
SPINS = 2000  # about 0.1 ms of looking; a rank that waits longer gives its core away
NAP_S = 20e-6
LATE = 0.02  # who has waited for long naps longer, and notices so much later: naps take the core from who computes
LONGEST_NAP_S = 1e-3
LOOK_AROUND_S = 0.05  # how often a waiting rank asks whether its peers still live


class PeerLost(ConnectionError):
    """A collective cannot be finished: a rank died, was aborted, or did not come in time."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where what lies in the file of a group of `size` ranks."""

    size: int
    area_bytes: int = AREA_BYTES

    @property
    def words_per_rank(self) -> int:
        return COUNTS + 8 * (-(-2 * self.size // 8))  # whole cache lines

    def counts(self, half: int) -> slice:
        start = COUNTS + half * self.size
        return slice(start, start + self.size)

    @property
    def total_bytes(self) -> int:
        return self.first_area + 2 * self.size * self.area_bytes

    @property
    def first_area(self) -> int:
        return -(-self.size * self.words_per_rank * WORD // mmap.PAGESIZE) * mmap.PAGESIZE

    def area(self, rank: int, half: int) -> slice:
        start = self.first_area + (2 * rank + half) * self.area_bytes
        return slice(start, start + self.area_bytes)


def create_file(layout: Layout) -> str:
    """A file only this user can open; its path. Rank 0 unlinks it once it is mapped."""
    status = os.statvfs(SHARED_DIRECTORY)
    free = status.f_bavail * status.f_frsize
    if free < layout.total_bytes:  # a write for which there is no room would end the process without a word
        raise OSError(
            f"{SHARED_DIRECTORY} has {free >> 20} MiB free and {layout.size} ranks want {layout.total_bytes >> 20} MiB "
            "to exchange rows: give it more, with docker run --shm-size or an emptyDir in memory"
        )
    path = f"{SHARED_DIRECTORY}/mixtral-serve-{secrets.token_hex(16)}"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(descriptor, layout.total_bytes)
    finally:
        os.close(descriptor)
    return path


class SharedMemoryComm:
    """One rank's end. Constructing it waits for the others; rank 0 then takes the file's name away.

    `leave` ends a wait as abort() does, also before there is anything to abort.
    """

    def __init__(
        self, path: str, rank: int, layout: Layout, timeout_s: float, leave: threading.Event | None = None
    ) -> None:
        self._leave = threading.Event() if leave is None else leave
        self.rank = rank
        self.size = layout.size
        self._timeout_s = timeout_s
        self._layout = layout
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            self._map = mmap.mmap(descriptor, layout.total_bytes)
        finally:
            os.close(descriptor)
        whole = memoryview(self._map)
        self._words = [
            whole[r * layout.words_per_rank * WORD : (r + 1) * layout.words_per_rank * WORD].cast("Q")
            for r in range(self.size)
        ]
        memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._areas = [[memory[layout.area(r, half)] for half in (0, 1)] for r in range(self.size)]
        self._words[rank][PROCESS] = os.getpid()
        self._collective = 0
        try:
            self._meet()
        finally:
            if rank == 0:
                os.unlink(path)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._sum(self._move(x, [len(x)] * self.size, [len(x)] * self.size, shared=True), len(x))

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        share = rows[self.rank]
        return self._sum(self._move(x_TD, rows, [share] * self.size, shared=False), share)

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(x_SD) == rows[self.rank], f"{len(x_SD)} rows to gather, {rows[self.rank]} announced"
        return self._move(x_SD, [len(x_SD)] * self.size, rows, shared=True)

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert sum(send) == len(x_ND), f"{len(x_ND)} rows to send, {list(send)} announced"
        return self._move(x_ND, send, receive, shared=False)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        rows = [len(x) if rank == source else 0 for rank in range(self.size)]
        return self.all_gather(x if self.rank == source else x[:0], rows)

    def abort(self) -> None:
        """Make every rank's present and future collectives raise. Callable from another thread."""
        for words in self._words:
            words[ABORTED] = 1

    def _sum(self, parts: Tensor, rows: int) -> Tensor:
        """Every rank's rows added in rank order: the same bits on every rank, whatever came first."""
        first: Tensor
        first, *rest = parts.view(self.size, rows, *parts.shape[1:])
        for part in rest:
            first += part  # in place: parts is nobody else's
        return first

    def _move(self, x: Tensor, send: Sequence[int], receive: Sequence[int], *, shared: bool) -> Tensor:
        """The rows for this rank from every rank, in rank order. Shared: everybody reads the same rows."""
        received = x.new_empty(sum(receive), *x.shape[1:])
        source, target = _as_bytes(x), _as_bytes(received)
        row_bytes = source.shape[1]
        done = 0  # rounds
        rounds = 1
        while done < rounds:
            half = (self._collective + 1) % 2
            self._write(source, half, done, send)
            self._meet()
            row = 0
            for rank, count in enumerate(receive):
                sent = self._words[rank][self._layout.counts(half)].tolist()
                assert sent[self.rank] == count, f"rank {rank} sends {sent[self.rank]} rows, {count} were expected"
                rows = count if shared else sum(sent)
                width = self._width(rows, row_bytes)
                columns = slice(done * width, min((done + 1) * width, row_bytes))
                if count and columns.start < row_bytes:
                    first = 0 if shared else sum(sent[: self.rank])
                    area = self._area(rank, half, rows, columns)
                    target[row : row + count, columns] = area[first : first + count]
                rounds = max(rounds, -(-row_bytes // width))
                row += count
            done += 1
        return received

    def _write(self, source: Tensor, half: int, round_number: int, send: Sequence[int]) -> None:
        rows, row_bytes = source.shape
        counts = self._words[self.rank][self._layout.counts(half)]
        for rank, count in enumerate(send):
            counts[rank] = count
        width = self._width(rows, row_bytes)
        columns = slice(round_number * width, min((round_number + 1) * width, row_bytes))
        if rows and columns.start < row_bytes:
            self._area(self.rank, half, rows, columns).copy_(source[:, columns])

    def _width(self, rows: int, row_bytes: int) -> int:
        """Bytes of each row that one round carries."""
        if rows * row_bytes <= self._layout.area_bytes:
            return max(row_bytes, 1)
        width = self._layout.area_bytes // rows // 16 * 16
        assert width, f"{rows} rows do not fit an area of {self._layout.area_bytes} bytes"
        return width

    def _area(self, rank: int, half: int, rows: int, columns: slice) -> Tensor:
        width = columns.stop - columns.start
        return self._areas[rank][half][: rows * width].view(rows, width)

    def _meet(self) -> None:
        """Say that this rank has written; wait until all have."""
        if self._words[self.rank][ABORTED]:
            raise PeerLost("the group was aborted")
        self._collective += 1
        self._words[self.rank][PROGRESS] = self._collective
        for rank, words in enumerate(self._words):
            for _ in range(SPINS):
                if words[PROGRESS] >= self._collective:
                    break
            else:
                self._wait(rank)

    def _wait(self, rank: int) -> None:
        words, own = self._words[rank], self._words[self.rank]
        began = looked = now = monotonic()
        while words[PROGRESS] < self._collective:
            sleep(min(max(NAP_S, LATE * (now - began)), LONGEST_NAP_S))
            now = monotonic()
            if own[ABORTED] or self._leave.is_set():
                raise PeerLost("the group was aborted")
            if now - looked > LOOK_AROUND_S:
                looked = now
                self._check_alive(rank)
            if now - began > self._timeout_s:
                raise PeerLost(f"rank {rank} did not join a collective within {self._timeout_s:g} s")

    def _check_alive(self, rank: int) -> None:
        process = self._words[rank][PROCESS]
        if process and not _alive(process):  # 0: it has not come yet
            raise PeerLost(f"rank {rank} (pid {process}) died")


def _alive(process: int) -> bool:
    """False also for a process that ended but whose parent has not asked for its status yet."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return False


def _as_bytes(x: Tensor) -> Tensor:
    """x as rows of bytes. Flattened first: the last dimension of a contiguous tensor may have any stride if it is 1."""
    flat = x.contiguous().view(-1).view(torch.uint8)
    return flat.view(x.shape[0], prod(x.shape[1:]) * x.element_size())

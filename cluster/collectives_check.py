"""Do ranks of this machine exchange rows correctly, and do they find together again when one of them is killed?

    spawn ──▶ join ──▶ compare ──▶ kill the last one in a collective ──▶ abort ──▶ a new one ──▶ join ──▶ compare

What `mixtral-serve doctor --collectives` runs, on a user's own GPUs or on the CPU. Each rank knows what all ranks put
in, so it can say by itself what must come out. Knows no ray and no checkpoint.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from cluster.all_to_all import SlotTables, exchange_for
from cluster.messages import Exchange
from cluster.placement import even_placement
from cluster.process_group import Membership, join, open_store
from cluster.rendezvous import Rendezvous, Transport
from model.comm import Comm, split_rows
from model.graphs import Capture, CudaCapture

LOOPBACK = "127.0.0.1"
ANSWER_WITHIN_S = 60.0
COLLECTIVE_WITHIN_S = 30.0
TOKENS, WIDTH, EXPERTS, CHOSEN = 37, 64, 8, 2
MODES: tuple[Exchange, ...] = ("all_reduce", "all_to_all")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One thing that was tried."""

    what: str
    seconds: float
    fault: str | None = None  # what was wrong with it


def check(size: int, transport: Transport, device: str) -> Iterator[Outcome]:
    """Each outcome as it comes; the first fault is the last."""
    with _ranks(size, device) as ranks:
        for step in (_form_and_compare, _kill_one_and_compare):
            for outcome in step(ranks, transport):
                yield outcome
                if outcome.fault is not None:
                    return


class _Ranks:
    def __init__(self, size: int, device: str) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])  # torch is imported once, and not by every rank
        self._device = device
        self._processes: list[tuple[BaseProcess, Connection]] = []
        self.size = size
        self.epoch = 0
        self.fill()

    def fill(self) -> None:
        for rank in range(len(self._processes), self.size):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve_rank, args=(theirs, rank, self._device), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def ask(self, name: str, *arguments: Any) -> str | None:
        """Have every rank do something; what the first that could not says."""
        faults = []
        for _, pipe in self._processes:
            pipe.send((name, arguments))
        for rank, (_, pipe) in enumerate(self._processes):
            if not pipe.poll(ANSWER_WITHIN_S):
                faults.append(f"rank {rank} did not answer within {ANSWER_WITHIN_S:g} s")
                continue
            fault, _ = pipe.recv()
            if fault is not None:
                faults.append(f"rank {rank}: {fault}")
        return faults[0] if faults else None

    def form(self, transport: Transport) -> str | None:
        """A new epoch's group of all ranks."""
        rendezvous = Rendezvous(LOOPBACK, 0, self.size, self.size, self.epoch, transport, COLLECTIVE_WITHIN_S)
        first = self._processes[0][1]
        first.send(("open", (rendezvous,)))
        if not first.poll(ANSWER_WITHIN_S):
            return "rank 0 could not open a meeting point"
        fault, port = first.recv()
        return fault or self.ask("join", rendezvous.at(port))

    def kill_last_in_a_collective(self) -> str | None:
        """The others wait for it in a sum, and are called out of there."""
        process, _ = self._processes.pop()
        for _, pipe in self._processes:
            pipe.send(("wait_for_all", ()))
        process.kill()
        process.join(ANSWER_WITHIN_S)
        for _, pipe in self._processes:
            pipe.send(("abort", ()))
        for rank, (_, pipe) in enumerate(self._processes):
            if not pipe.poll(ANSWER_WITHIN_S):
                return f"rank {rank} could not be called out of a collective"
            fault, _ = pipe.recv()
            if fault is None:
                return f"rank {rank} came out of a collective that could not end"
        return None

    def stop(self) -> None:
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.join(ANSWER_WITHIN_S)


@contextmanager
def _ranks(size: int, device: str) -> Iterator[_Ranks]:
    ranks = _Ranks(size, device)
    try:
        yield ranks
    finally:
        ranks.stop()


def _form_and_compare(ranks: _Ranks, transport: Transport) -> Iterator[Outcome]:
    yield _timed(f"{ranks.size} ranks meet over {transport}", partial(ranks.form, transport))
    yield _timed("every collective against what must come out", partial(ranks.ask, "compare_collectives"))
    for mode in MODES:
        yield _timed(f"experts in {mode} exchange against one process", partial(ranks.ask, "compare_exchange", mode))
    if transport == "nccl":
        yield _timed("a sum in a CUDA graph, replayed", partial(ranks.ask, "compare_captured"))


def _kill_one_and_compare(ranks: _Ranks, transport: Transport) -> Iterator[Outcome]:
    yield _timed("one is killed, the others leave the collective", ranks.kill_last_in_a_collective)
    ranks.epoch += 1
    ranks.fill()
    yield from _form_and_compare(ranks, transport)


def _timed(what: str, action: Callable[[], str | None]) -> Outcome:
    began = monotonic()
    fault = action()
    return Outcome(what, monotonic() - began, fault)


def _serve_rank(pipe: Connection, rank: int, device: str) -> None:
    """The process of one rank: does what it is told, one thing after another; an abort comes beside that."""
    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    checks = _RankChecks(rank, place)
    work: threading.Thread | None = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        if name == "abort":
            checks.abort()
            continue
        if work is not None:
            work.join()
        work = threading.Thread(target=_answer, args=(pipe, place, getattr(checks, name), arguments), daemon=True)
        work.start()


def _answer(
    pipe: Connection, place: torch.device, action: Callable[..., int | None], arguments: tuple[Any, ...]
) -> None:
    try:
        if place.type == "cuda":
            torch.cuda.set_device(place)  # each thread's own: NCCL and captures take the current one
        pipe.send((None, action(*arguments)))
    except Exception as error:  # noqa: BLE001  # whatever it is, the one who asked shall hear of it
        pipe.send((f"{type(error).__name__}: {error}", None))


class _RankChecks:
    """What a rank can be told to do. Raises where something is not as it must be."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._store: Any = None
        self._membership: Membership | None = None

    def open(self, rendezvous: Rendezvous) -> int:
        self._store = open_store(rendezvous)
        return int(self._store.port)

    def join(self, rendezvous: Rendezvous) -> None:
        self._membership = join(rendezvous, self._rank, LOOPBACK, self._store)

    def abort(self) -> None:
        if self._membership is not None:
            self._membership.abort()

    @property
    def _comm(self) -> Comm:
        assert self._membership is not None
        return self._membership.groups.world

    def wait_for_all(self) -> None:
        for _ in range(1000):  # until the last rank is gone
            self._comm.all_reduce(self._rows(0, 1)).tolist()  # a GPU's sum is only begun until somebody looks

    def compare_collectives(self) -> None:
        comm = self._comm
        for total in (0, 1, TOKENS):
            rows, wholes = split_rows(total, comm.size), [self._rows(rank, total) for rank in range(comm.size)]
            first, mine = sum(rows[: comm.rank]), wholes[comm.rank]
            summed = torch.stack(wholes).sum(0)
            _same("all_reduce", comm.all_reduce(mine.clone()), summed)
            _same("reduce_scatter", comm.reduce_scatter(mine, rows), summed[first : first + rows[comm.rank]])
            gathered = [whole[:count] for whole, count in zip(wholes, rows, strict=True)]
            _same("all_gather", comm.all_gather(mine[: rows[comm.rank]], rows), torch.cat(gathered))
            _same("broadcast", comm.broadcast(mine.clone(), comm.size - 1), wholes[-1])
        counts = [[(source + target) % 3 for target in range(comm.size)] for source in range(comm.size)]
        sent = self._rows(comm.rank, sum(counts[comm.rank]))
        arrived = [
            self._rows(source, sum(to))[sum(to[: comm.rank]) :][: to[comm.rank]] for source, to in enumerate(counts)
        ]
        receive = [to[comm.rank] for to in counts]
        _same("all_to_all", comm.all_to_all(sent, counts[comm.rank], receive), torch.cat(arrived))

    def compare_exchange(self, mode: Exchange) -> None:
        """Expert e multiplies by e + 1: dispatch and combine must give each token its own sum."""
        assert self._membership is not None
        groups, comm = self._membership.groups, self._comm
        placement = even_placement(1, EXPERTS, comm.size, spare_slots=1)
        exchange = exchange_for(mode, groups, SlotTables(placement, self._device), (TOKENS,))
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(TOKENS, WIDTH, generator=generator).to(self._device)
        expert_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(CHOSEN).indices.to(self._device)
        weight_TK = torch.rand(TOKENS, CHOSEN, generator=generator).to(self._device)
        expected_TD = x_TD * ((expert_TK + 1) * weight_TK).sum(1, keepdim=True)
        share = [exchange.share(part) for part in (x_TD, expert_TK, weight_TK, expected_TD)]
        dispatched = exchange.dispatch(0, share[0], share[1], share[2])
        factors = torch.tensor([expert + 1.0 for expert in placement.slots_of(comm.rank)[0]], device=self._device)
        factor_N = factors.repeat_interleave(torch.tensor(dispatched.rows, device=self._device))
        _same(mode, exchange.combine(dispatched, dispatched.x_ND * factor_N[:, None]), share[3])

    def compare_captured(self, make_capture: Callable[[], Capture] = CudaCapture) -> None:
        """Captured once, replayed with other numbers in the same place."""
        comm, mine = self._comm, torch.zeros(TOKENS, WIDTH, device=self._device)
        replay, summed = make_capture()(lambda: comm.all_reduce(mine.clone()))
        for turn in range(3):
            numbers = [self._rows(turn * comm.size + rank, TOKENS) for rank in range(comm.size)]
            mine.copy_(numbers[comm.rank])
            replay()
            _same("a captured all_reduce", summed, torch.stack(numbers).sum(0))

    def _rows(self, rank: int, rows: int) -> Tensor:
        return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rank)).to(self._device)


def _same(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
        raise ValueError(f"{what} gave something else than it must")

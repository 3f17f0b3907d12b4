"""What runs in each rank's process: a worker, and beside it threads of control that never wait for the worker.

Plain Python: cluster/ray_rank.py makes a Ray actor of it. `load`, `open_store` and `join` run one at a time, `step` is
called by two threads (step_line.py); everything below them is called beside them, from threads of its own.

Whoever owns the ranks imports this file and computes nothing: what computes is imported when a rank is made.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
from typing import TYPE_CHECKING

from cluster.config import EngineConfig
from cluster.crash_bundle import MAX_STACKS, RankReport
from cluster.messages import Grammar, StepPlan, StepResult, WorkerFacts
from cluster.placement import Placement
from cluster.rendezvous import Rendezvous, Transport
from cluster.step_line import StepLine
from model.comm import alone

if TYPE_CHECKING:
    from cluster.process_group import Membership, Store

COLLECTIVE_TIMEOUT_S = 3600.0  # longer than any step's deadline: what hangs is aborted from outside


class RankActor:
    """Made without a rank, so that a process can stand by until one is missing."""

    def __init__(self, config: EngineConfig) -> None:
        import cluster.process_group
        import cluster.worker  # noqa: F401 - all that is to come: a process that stands by shall have it

        self._config = config
        self._store: Store | None = None
        self._membership: Membership | None = None
        self._read = (0, 1)

    def load(self, rank: int, placement: Placement) -> WorkerFacts:
        from cluster.worker import Worker

        self._rank = rank
        self._worker = Worker(rank, self._config, placement)
        self._line = StepLine(self._worker)
        return self._worker.load(self._count)

    def open_store(self, own_address: str, size: int, epoch: int, transport: Transport) -> Rendezvous:
        """Rank 0 only: a meeting point for the group."""
        from cluster.process_group import open_store

        tensor = self._config.parallel.tensor
        rendezvous = Rendezvous(own_address, 0, size, tensor, epoch, transport, COLLECTIVE_TIMEOUT_S)
        self._store = open_store(rendezvous)
        return rendezvous.at(self._store.port)

    def join(self, rendezvous: Rendezvous | None, own_address: str, num_pages: int, epoch: int) -> None:
        """Take a place in the group that steps of this epoch are for. No rendezvous: there is nobody else."""
        from cluster.process_group import join

        def enter(leave: threading.Event) -> None:
            self._membership = None
            if rendezvous is not None:
                self._membership = join(rendezvous, self._rank, own_address, self._store, leave)
            self._worker.join(alone() if self._membership is None else self._membership.groups, num_pages)

        self._line.form(enter, epoch)

    def step(self, plan: StepPlan, epoch: int) -> StepResult:
        return self._line.step(plan, epoch)

    def beat(self) -> None:
        """Who answers is not frozen."""

    def progress(self) -> float:
        """The share of this rank's bytes that has been read."""
        done, total = self._read
        return done / total

    def abort(self, epoch: int) -> None:
        """Call the worker out of its collectives, which nothing else can; returns when it has come.

        Nothing of this epoch begins any more, even if it was asked for before. Raises if the device has failed: after
        an illegal address, say, it answers this process nothing any more, and only another one can take its place.
        """
        self._line.close(epoch)
        if self._membership is not None:
            self._membership.abort()
        self._line.wait_until_empty()
        self._worker.drop_graphs()
        if self._config.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def report(self) -> RankReport:
        """What can be said of this process, whatever its worker does or waits for."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read(MAX_STACKS).decode(errors="replace")
        with open("/proc/self/statm") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        device = 0
        if self._config.device == "cuda":
            import torch

            device = torch.cuda.memory_allocated()
        return RankReport(self._rank, stacks, resident, device)

    def fetch(self, placement: Placement) -> None:
        self._worker.fetch(placement)

    def compile(self, grammar: Grammar) -> None:
        self._worker.compile(grammar)

    def _count(self, done: int, total: int) -> None:
        self._read = done, total

    def watch(self) -> None:
        """Never returns. That it fails says that the process has died."""
        threading.Event().wait()

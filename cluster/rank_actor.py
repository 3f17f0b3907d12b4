"""What runs in each rank's process: a worker, and beside it a thread of control that never waits for the worker.

Plain Python: cluster/worker_group.py makes a Ray actor of it. `load`, `join` and `step` run one at a time;
`abort`, `prepare`, `watch` and `end` belong to the concurrency group "control".
"""

from __future__ import annotations

import threading

from cluster.config import EngineConfig
from cluster.messages import Grammar, StepPlan, StepResult, WorkerFacts
from cluster.placement import Placement
from cluster.process_group import Membership, Rendezvous, Store, Transport, join, open_store
from cluster.worker import Worker
from model.comm import alone


class RankActor:
    def __init__(self, rank: int, config: EngineConfig, placement: Placement) -> None:
        self._rank = rank
        self._tensor = config.parallel.tensor
        self._worker = Worker(rank, config, placement)
        self._ended = threading.Event()
        self._store: Store | None = None
        self._membership: Membership | None = None

    def load(self) -> WorkerFacts:
        return self._worker.load()

    def open_store(self, own_address: str, size: int, epoch: int, transport: Transport) -> Rendezvous:
        """Rank 0 only: a meeting point for the group."""
        rendezvous = Rendezvous(own_address, 0, size, self._tensor, epoch, transport)
        self._store = open_store(rendezvous)
        return rendezvous.at(self._store.port)

    def join(self, rendezvous: Rendezvous | None, own_address: str, num_pages: int) -> None:
        """Take a place in the group; None: there is nobody else."""
        self._membership = None
        if rendezvous is not None:
            self._membership = join(rendezvous, self._rank, own_address, self._store)
        self._worker.join(alone() if self._membership is None else self._membership.groups, num_pages)

    def step(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def abort(self) -> None:
        """Nothing else can unblock a rank that waits for another one in a collective."""
        if self._membership is not None:
            self._membership.abort()

    def prepare(self, grammar: Grammar) -> None:
        self._worker.prepare(grammar)

    def watch(self) -> None:
        """Returns once the actor is told to end. If it fails instead, the process has died."""
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()

"""All ranks of one replica as one thing that takes a plan and gives a result. Two forms:

    InProcessGroup   one rank, called directly: tests and offline use, no ray needed
    RayGroup         one actor per rank; watched, so that a death is known at once even while nobody steps

Knows lifecycles, not tokens. The only file of cluster/ that imports ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Any, Protocol

from cluster.config import EngineConfig
from cluster.errors import StepFailed
from cluster.memory import page_budget
from cluster.messages import Grammar, RankStatus, StepPlan, StepResult, WorkerFacts
from cluster.placement import Placement
from cluster.process_group import Transport
from cluster.rank_actor import RankActor
from cluster.transport import shared_memory
from cluster.worker import Worker
from model.comm import SoloComm

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # what ranks on one node meet on: nothing listens outside
STOP_TIMEOUT_S = 5.0


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step. Raises StepFailed if a rank could not do it."""


class WorkerGroup(Protocol):
    def start(self) -> int:
        """Load the weights, connect the ranks; the pages of KV memory each holds. Blocks."""

    def step(self, plan: StepPlan) -> PendingStep:
        """Hand a plan to every rank. Plans are carried out in the order they are handed in."""

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar where tokens are chosen, beside the steps. Blocks; ModelError if it cannot be."""

    def ranks(self) -> tuple[RankStatus, ...]: ...

    def stop(self) -> None:
        """End every rank. Safe at any time, and twice."""


class InProcessGroup:
    """One rank in this process, on a thread of its own: the engine plans while it computes."""

    def __init__(self, config: EngineConfig, placement: Placement, tokens_per_sequence: int) -> None:
        self._config = config
        self._tokens_per_sequence = tokens_per_sequence
        self._worker = Worker(0, config, placement)
        self._clock = _StepClock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rank-0")
        self._status = RankStatus(0, os.getpid(), socket.gethostname(), config.device, "loading", None)

    def start(self) -> int:
        num_pages = page_budget(self._config, [self._worker.load()], self._tokens_per_sequence)
        # On the thread that will step: torch's number of threads is each thread's own to set.
        self._thread.submit(self._worker.join, SoloComm(), num_pages).result()
        self._status = replace(self._status, state="ready")
        return num_pages

    def step(self, plan: StepPlan) -> PendingStep:
        return self._thread.submit(self._step, plan)

    def prepare(self, grammar: Grammar) -> None:
        self._worker.prepare(grammar)

    def ranks(self) -> tuple[RankStatus, ...]:
        return (replace(self._status, last_step_age_s=self._clock.age()),)

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._status = replace(self._status, state="dead")

    def _step(self, plan: StepPlan) -> StepResult:
        result = self._worker.step(plan)
        self._clock.tick()
        return result


class RayGroup:
    """One actor per rank. This process owns and supervises them: Ray restarts nothing by itself."""

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        tokens_per_sequence: int,
        *,
        placement_group: Any = None,  # bundle r holds rank r; None: wherever Ray finds room
        on_death: Callable[[str], None] = log.error,  # called once, from the watching thread, with a sentence
    ) -> None:
        self._config = config
        self._placement = placement
        self._tokens_per_sequence = tokens_per_sequence
        self._placement_group = placement_group
        self._on_death = on_death
        self._clock = _StepClock()
        self._actors: list[Any] = []
        self._statuses: list[RankStatus] = []
        self._stopping = threading.Event()
        self._watches: list[Any] = []

    def start(self) -> int:
        import ray

        try:
            self._actors = [self._create(rank) for rank in range(self._config.parallel.tensor)]
            facts: list[WorkerFacts] = ray.get([actor.load.remote() for actor in self._actors])
            num_pages = page_budget(self._config, facts, self._tokens_per_sequence)
            self._join(num_pages)
        except ray.exceptions.RayTaskError as error:  # what a rank raised, without Ray's wrapping
            self.stop()
            raise error.cause from None
        except BaseException:
            self.stop()
            raise
        self._statuses = [
            RankStatus(rank, fact.pid, fact.node, fact.device, "ready", None) for rank, fact in enumerate(facts)
        ]
        for rank, fact in enumerate(facts):
            log.info(
                "rank %d: %.2f GB in %.1f s, pid %d on %s",
                rank,
                fact.weight_bytes / 1e9,
                fact.load_seconds,
                fact.pid,
                fact.node,
            )
        # One never-ending call per actor: it fails within milliseconds of the actor's death.
        self._watches = [actor.watch.options(concurrency_group="control").remote() for actor in self._actors]
        threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()
        return num_pages

    def step(self, plan: StepPlan) -> PendingStep:
        return _RayStep([actor.step.remote(plan) for actor in self._actors], self._clock)

    def prepare(self, grammar: Grammar) -> None:
        import ray

        try:
            ray.get(self._actors[0].prepare.options(concurrency_group="control").remote(grammar))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def ranks(self) -> tuple[RankStatus, ...]:
        return tuple(replace(status, last_step_age_s=self._clock.age()) for status in self._statuses)

    def stop(self) -> None:
        import ray

        self._stopping.set()
        for actor in self._actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be dead already
                ray.kill(actor)
        if self._watches:  # each ends with its actor
            ray.wait(self._watches, num_returns=len(self._watches), timeout=STOP_TIMEOUT_S)
        self._statuses = [replace(status, state="dead") for status in self._statuses]

    def _join(self, num_pages: int) -> None:
        import ray

        addresses: list[str] = ray.get([actor.address.remote() for actor in self._actors])
        transport: Transport = "gloo"
        if len(set(addresses)) == 1:
            addresses = [LOOPBACK] * len(addresses)
            transport = "shared_memory" if shared_memory.supported() else "gloo"
        rendezvous = None
        if len(addresses) > 1:
            rendezvous = ray.get(self._actors[0].open_store.remote(addresses[0], len(addresses), 0, transport))
        ray.get(
            [
                actor.join.remote(rendezvous, address, num_pages)
                for actor, address in zip(self._actors, addresses, strict=True)
            ]
        )

    def _create(self, rank: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options: dict[str, Any] = {
            "num_cpus": self._config.parallel.cpus_per_rank,
            "num_gpus": 1 if self._config.device == "cuda" else 0,
            "max_restarts": 0,
            "concurrency_groups": {"control": 4},
        }
        if self._placement_group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=rank
            )
        return ray.remote(**options)(_RayRank).remote(rank, self._config, self._placement)

    def _watch(self) -> None:
        """Wait for the first death."""
        import ray

        ready, _ = ray.wait(self._watches, num_returns=1)
        if self._stopping.is_set():
            return
        dead = self._watches.index(ready[0])
        status = self._statuses[dead]
        self._statuses[dead] = replace(status, state="dead")
        self._on_death(f"rank {dead} (pid {status.pid} on {status.node}) died")


class _RayRank(RankActor):
    """A rank that can say where Ray put it."""

    def address(self) -> str:
        import ray

        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return address


class _StepClock:
    """When the last step ended."""

    def __init__(self) -> None:
        self._last: float | None = None

    def tick(self) -> None:
        self._last = monotonic()

    def age(self) -> float | None:
        return None if self._last is None else monotonic() - self._last


class _RayStep:
    def __init__(self, references: list[Any], clock: _StepClock) -> None:
        self._references = references
        self._clock = clock

    def result(self) -> StepResult:
        import ray

        try:
            results: list[StepResult] = ray.get(self._references)
        except ray.exceptions.RayError as error:
            raise StepFailed(self._culprit(error)) from error
        self._clock.tick()
        return results[0]

    def _culprit(self, error: Exception) -> str:
        """Which rank failed, and how, in one sentence."""
        import ray

        for rank, reference in enumerate(self._references):
            try:
                ray.get(reference, timeout=0)
            except ray.exceptions.ActorDiedError:
                return f"rank {rank} died during a step"
            except ray.exceptions.RayTaskError as failure:
                error = failure.cause
            except ray.exceptions.GetTimeoutError:
                continue
        return f"a rank failed during a step: {error}"

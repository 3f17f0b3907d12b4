"""All ranks of one replica as one thing that takes a plan and gives a result; and its form as Ray actors.

The other form, for tests and offline use, is cluster/in_process_group.py. Knows lifecycles, not tokens. The only file
of cluster/ that imports ray.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config import EngineConfig
from cluster.errors import StepFailed
from cluster.memory import page_budget
from cluster.messages import Grammar, RankStatus, StepPlan, StepResult, WorkerFacts
from cluster.placement import Placement
from cluster.process_group import Transport
from cluster.rank_actor import RankActor
from cluster.results import merge
from cluster.step_clock import StepClock
from cluster.transport import shared_memory

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # what ranks on one node meet on: nothing listens outside
STOP_TIMEOUT_S = 5.0
ABORT_TIMEOUT_S = 5.0  # a rank that cannot leave a collective in this time is replaced
DEATHS_WITHIN_S = 0.3  # a failed step is heard of before the death that caused it


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step. Raises StepFailed if a rank could not do it."""


class WorkerGroup(Protocol):
    def start(self) -> int:
        """Load the weights, connect the ranks; the pages of KV memory each holds. Blocks."""

    def step(self, plan: StepPlan) -> PendingStep:
        """Hand a plan to every rank. Plans are carried out in the order they are handed in."""

    @property
    def epoch(self) -> int:
        """How often the ranks were formed anew."""

    def recover(self) -> None:
        """After a failed step or a death: replace the ranks that are gone and form the group anew.

        Weights stay where they are; pages and sequences are forgotten, steps count from 0 again. Blocks.
        """

    def prepare(self, grammar: Grammar) -> None:
        """Compile a grammar where tokens are chosen, beside the steps. Blocks; ModelError if it cannot be."""

    def ranks(self) -> tuple[RankStatus, ...]: ...

    def stop(self) -> None:
        """End every rank. Safe at any time, and twice."""


@dataclass(frozen=True, slots=True)
class _Rank:
    """One actor, and the call that fails within milliseconds of its death."""

    actor: Any
    watch: Any
    facts: WorkerFacts


class RayGroup:
    """One actor per rank. This process owns and supervises them: Ray restarts nothing by itself."""

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        tokens_per_sequence: int,
        *,
        placement_group: Any = None,  # bundle r holds rank r; None: wherever Ray finds room
        on_death: Callable[[str, int], None],  # from a watching thread, with a sentence and the epoch
    ) -> None:
        self._config = config
        self._placement = placement
        self._tokens_per_sequence = tokens_per_sequence
        self._placement_group = placement_group
        self._on_death = on_death
        self._clock = StepClock()
        self._ranks: dict[int, _Rank] = {}
        self._dead: set[int] = set()
        self._num_pages = 0
        self._stopping = threading.Event()
        self.epoch = 0

    def start(self) -> int:
        try:
            self._fill()
            facts = [rank.facts for rank in self._ranks.values()]
            self._num_pages = page_budget(self._config, facts, self._tokens_per_sequence)
            self._form()
        except BaseException:
            self.stop()
            raise
        return self._num_pages

    def recover(self) -> None:
        self.epoch += 1
        self._dead |= self._find_dead() | self._abort()
        for number in self._dead:
            _kill(self._ranks.pop(number).actor)
        self._fill()
        self._form()
        if self._stopping.is_set():  # meanwhile, and what was just started must not stay
            self.stop()

    def step(self, plan: StepPlan) -> PendingStep:
        return _RayStep([rank.actor.step.remote(plan) for rank in self._ranks.values()], self._clock, self._placement)

    def prepare(self, grammar: Grammar) -> None:
        _get([self._ranks[0].actor.prepare.options(concurrency_group="control").remote(grammar)])

    def ranks(self) -> tuple[RankStatus, ...]:
        age = self._clock.age()
        return tuple(
            RankStatus(n, r.facts.pid, r.facts.node, r.facts.device, "dead" if n in self._dead else "ready", age)
            for n, r in sorted(self._ranks.copy().items())
        )

    def stop(self) -> None:
        import ray

        self._stopping.set()
        for rank in self._ranks.values():
            _kill(rank.actor)
        if watches := [rank.watch for rank in self._ranks.values()]:  # each ends with its actor
            ray.wait(watches, num_returns=len(watches), timeout=STOP_TIMEOUT_S)
        self._dead = set(self._ranks)

    def _fill(self) -> None:
        """Start and load the ranks that are missing."""
        missing = [rank for rank in range(self._config.parallel.ranks) if rank not in self._ranks]
        actors = [self._create(rank) for rank in missing]
        try:
            facts: list[WorkerFacts] = _get([actor.load.remote() for actor in actors])
        except BaseException:
            for actor in actors:
                _kill(actor)
            raise
        for number, actor, fact in zip(missing, actors, facts, strict=True):
            watch = actor.watch.options(concurrency_group="control").remote()
            self._ranks[number] = _Rank(actor, watch, fact)
            gigabytes = fact.weight_bytes / 1e9
            log.info(
                "rank %d: %.2f GB in %.1f s, pid %d on %s", number, gigabytes, fact.load_seconds, fact.pid, fact.node
            )
        self._ranks = dict(sorted(self._ranks.items()))
        self._dead.clear()

    def _form(self) -> None:
        """Connect the ranks, and watch them."""
        actors = [rank.actor for rank in self._ranks.values()]
        addresses: list[str] = _get([actor.address.remote() for actor in actors])
        transport: Transport = "gloo"
        if len(set(addresses)) == 1:
            addresses = [LOOPBACK] * len(addresses)
            transport = "shared_memory" if shared_memory.supported() else "gloo"
        rendezvous = None
        if len(actors) > 1:
            (rendezvous,) = _get([actors[0].open_store.remote(addresses[0], len(actors), self.epoch, transport)])
        _get([a.join.remote(rendezvous, at, self._num_pages) for a, at in zip(actors, addresses, strict=True)])
        threading.Thread(target=self._watch, args=(self.epoch,), name="watch-ranks", daemon=True).start()

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

    def _watch(self, epoch: int) -> None:
        """Wait for the first death of an epoch."""
        import ray

        ranks = dict(self._ranks)
        ray.wait([rank.watch for rank in ranks.values()], num_returns=1)
        if self._stopping.is_set() or self.epoch != epoch:
            return
        self._dead |= self._find_dead()
        names = [f"rank {n} (pid {ranks[n].facts.pid} on {ranks[n].facts.node})" for n in sorted(self._dead)]
        self._on_death(f"{' and '.join(names)} died", epoch)

    def _find_dead(self) -> set[int]:
        import ray

        watches = {rank.watch: number for number, rank in self._ranks.items()}
        ray.wait(list(watches), num_returns=1, timeout=DEATHS_WITHIN_S)
        ended, _ = ray.wait(list(watches), num_returns=len(watches), timeout=0.01)
        return {watches[watch] for watch in ended}

    def _abort(self) -> set[int]:
        """Call every survivor out of its collectives; the ranks that did not come."""
        import ray

        calls = {
            rank.actor.abort.options(concurrency_group="control").remote(): number
            for number, rank in self._ranks.items()
            if number not in self._dead
        }
        if not calls:
            return set()
        ended, waiting = ray.wait(list(calls), num_returns=len(calls), timeout=ABORT_TIMEOUT_S)
        lost = {calls[call] for call in waiting}
        for call in ended:
            try:
                ray.get(call)
            except ray.exceptions.RayError:
                lost.add(calls[call])
        return lost


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):  # it may be dead already
        ray.kill(actor)


def _get(references: Sequence[Any]) -> Any:
    """The results of calls to ranks; what a rank raised, without Ray's wrapping."""
    import ray

    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayActorError as error:
        raise StepFailed(f"a rank died: {str(error).splitlines()[0]}") from error


class _RayRank(RankActor):
    """A rank that can say where Ray put it."""

    def address(self) -> str:
        import ray

        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return address


class _RayStep:
    def __init__(self, references: list[Any], clock: StepClock, placement: Placement) -> None:
        self._references = references
        self._clock = clock
        self._placement = placement

    def result(self) -> StepResult:
        import ray

        try:
            results: list[StepResult] = ray.get(self._references)
        except ray.exceptions.RayError as error:
            raise StepFailed(self._culprit(error)) from error
        self._clock.tick()
        return merge(results, self._placement)

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

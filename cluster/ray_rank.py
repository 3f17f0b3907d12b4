"""One rank as a Ray actor, seen by the process that owns it: made, asked, watched, ended.

Beside the thread that loads and joins groups an actor has others:

    step       2   one step is computed, the next prepared (step_line.py)
    heartbeat  1   "are you there?", and nothing else, so that nothing can be in its way
    control    4   watch (never returns), progress, abort, report
    beside     4   grammars compiled, experts fetched
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import EngineConfig
from cluster.errors import StepFailed
from cluster.heartbeat import Pulse
from cluster.messages import RankStatus, StepPlan, WorkerFacts
from cluster.placement import Placement
from cluster.rank_actor import RankActor
from cluster.step_line import CALLERS

CONCURRENCY = {"step": CALLERS, "heartbeat": 1, "control": 4, "beside": 4}

OF_EVERY_RANK: dict[str, Any] = {
    "max_restarts": 0,
    "concurrency_groups": CONCURRENCY,
    "enable_task_events": False,  # a record of every step, for Ray's dashboard: a tenth of what its call costs
}

State = Literal["loading", "ready", "frozen", "dead"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where Ray has put an actor. Filled by the actor."""

    pid: int
    host: str
    address: str
    node: str  # Ray's id of the node
    gpus: tuple[str, ...]  # that the actor may see


class RayRank(RankActor):
    """A rank that can say where Ray put it."""

    _gpus: tuple[str, ...] = ()  # taken over; else Ray's own

    def place(self) -> Place:
        import socket

        import ray

        address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        context = ray.get_runtime_context()
        gpus = self._gpus or tuple(context.get_accelerator_ids().get("GPU", ()))
        return Place(os.getpid(), socket.gethostname(), address, context.get_node_id(), gpus)

    def see(self, gpus: tuple[str, ...]) -> None:
        """Take over the devices of a rank that is gone. Nothing has touched a device in this process yet."""
        self._gpus = gpus
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


class Rank:
    """An actor and what is known of it. `state` is written by the watching thread, and by `joined`."""

    def __init__(self, number: int, actor: Any, placement: Placement) -> None:
        self.number = number
        self.actor = actor
        self._step = actor.step.options(concurrency_group="step")
        self.state: State = "loading"
        self.epoch = -1  # of the group it is in; none yet
        self.watch = self.ask("control", "watch")  # fails within milliseconds of the actor's death
        self.placing = actor.place.remote()  # ends when the process is up
        self.loading = actor.load.remote(number, placement)
        self.place: Place | None = None
        self.facts: WorkerFacts | None = None
        self._pulse = Pulse()
        self._beat: Any = None

    def __str__(self) -> str:
        where = "" if self.place is None else f" (pid {self.place.pid} on {self.place.host})"
        return f"rank {self.number}{where}"

    @property
    def lost(self) -> bool:
        return self.state in ("frozen", "dead")

    def step(self, plan: StepPlan, epoch: int) -> Any:
        return self._step.remote(plan, epoch)

    def ask(self, group: str, method: str, *arguments: Any) -> Any:
        """A call to a thread of one of the groups above."""
        return getattr(self.actor, method).options(concurrency_group=group).remote(*arguments)

    def located(self, place: Place) -> None:
        self.place = place
        self._pulse.process = place.pid if place.node == _own_node() else None

    def joined(self, epoch: int) -> None:
        self.epoch = epoch
        if self.state == "loading":
            self.state = "ready"

    def frozen(self, elapsed_s: float) -> bool:
        """Ask whether the process is there, `elapsed_s` after it was asked last. Has it been silent for too long?"""
        if self.place is None:
            return False
        answered = self._beat is None or ended([self._beat])
        if answered:
            self._beat = self.ask("heartbeat", "beat")
        return self._pulse.check(answered=bool(answered), elapsed_s=elapsed_s)

    def kill(self, *, by_force: bool = False) -> None:
        """By force: also one that listens to nobody, which Ray by itself ends after seconds only."""
        import ray

        gone = bool(ended([self.watch]))  # then its number may be somebody else's by now
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.actor)
        if by_force and not gone and self._pulse.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pulse.process, signal.SIGKILL)

    def status(self, device: str, last_step_age_s: float | None) -> RankStatus:
        pid, host = (0, "") if self.place is None else (self.place.pid, self.place.host)
        device = device if self.facts is None else self.facts.device
        return RankStatus(self.number, pid, host, device, self.state, last_step_age_s)


def create(config: EngineConfig, placement_group: Any, bundle: int) -> Any:
    """An actor without a rank yet, in a bundle of the placement group, or wherever Ray finds room if there is none."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = OF_EVERY_RANK | {
        "num_cpus": config.parallel.cpus_per_rank,
        "num_gpus": 1 if config.device == "cuda" else 0,
    }
    if placement_group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group, placement_group_bundle_index=bundle
        )
    return ray.remote(**options)(RayRank).remote(config)


def bundles_of_ranks(placement_group: Any, ranks: int) -> list[int]:
    """The bundle of each rank. The first rank's is the first; from there ranks of one node are neighbours."""
    from ray.util.placement_group import placement_group_table

    if placement_group is None:
        return list(range(ranks))
    nodes = placement_group_table(placement_group)["bundles_to_node_id"]
    return node_by_node([nodes[bundle] for bundle in range(ranks)])


def node_by_node(nodes: Sequence[str]) -> list[int]:
    """Bundles in the order of their nodes, nodes in that of their first bundles: [a b a c b] -> [0 2 1 4 3]."""
    return sorted(range(len(nodes)), key=lambda bundle: nodes.index(nodes[bundle]))


def ended(references: Sequence[Any], timeout_s: float = 0.0, at_least: int | None = None) -> list[Any]:
    """Those of the calls that have ended, one way or the other. Waits for all of them, or for so many."""
    import ray

    if not references:
        return []
    done: list[Any]
    done, _ = ray.wait(list(references), num_returns=at_least or len(references), timeout=timeout_s)
    return done


def failed(reference: Any) -> bool:
    """Of a call that has ended."""
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return True
    return False


def results(references: Sequence[Any], timeout_s: float | None = None) -> Any:
    """The results of calls to ranks; what a rank raised, without Ray's wrapping."""
    import ray

    try:
        return ray.get(list(references), timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.GetTimeoutError:
        raise StepFailed(f"the ranks did not come together within {timeout_s:g} s", "deadline") from None
    except ray.exceptions.RayActorError as error:
        raise StepFailed(f"a rank died: {str(error).splitlines()[0]}", "died") from error
    except ray.exceptions.RayError as error:
        raise StepFailed(f"a rank's answer was lost: {type(error).__name__}: {error}") from error


def _own_node() -> str:
    import ray

    node: str = ray.get_runtime_context().get_node_id()
    return node


def session_directory() -> Path:
    """Where Ray keeps what this cluster writes on this machine; log collectors look there."""
    import ray

    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs"

"""Processes that stand by for ranks that are lost: imports done, no weights, no device context.

    parallel.standby on every node of the replica; one is taken, another is started in its place, in the background

A new process takes seconds until it can begin to load; one of these takes none. It asks nothing of Ray's resources: a
rank that is lost leaves its CPUs and its GPU in the replica's placement group, where nobody else can take them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from cluster.config import EngineConfig
from cluster.ray_rank import OF_EVERY_RANK, Place, RayRank, ended, failed

log = logging.getLogger(__name__)

ANSWER_S = 2.0  # in which a process must show that it is there


class Standbys:
    """Used by one thread, and by whoever stops the group."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._waiting: dict[str, list[Any]] = {}  # by Ray's id of the node

    def fill(self, nodes: Iterable[str]) -> None:
        """Start what is missing on these nodes; nothing waits for it."""
        for node in nodes:
            here = self._waiting.setdefault(node, [])
            here += [self._start(node) for _ in range(self._config.parallel.standby - len(here))]

    def take(self, place: Place) -> Any | None:
        """One that can go on where another was, with the devices it had; None: there is none, or not yet."""
        here = self._waiting.get(place.node, [])
        asked = {actor.beat.remote(): actor for actor in here}
        for call in ended(list(asked), ANSWER_S, at_least=1):
            actor = asked[call]
            here.remove(actor)
            if not failed(call):
                actor.see.remote(place.gpus)
                return actor
        return None

    def stop(self) -> None:
        import ray

        for actor in (actor for here in self._waiting.values() for actor in here):
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        self._waiting = {}

    def _start(self, node: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node, soft=False)
        options = OF_EVERY_RANK | {"num_cpus": 0, "scheduling_strategy": here}
        return ray.remote(**options)(RayRank).remote(self._config)

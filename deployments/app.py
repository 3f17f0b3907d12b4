"""The Serve application: `import_path: deployments.app:build` in serve_config.yaml.

    args + environment ──load──▶ Settings ──resolve──▶ Resolved ──bind──▶ Application

Says what a replica needs of the cluster: one bundle per rank, the ingress in the first of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment

from cluster.config import EngineConfig
from deployments.ingress import Ingress
from deployments.layout import Machine
from deployments.resolve import Resolved, resolve
from deployments.settings import environment, load

# Requests that are neither running nor waiting in the engine: on their way in or out, probes, /v1/models.
HTTP_MARGIN = 64


def build(args: dict[str, Any]) -> Application:
    """What `serve run` and KubeRay call."""
    return bind(resolve(load(args, environment()), machine(may_grow=True)))


def machine(*, may_grow: bool) -> Machine:
    """What Ray knows of the cluster now. Ray must be up."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    # A head that takes no work has no CPUs in Ray's eyes; then this machine's count is the best guess.
    cores = int(max((node.get("CPU", 0) for node in nodes), default=0)) or os.cpu_count() or 1
    all_cores = int(sum(node.get("CPU", 0) for node in nodes)) or cores
    return Machine(cores, int(sum(node.get("GPU", 0) for node in nodes)), may_grow, all_cores)


def bind(resolved: Resolved, stdout: Path | None = None) -> Application:
    """stdout: where replicas write what is meant for stdout; None: to their own, which Ray keeps in a file."""
    settings, engine = resolved.settings, resolved.engine
    scaling = settings.autoscaling
    if scaling.min_replicas == scaling.max_replicas:
        replicas: dict[str, Any] = {"num_replicas": scaling.min_replicas}
    else:
        policy = {"policy_function": "deployments.autoscaling:Policy"}
        replicas = {"autoscaling_config": scaling.model_dump() | {"policy": policy}}
    deployment: Deployment = serve.deployment(  # type: ignore[assignment]  # it also is a decorator
        serve.ingress()(Ingress),
        name="ingress",
        # Above what the engine admits, so that a full queue is answered by us, with a 429 that says so.
        max_ongoing_requests=engine.scheduler.max_running + engine.scheduler.max_waiting + HTTP_MARGIN,
        placement_group_bundles=bundles(engine),
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": _ingress_cpus(engine)},
        # No answer takes longer than its deadline, so none is cut by a shutdown that waits as long.
        graceful_shutdown_timeout_s=settings.limits.request_timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,  # what fails at start fails again: say so at once
        **replicas,
    )
    return deployment.bind(resolved, stdout)


def bundles(engine: EngineConfig) -> list[dict[str, float]]:
    """One per rank. The ingress sits in the first: on CUDA with a core of its own, on CPU sharing."""
    rank = {"CPU": engine.parallel.cpus_per_rank} | ({"GPU": 1.0} if engine.device == "cuda" else {})
    first = rank | {"CPU": engine.parallel.cpus_per_rank + _ingress_cpus(engine)}
    return [first] + [dict(rank) for _ in range(engine.parallel.ranks - 1)]


def _ingress_cpus(engine: EngineConfig) -> int:
    return 1 if engine.device == "cuda" else 0

"""What one replica asks of a Ray cluster. Imports ray, starts nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.layout import Machine
from deployments.resolve import Resolved, resolve
from deployments.settings import load
from tests.tiny import CONFIG

# Ray Serve's own, at its first import; so deployments.app is imported inside the tests.
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


def resolved(tmp_path: Path, machine: Machine, **args: Any) -> Resolved:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return resolve(load({"model": str(tmp_path)} | args), machine)


def bundles(result: Resolved) -> list[dict[str, float]]:
    from deployments import app

    return app.bundles(result.engine)


def options(result: Resolved) -> Any:
    """The deployment as Serve gets it."""
    from deployments import app

    return app.bind(result)._bound_deployment


@pytest.mark.parametrize(("ranks", "data"), [(1, 1), (2, 1), (4, 2)])
def test_a_cpu_replica_asks_for_one_cpu_in_all(ranks: int, data: int, tmp_path: Path) -> None:
    result = resolved(tmp_path, Machine(8, 0), parallel={"tensor": ranks // data, "data": data})
    assert bundles(result) == [{"CPU": 1 / ranks}] * ranks


def test_a_cuda_replica_has_a_gpu_per_rank_and_a_core_for_the_ingress(tmp_path: Path) -> None:
    result = resolved(tmp_path, Machine(64, 8), parallel={"cpus_per_rank": 3.0})
    assert bundles(result) == [{"CPU": 4, "GPU": 1}]
    two = replace(result, engine=replace(result.engine, parallel=replace(result.engine.parallel, tensor=2)))
    assert bundles(two) == [{"CPU": 4, "GPU": 1}, {"CPU": 3, "GPU": 1}]


def test_serve_lets_in_more_than_the_engine_admits(tmp_path: Path) -> None:
    """So that a full queue is answered by the engine, with a sentence, and not by Serve."""
    result = resolved(tmp_path, Machine(8, 0), scheduler={"max_running": 4, "max_waiting": 6})
    assert options(result).max_ongoing_requests > 10


def test_replicas(tmp_path: Path) -> None:
    assert (
        options(resolved(tmp_path, Machine(8, 0), autoscaling={"min_replicas": 2, "max_replicas": 2})).num_replicas == 2
    )
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 5}
    config = options(resolved(tmp_path, Machine(8, 0), autoscaling=scaling))._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 3, 5)


def test_no_answer_is_cut_by_a_shutdown(tmp_path: Path) -> None:
    result = resolved(tmp_path, Machine(8, 0), limits={"request_timeout_s": 77})
    assert options(result)._deployment_config.graceful_shutdown_timeout_s >= 77


def test_the_ingress_fits_into_the_first_bundle(tmp_path: Path) -> None:
    for machine in (Machine(8, 0), Machine(64, 8)):
        result = resolved(tmp_path, machine)
        wanted = options(result).ray_actor_options["num_cpus"]
        assert wanted <= bundles(result)[0]["CPU"] - (machine.gpus > 0)

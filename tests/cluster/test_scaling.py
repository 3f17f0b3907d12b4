"""Upgrades and scaling while streams run, through Serve's own proxy: no answer fails, none is cut, all say the same.

Deployed from a configuration as KubeRay does it, so that build() runs in the cluster.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.e2e.server import free_port
from tests.load import repeated

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray Serve's own
    # What it shall be replaced by is not read yet.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field in AutoscalingConfig is deprecated"),
]

DEADLINE_S = 120.0
BREATH_S = 0.5  # of a client between two questions: the machine also has replicas to start
QUESTION = {
    "model": "mixtral-demo",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "temperature": 0,
    "max_tokens": 120,
    "ignore_eos": True,
    "stream": True,
}


class Cluster:
    """Serve with one application, changed the way `serve deploy` changes it."""

    def __init__(self) -> None:
        from ray import serve

        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, replicas: dict[str, Any], **args: Any) -> None:
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": "mixtral",
            "import_path": "deployments.app:build",
            "args": {"model": "demo", "access_log": None} | args,
            "deployments": [{"name": "ingress"} | replicas],
        }
        _client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=False)

    def states(self) -> dict[str, int]:
        """How many replicas are RUNNING, STARTING, STOPPING."""
        from ray import serve

        application = serve.status().applications.get("mixtral")
        assert application is None or application.status != "DEPLOY_FAILED", application
        if application is None or "ingress" not in application.deployments:
            return {}
        return {str(state): count for state, count in application.deployments["ingress"].replica_states.items()}

    def settle(self, replicas: int) -> None:
        eventually(lambda: self.states() == {"RUNNING": replicas}, f"{replicas} replicas and no other")

    def replicas(self) -> set[str]:
        details = _client().get_serve_details()["applications"]["mixtral"]["deployments"]["ingress"]
        return {replica["replica_id"] for replica in details["replicas"] if replica["state"] == "RUNNING"}

    def page_size(self) -> int:
        """Of whoever answers."""
        config = httpx.get(f"{self.url}/health", timeout=60).json()["config"]
        size: int = config["kv_cache"]["page_size"]
        return size


def _client() -> Any:
    """Where `serve deploy` arrives; its public way there is the dashboard, which takes seconds to start."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


def shown(name: str) -> list[Sample]:
    """By Ray's agent: what Prometheus sees on a cluster."""
    node = ray.nodes()[0]
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
    return [one for family in text_string_to_metric_families(text) for one in family.samples if one.name == name]


def shown_ready() -> set[str]:
    return {one.labels["replica"] for one in shown("ray_mixtral_ready") if one.value == 1}


def shown_status() -> set[float]:
    """What the alert MixtralNotAsWanted asks for; 6: as it should be."""
    asked = {"application": "mixtral", "deployment": "ingress"}
    return {one.value for one in shown("ray_serve_deployment_status") if asked.items() <= one.labels.items()}


class Load:
    """Work that asks the same again and again, and what it was told."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: list[str] = []

    def __call__(self, number: int, ended: threading.Event) -> None:
        with httpx.Client(timeout=60) as client:
            while not ended.wait(BREATH_S):
                try:
                    self.answers.append(self._ask(client))
                except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                    self.answers.append(f"failed: {error!r}")

    def _ask(self, client: httpx.Client) -> str:
        text, last = "", ""
        with client.stream("POST", f"{self._url}/v1/chat/completions", json=QUESTION) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
        assert last == "data: [DONE]", last
        return text


def eventually(holds: Callable[[], bool], what: str, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(every_s)


@pytest.fixture(scope="module")
def cluster(local_ray: None) -> Iterator[Cluster]:
    from ray import serve

    yield Cluster()
    serve.shutdown()


def test_nobody_notices_an_upgrade_nor_replicas_that_come_and_go(cluster: Cluster) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1000, "upscale_delay_s": 0}
    often = {"metrics_interval_s": 1, "look_back_period_s": 2}
    policy = {"policy_function": "deployments.autoscaling:Policy", "policy_kwargs": {"target_kv_use": 1e-6}}
    cluster.deploy({"autoscaling_config": scaling | often | {"policy": policy}})
    cluster.settle(1)
    load = Load(cluster.url)
    with repeated(3, load):
        cluster.settle(2)  # three requests are far from 1000: it was the memory they hold
        before = cluster.replicas()
        cluster.deploy({"num_replicas": 2}, kv_cache={"page_size": 32})
        eventually(lambda: "STARTING" in cluster.states(), "the upgrade begins")
        cluster.settle(2)
        after = cluster.replicas()
        assert not before & after, "no replica of the old version is left"
        assert cluster.page_size() == 32
    eventually(lambda: shown_ready() == after, "metrics of both replicas, and of none that has ended", every_s=1.0)
    eventually(lambda: shown_status() == {6}, "Serve's own word that there is what was asked for", every_s=1.0)
    answered = len(load.answers)
    with repeated(3, load):
        eventually(lambda: len(load.answers) > answered, "answers before a replica goes")
        cluster.deploy({"num_replicas": 1}, kv_cache={"page_size": 32})
        cluster.settle(1)
        assert cluster.replicas() < after, "scaling restarts nobody"
    assert len(load.answers) > 10
    assert len(set(load.answers)) == 1, sorted(set(load.answers))
    assert "failed" not in load.answers[0]

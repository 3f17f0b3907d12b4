"""Serve with one application in the tests' Ray, changed the way operators change it, and what clients see meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.cluster.served import eventually
from tests.e2e.server import free_port

DEADLINE_S = 120.0
EVERY_S = 0.2  # each look is a call to Serve's controller
BREATH_S = 1.5  # of a client between two questions: the machine also has replicas to start
QUESTION = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "pages of keys"}],
    "temperature": 0,
    "max_tokens": 40,
    "ignore_eos": True,
    "stream": True,
}
# Long enough to be under way still when a replica is told to go.
LONG = {"model": "tiny", "prompt": "the router", "temperature": 0, "ignore_eos": True, "max_tokens": 450}


class Cluster:
    """Serve with one application, changed the way `serve deploy` changes it."""

    def __init__(self, model: str) -> None:
        from ray import serve

        self._model = model
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, replicas: dict[str, Any], **args: Any) -> None:
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": "mixtral",
            "import_path": "deployments.app:build",
            "args": {"model": self._model, "served_model_name": "tiny", "access_log": None} | args,
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
        self.eventually(lambda: self.states() == {"RUNNING": replicas}, f"{replicas} replicas and no other")

    def eventually(self, holds: Callable[[], object], what: str) -> None:
        eventually(holds, what, DEADLINE_S, EVERY_S)

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


def whole(url: str) -> str:
    """What nobody disturbs."""
    text: str = httpx.post(f"{url}/v1/completions", json=LONG, timeout=120).json()["choices"][0]["text"]
    return text


@contextmanager
def under_way(url: str, expected: str) -> Iterator[None]:
    """A stream has begun when the block does, and comes to its own end whatever is done in the block."""
    with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=120) as answer:
        lines = answer.iter_lines()
        read = [next(lines) for _ in range(4)]
        yield
        read += list(lines)
    assert [line for line in read if line][-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in read if line.startswith("data: {")]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected


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

"""Replicas under real Serve: one that cannot start, others that are upgraded, come and go, and are drained, all while
streams run through its proxy. No answer fails, none is cut, all say the same.

Deployed from a configuration as KubeRay does it, so that build() runs in the cluster.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deployments import cli
from deployments.local_ray import drain
from tests.cluster.replicas import LONG, Cluster, Load, shown_ready, shown_status, under_way, whole
from tests.e2e.server import answers, free_port
from tests.load import repeated
from tests.tiny import write_checkpoint

pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray Serve's own
    # What it shall be replaced by is not read yet.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field in AutoscalingConfig is deprecated"),
]

UPGRADED = {"kv_cache": {"page_size": 32}}


@pytest.fixture(scope="module")
def cluster(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from ray import serve

    yield Cluster(str(write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")))
    serve.shutdown()


def test_a_model_that_cannot_start_says_why_in_one_sentence(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the command, with this Ray for its own. The file's header is right, so only reading it shows that it ends too
    early."""
    from ray import serve

    @contextlib.contextmanager
    def this_ray() -> Iterator[Path]:
        yield tmp_path

    monkeypatch.setattr(cli, "own_ray", this_ray)
    broken = write_checkpoint(tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    assert cli.main(["serve", "--model", str(broken), "--port", str(free_port())]) == 2
    said = capfd.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith("mixtral-serve: the model could not be started: ")
    assert "model.safetensors" in last
    assert "Traceback" not in said.out + said.err
    serve.delete("mixtral")


def test_nobody_notices_an_upgrade_nor_replicas_that_come_and_go(cluster: Cluster) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1000, "upscale_delay_s": 0}
    often = {"metrics_interval_s": 1, "look_back_period_s": 2}
    policy = {"policy_function": "deployments.autoscaling:Policy", "policy_kwargs": {"target_kv_use": 1e-6}}
    cluster.deploy({"autoscaling_config": scaling | often | {"policy": policy}})
    cluster.settle(1)
    text, load = whole(cluster.url), Load(cluster.url)
    with repeated(2, load):
        cluster.settle(2)  # two requests are far from 1000: it was the memory they hold
        before = cluster.replicas()
        with under_way(cluster.url, text), under_way(cluster.url, text):  # one for each replica
            cluster.deploy({"num_replicas": 2}, **UPGRADED)
        cluster.eventually(lambda: not before & cluster.replicas(), "no replica of the old version is left")
        cluster.settle(2)
        after = cluster.replicas()
        assert cluster.page_size() == 32
    cluster.eventually(lambda: shown_ready() == after, "metrics of both replicas, and of none that has ended")
    cluster.eventually(lambda: shown_status() == {6}, "Serve's own word that there is what was asked for")
    answered = len(load.answers)
    with repeated(2, load):
        cluster.eventually(lambda: len(load.answers) > answered, "answers before a replica goes")
        with under_way(cluster.url, text), under_way(cluster.url, text):
            cluster.deploy({"num_replicas": 1}, **UPGRADED)
        cluster.settle(1)
        assert cluster.replicas() < after, "scaling restarts nobody"
    assert len(load.answers) > 10
    assert len(set(load.answers)) == 1, sorted(set(load.answers))
    assert "failed" not in load.answers[0]


def test_streams_finish_and_nobody_new_is_taken_in(cluster: Cluster) -> None:
    """Readiness goes first, then nobody new comes in, then whoever runs gets the last token."""
    cluster.deploy({"num_replicas": 1}, **UPGRADED)  # as the test before has left it
    cluster.settle(1)
    assert answers(f"{cluster.url}/ready")
    with under_way(cluster.url, whole(cluster.url)):
        leaving = threading.Thread(target=drain, args=("mixtral",))
        leaving.start()
        ready = f"{cluster.url}/ready"
        cluster.eventually(lambda: httpx.get(ready, timeout=60).status_code != 200, "readiness fails first")
        late = httpx.post(f"{cluster.url}/v1/completions", json=LONG | {"max_tokens": 1}, timeout=60)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready"), late.text
        assert "retry-after" in late.headers
    leaving.join()

"""Every panel of every dashboard, over a real run:  python -m tests.bench.dashboards [--seconds 90] [--output DIR]

    load, a kill, a rebalance ──▶ server, 2 ranks ──▶ Ray's agent ──PodMonitor's relabelling──▶ a real Prometheus
                                                                each panel's queries: data, or the run fails ──┘

Needs Debian's package `prometheus` (or --prometheus PATH). Draws each dashboard to a PNG, to be looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from k8s.dashboards.generate import DASHBOARDS
from k8s.dashboards.panels import Query
from tests.bench.dashboard_pictures import Series, draw
from tests.e2e.server import eventually, free_port
from tests.load import repeated
from tests.promql import expression

ROOT = Path(__file__).parents[2]
STEP_S = 2
KEYS = "admin first\nguest second\n"
ARGS: dict[str, Any] = {
    "access_log": None,
    "parallel": {"tensor": 2, "spare_slots": 1},
    "kv_cache": {"memory": 4 << 20},  # small: sequences are preempted
    "scheduler": {"max_running": 12, "max_waiting": 6},  # and turned away
}


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """URLs of the API and of Ray's agent."""
    import ray
    from ray import serve

    from deployments.app import bind, machine
    from deployments.resolve import resolve
    from deployments.settings import load

    directory = tempfile.mkdtemp(prefix="mixtral-", dir="/tmp")
    keys = Path(directory) / "keys"
    keys.write_text(KEYS)
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _temp_dir=directory,
        _system_config={"metrics_report_interval_ms": STEP_S * 1000},
    )
    try:
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = load(ARGS | {"auth": {"api_keys_file": str(keys)}})
        serve.run(bind(resolve(settings, machine(may_grow=False))), name="mixtral")
        node = ray.nodes()[0]
        yield f"http://127.0.0.1:{port}", f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def prometheus(binary: str, target: str, directory: Path) -> Iterator[httpx.Client]:
    config = {
        "global": {"scrape_interval": f"{STEP_S}s"},
        "scrape_configs": [
            {
                "job_name": "mixtral",
                "static_configs": [{"targets": [target]}],
                "metric_relabel_configs": relabelling(),
            }
        ],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            eventually(lambda: ready(client), "Prometheus is ready")
            yield client
    finally:
        process.terminate()
        process.wait(30)


def ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/-/ready").status_code == 200
    return False


def relabelling() -> list[dict[str, Any]]:
    """The PodMonitor's, in the words of Prometheus's own configuration."""
    monitor = yaml.safe_load((ROOT / "k8s/base/pod-monitor.yaml").read_text())
    rules = monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    return [
        {re.sub("[A-Z]", lambda m: "_" + m[0].lower(), key): value for key, value in rule.items()} for rule in rules
    ]


class Load:
    """Work that asks for answers of every kind, as one of two callers, and how often it got which status."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.statuses: dict[int, int] = {}

    def __call__(self, number: int, ended: threading.Event) -> None:
        key = ("first", "second")[number % 2]
        prompt = (
            "Tell me what tokens, ranks and experts have to do with each other, and tell it slowly. " + "so " * number
        )
        body = {"model": "mixtral-demo", "prompt": prompt, "max_tokens": 20 + 5 * number, "ignore_eos": True}
        body |= {"stream": number % 2 == 0}
        if number == 0:
            body["temperature"] = -1  # a mistake of the caller's
        with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
            while not ended.wait(0.05 if number else 1.0):
                status = client.post(f"{self._url}/v1/completions", json=body).status_code
                self.statuses[status] = self.statuses.get(status, 0) + 1


def run(url: str, seconds: float) -> dict[int, int]:
    """The load, a kill in its first third, and a rebalance in its second."""
    client = httpx.Client(base_url=url, headers={"Authorization": "Bearer first"}, timeout=60)
    load = Load(url)
    with client, repeated(24, load):
        time.sleep(seconds / 3)
        victim = client.get("/health").json()["ranks"][1]
        os.kill(victim["pid"], signal.SIGKILL)
        print(f"killed rank {victim['rank']}", flush=True)
        time.sleep(seconds / 3)
        moved = client.post("/v1/experts/rebalance", json={})
        print(f"rebalance: {moved.status_code} {moved.text[:200]}", flush=True)
        time.sleep(seconds / 3)
    return load.statuses


def ask(client: httpx.Client, query: Query, start: float, end: float) -> list[Series]:
    parameters = {"query": expression(query), "start": start, "end": end, "step": STEP_S}
    answer = client.get("/api/v1/query_range", params=parameters).json()
    assert answer["status"] == "success", (expression(query), answer)
    return [series for one in answer["data"]["result"] if (series := _series(query, one)).points]


def _series(query: Query, answer: dict[str, Any]) -> Series:
    labels: dict[str, str] = answer["metric"]
    name = re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), query.legend)
    return Series(name, labels, [(float(when), float(value)) for when, value in answer["values"] if value != "NaN"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--output", type=Path, default=ROOT / "build/dashboards")
    parser.add_argument("--prometheus", default=shutil.which("prometheus"))
    options = parser.parse_args()
    if options.prometheus is None:
        parser.error("prometheus is not installed: apt-get install prometheus, or --prometheus PATH")
    options.output.mkdir(parents=True, exist_ok=True)
    empty = []
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, agent = stack.enter_context(server())
        client = stack.enter_context(prometheus(options.prometheus, agent, directory))
        start = time.time()
        print(f"answers by status: {run(url, options.seconds)}")
        end = time.time()
        time.sleep(15)  # what Ray's agent has not been told yet
        for dashboard in DASHBOARDS:
            results = [
                (panel, [series for query in panel.queries for series in ask(client, query, start, end)])
                for panel in dashboard.panels
            ]
            empty += [f"{dashboard.title}: {panel.title}" for panel, found in results if not found and not panel.gpu]
            draw(dashboard, results, options.output / f"{dashboard.name}.png")
            print(f"{dashboard.title}: {sum(bool(found) for _, found in results)} of {len(results)} panels with data")
    for panel in empty:
        print(f"no data: {panel}")
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main())

"""Alert rules: Prometheus's own tool checks and tests them, and each tells what to do.

Where promtool (Debian's package `prometheus`) is not installed, only what needs none is tested.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.promql import promtool

ROOT = Path(__file__).parents[2]
SPEC = yaml.safe_load((ROOT / "k8s/base/alerts.yaml").read_text())["spec"]
RULES: list[dict[str, Any]] = [rule for group in SPEC["groups"] for rule in group["rules"]]
RAY = "rayservice.yaml"
TESTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "k8s/alerts.test.yaml").read_text())["tests"]


@pytest.mark.parametrize(
    "command", [["check", "rules", "rules.yaml"], ["test", "rules", "alerts.test.yaml"]], ids=" ".join
)
def test_prometheus_agrees(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(SPEC))
    shutil.copy(ROOT / "k8s/alerts.test.yaml", tmp_path)
    promtool(tmp_path, *command)


def test_every_alert_is_tested_both_ways() -> None:
    tested = {True: set(), False: set()}
    for test in TESTS:
        for case in test["alert_rule_test"]:
            tested[bool(case["exp_alerts"])].add(case["alertname"])
    names = {rule["alert"] for rule in RULES}
    assert tested == {True: names, False: names}


def test_the_head_that_is_missed_is_ours_and_missed_in_time() -> None:
    """Labels of `up` come from the PodMonitor and from the pod it finds."""
    (rule,) = [rule for rule in RULES if rule["alert"] == "MixtralHeadGone"]
    asked = dict(re.findall(r'(\w+)="([^"]*)"', rule["expr"]))
    monitor, service = (yaml.safe_load((ROOT / "k8s/base" / file).read_text()) for file in ("pod-monitor.yaml", RAY))
    namespace = yaml.safe_load((ROOT / "k8s/base/kustomization.yaml").read_text())["namespace"]
    config = service["spec"]["rayClusterConfig"]
    (head,) = config["headGroupSpec"]["template"]["spec"]["containers"]
    assert asked["job"] == f"{namespace}/{monitor['metadata']['name']}"
    assert asked["container"] == head["name"]
    assert asked["endpoint"] in {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    assert asked["endpoint"] in {one["name"] for one in head["ports"]}
    (ranks,) = config["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in ranks["env"]}
    minutes = int(rule["for"].removesuffix("m"))
    assert minutes * 60 <= int(environment["RAY_gcs_rpc_server_reconnect_timeout_s"]) / 4


def test_every_alert_has_its_page_in_the_runbook() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")

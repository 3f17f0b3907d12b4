"""What Prometheus stores of what Ray's agent shows: what a replica's own /metrics shows, and Ray's as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deployments.access_log import Record
from deployments.metrics import Metrics
from tests.unit.fake_engine import FakeEngine

MONITOR = yaml.safe_load((Path(__file__).parents[2] / "k8s/base/pod-monitor.yaml").read_text())
NOISE = {
    "Component": "core_worker",
    "SessionName": "session_2026-11-20",
    "Version": "2.60.0",
    "WorkerId": "f00d",
    "otel_scope_name": "ray",
    "otel_scope_version": "",
}
NAME = "__name__"


def relabelled(labels: dict[str, str], rules: list[dict[str, Any]]) -> dict[str, str]:
    """As Prometheus does it, as far as our rules go: expressions match whole values, an empty label is none."""
    for rule in rules:
        if rule.get("action") == "labeldrop":
            labels = {label: value for label, value in labels.items() if not re.fullmatch(rule["regex"], label)}
            continue
        assert rule.keys() <= {"sourceLabels", "regex", "targetLabel", "replacement"}
        source = ";".join(labels.get(label, "") for label in rule["sourceLabels"])
        if match := re.fullmatch(rule["regex"], source):
            value = match.expand(rule["replacement"].replace("$1", r"\1"))
            labels = {label: old for label, old in labels.items() if label != rule["targetLabel"]}
            labels |= {rule["targetLabel"]: value} if value else {}
    return labels


def test_every_sample_of_ours_gets_its_own_name_and_labels_back() -> None:
    metrics = Metrics("m", "r")
    metrics.watch(FakeEngine())
    metrics.canary(ok=True)
    metrics.answered("/v1/completions", 200, Record(key="a", prompt_tokens=3))
    own = [{NAME: one.name} | one.labels for family in metrics.collect() for one in family.samples]
    for endpoint in MONITOR["spec"]["podMetricsEndpoints"]:
        for sample in own:
            shown = sample | NOISE | {NAME: f"ray_{sample[NAME]}"}
            assert relabelled(shown, endpoint["metricRelabelings"]) == sample


def test_of_rays_own_nothing_goes_that_says_what_they_are_of() -> None:
    shown = {NAME: "ray_component_rss_bytes", "ip": "10.0.0.1", "pid": "7"} | NOISE
    for endpoint in MONITOR["spec"]["podMetricsEndpoints"]:
        kept = relabelled(shown, endpoint["metricRelabelings"])
        assert shown.items() - kept.items() == {
            (label, NOISE[label]) for label in ("SessionName", "Version", "otel_scope_name", "otel_scope_version")
        }

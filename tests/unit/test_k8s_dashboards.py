"""Dashboards: what is committed is what the script makes, and every query asks for something that is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from deployments.metrics import Metrics
from k8s.dashboards.generate import DASHBOARDS, OBJECTIVES, TARGET, document, text
from k8s.dashboards.panels import Dashboard
from tests.promql import expression, promtool
from tests.unit.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\bray_\w+")  # Ray's own
RAY_SHOWS = ("dashboard/modules/reporter/reporter_agent.py", "serve/_private/deployment_state.py")


def counted() -> set[str]:
    """Every name that a replica shows."""
    metrics = Metrics("m", "r")
    metrics.watch(FakeEngine())
    metrics.canary(ok=True)
    names = {sample.name for family in metrics.collect() for sample in family.samples}
    return names | {f"{family.name}_total" for family in metrics.collect() if family.type == "counter"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_what_is_committed_is_what_the_script_makes(dashboard: Dashboard) -> None:
    committed = (TARGET / f"{dashboard.name}.json").read_text()
    assert committed == text(dashboard), "run: python -m k8s.dashboards.generate"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_grafana_gets_what_it_needs(dashboard: Dashboard) -> None:
    made = document(dashboard)
    assert made["schemaVersion"]
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    panels = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert len(panels) == len(dashboard.panels)
    for panel in panels:
        assert panel["description"]
        assert all(target["refId"] and target["expr"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in made["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(made))) - {"__rate_interval", "__all"}
    assert used == variables, "a variable that nothing uses, or a use of none"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.name)
def test_every_query_asks_for_what_is_counted(dashboard: Dashboard) -> None:
    known = counted()
    for panel in dashboard.panels:
        for query in panel.queries:
            names = set(re.findall(r"\bmixtral_\w+", query.expression))
            assert names or OUTSIDE.search(query.expression), panel.title
            assert names <= known, (panel.title, names - known)


def test_prometheus_understands_every_query(tmp_path: Path) -> None:
    """As rules, which its tool reads without a server."""
    queries = [query for dashboard in DASHBOARDS for panel in dashboard.panels for query in panel.queries]
    rules = [{"record": f"query_{number}", "expr": expression(query)} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool(tmp_path, "check", "rules", "rules.yaml")


def test_every_alert_asks_for_what_is_counted() -> None:
    asked = set(re.findall(r"\bmixtral_\w+", (ROOT / "k8s/base/alerts.yaml").read_text()))
    assert asked <= counted()


def test_what_is_asked_of_ray_is_what_this_ray_shows() -> None:
    """Names move between versions of Ray, and a panel without data looks like a cluster without work."""
    (found,) = ray.__path__
    shown = "".join((Path(found) / file).read_text() for file in RAY_SHOWS)
    expressions = [query.expression for one in DASHBOARDS for panel in one.panels for query in panel.queries]
    asked = set(OUTSIDE.findall(" ".join([*expressions, (ROOT / "k8s/base/alerts.yaml").read_text()])))
    assert asked
    for name in asked:
        assert f'"{name.removeprefix("ray_")}"' in shown, name


def test_an_objective_is_a_bound_of_its_histogram() -> None:
    bounds: dict[str, set[Any]] = {}
    for family in Metrics("m", "r").collect():
        bounds[family.name] = {sample.labels.get("le") for sample in family.samples}
    for name, histogram in (("slo_first", "time_to_first_token"), ("slo_between", "inter_token_latency")):
        _, values, default = OBJECTIVES[name]
        assert set(values) <= bounds[f"mixtral_{histogram}_seconds"]
        assert default in values

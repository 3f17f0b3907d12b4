"""The application that each overlay serves: serve_config.yaml but for what is listed here, on pods that can hold it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.layouts import Layout
from deployments import plan
from deployments.autoscaling import Policy
from deployments.cli import main
from deployments.layout import Machine
from deployments.resolve import Resolved, resolve
from deployments.settings import load
from tests.unit.test_k8s_manifests import cluster, ranks, ray

ROOT = Path(__file__).parents[2]
REAL = {
    "model": "/models/Mixtral-8x7B-Instruct-v0.1",
    "served_model_name": "mixtral-8x7b-instruct",
    "device": "cuda",
    "auth.api_keys_file": "/secrets/api-keys/keys",
}
BF16 = REAL | {"dtype": "bfloat16"}
OVERRIDES: dict[str, dict[str, Any]] = {
    "cpu-demo": {"device": "cpu"},
    "h100x1-int4": REAL | {"quantization": "int4"},
    "h100x8": BF16 | {"parallel.tensor": 8, "parallel.expert": 8},
    "h200x1-bf16": BF16,
    "multinode": BF16 | {"parallel.tensor": 8, "parallel.data": 2, "parallel.expert": 16},
    "autoscale": BF16,
}
START_S = 600  # a replica elsewhere, its weights read from a volume; Serve stops the old one no later
GRACE_S = 45  # that KubeRay and Serve need beside the answers

pytestmark = pytest.mark.parametrize("overlay", OVERRIDES)


def serve_yaml(overlay: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "k8s/overlays" / overlay / "serve.yaml").read_text())
    return config


def application(config: dict[str, Any]) -> dict[str, Any]:
    (one,) = config["applications"]
    return dict(one)


def deployment(overlay: str) -> dict[str, Any]:
    (one,) = application(serve_yaml(overlay))["deployments"]
    return dict(one)


def replicas(overlay: str) -> tuple[int, int]:
    """Least and most."""
    scaling = deployment(overlay).get("autoscaling_config")
    if scaling is None:
        number = deployment(overlay)["num_replicas"]
        return number, number
    return scaling["min_replicas"], scaling["max_replicas"]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def resolved(overlay: str, tmp_path: Path) -> Resolved:
    """As build() makes it on the head, with the shape of the real model."""
    args = dict(application(serve_yaml(overlay))["args"])
    if args["model"] != "demo":
        geometry = {"architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16"} | plan.GEOMETRIES["8x7b"]
        (tmp_path / "config.json").write_text(json.dumps(geometry))
        args["model"] = str(tmp_path)
    return resolve(load(args), Machine(cores=8, gpus=0, may_grow=True))


def test_it_is_serve_config_but_for_what_is_listed(overlay: str) -> None:
    shipped = application(yaml.safe_load((ROOT / "serve_config.yaml").read_text()))
    ours = application(serve_yaml(overlay))
    for name in ("name", "route_prefix", "import_path"):
        assert ours[name] == shipped[name]
    before, after = (flat(load(each["args"]).model_dump()) for each in (shipped, ours))
    assert {path: value for path, value in after.items() if value != before[path]} == OVERRIDES[overlay]


def test_it_is_what_the_cluster_gets(overlay: str) -> None:
    assert yaml.safe_load(ray(overlay)["serveConfigV2"]) == serve_yaml(overlay)


# Ray Serve's own, at its first import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_serve_knows_every_field(overlay: str) -> None:
    """It drops what it does not know without a word, a misspelt limit for instance."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    config = serve_yaml(overlay)
    parts: list[tuple[dict[str, Any], Any]] = [
        (config, ServeDeploySchema),
        (config["http_options"], HTTPOptionsSchema),
        (application(config), ServeApplicationSchema),
        (deployment(overlay), DeploymentSchema),
    ]
    scaling = deployment(overlay).get("autoscaling_config")
    if scaling is not None:
        parts += [(scaling, AutoscalingConfig), (scaling["policy"], AutoscalingPolicy)]
    for given, schema in parts:
        schema.model_validate(given)
        assert given.keys() <= schema.model_fields.keys(), given.keys() - schema.model_fields.keys()


# Likewise.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_there_are_nodes_for_every_replica(overlay: str, tmp_path: Path) -> None:
    from deployments.app import bundles

    wanted = bundles(resolved(overlay, tmp_path).engine)
    group, (least, most) = ranks(overlay), replicas(overlay)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus, cpus = int(limits.get("nvidia.com/gpu", 0)), int(limits["cpu"])
    gpus_each = sum(bundle.get("GPU", 0) for bundle in wanted)
    assert group["maxReplicas"] * gpus >= most * gpus_each
    assert group["minReplicas"] * gpus >= least * gpus_each
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pods_each = -(-int(gpus_each) // gpus) if gpus else 1
    assert group["maxReplicas"] >= most * pods_each
    assert sum(bundle["CPU"] for bundle in wanted) <= cpus * pods_each
    assert all(bundle["CPU"] <= cpus and bundle.get("GPU", 0) <= gpus for bundle in wanted)
    assert "max_ongoing_requests" not in deployment(overlay), "the application knows better"


def test_operators_are_told_what_it_holds(overlay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table under "Sizing" says what `mixtral-serve plan` says, which also says that it fits."""
    engine = resolved(overlay, tmp_path).engine
    if engine.device == "cpu":
        return
    card = ranks(overlay)["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"].split("-")[1].lower()
    gpus = ["--gpus", str(engine.parallel.ranks), "--gpu", card]
    assert main(["plan", "8x7b", *gpus, "--quantization", engine.quantization, "--context", "32768"]) == 0
    layout = plan.name(Layout(1, engine.parallel))
    (planned,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{layout}  ")]
    sizing = (ROOT / "docs/operations.md").read_text().partition("## Sizing")[2].partition("\n## ")[0]
    (told,) = [line for line in sizing.splitlines() if f"`{overlay}`" in line]
    ours, theirs = told.split("|")[2:5], re.split(r"\s{2,}", planned)[1:4]
    assert [number(cell) for cell in ours] == pytest.approx([number(cell) for cell in theirs], rel=0.02), planned


def number(cell: str) -> float:
    return float(cell.split()[0].replace(",", ""))


def test_nothing_ends_a_stream_before_its_deadline(overlay: str) -> None:
    longest = load(application(serve_yaml(overlay))["args"]).limits.request_timeout_s
    spec = ranks(overlay)["template"]["spec"]
    environment = {one["name"]: one["value"] for one in spec["containers"][0]["env"]}
    drains = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert longest + START_S + GRACE_S <= drains < spec["terminationGracePeriodSeconds"]
    assert ray(overlay)["rayClusterDeletionDelaySeconds"] >= longest + GRACE_S
    assert "request_timeout_s" not in serve_yaml(overlay)["http_options"], "it would cut healthy streams"


def test_autoscaling_fires_and_has_room(overlay: str) -> None:
    least, most = replicas(overlay)
    scales = bool(cluster(overlay).get("enableInTreeAutoscaling", False))
    assert scales is (most > least)
    group = ranks(overlay)
    assert (group["maxReplicas"] > group["minReplicas"]) is scales
    if not scales:
        return
    assert least >= 2, "with one replica an upgrade or a lost node is an outage"
    (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname", "with both on one node likewise"
    assert spread["labelSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
    config = deployment(overlay)["autoscaling_config"]
    limits = load(application(serve_yaml(overlay))["args"]).scheduler
    assert config["target_ongoing_requests"] < limits.max_running, "else requests queue before it fires"
    module, _, name = config["policy"]["policy_function"].partition(":")
    assert (module, name) == (Policy.__module__, Policy.__name__)
    Policy(**config["policy"]["policy_kwargs"])
    assert cluster(overlay)["autoscalerOptions"]["version"] == "v2"

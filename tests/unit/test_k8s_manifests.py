"""What every overlay builds to: valid for Kubernetes and KubeRay, and its parts fit each other.

Needs kubectl (it holds kustomize); the validator of KubeRay's and its neighbours' schemas lies beside the repository
where there is one. What is absent is skipped, with a message.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir())
KUBERNETES = "1.36"
CUSTOM = re.compile(r"^(ray\.io|monitoring\.coreos\.com|gateway\.networking\.k8s\.io)/")
VALIDATOR = ROOT.parent / "shared/tools/validate_manifests.py"
LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # ten times as fast
Manifest = dict[str, Any]

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: overlays cannot be built"
)
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def rendered(overlay: str) -> str:
    command = ["kubectl", "kustomize", str(ROOT / "k8s/overlays" / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def manifests(overlay: str) -> list[Manifest]:
    return list(yaml.load_all(rendered(overlay), LOADER))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests(overlay) if manifest["kind"] in kinds]


def ray(overlay: str) -> Manifest:
    (service,) = of_kind(overlay, "RayService")
    spec: Manifest = service["spec"]
    return spec


def cluster(overlay: str) -> Manifest:
    config: Manifest = ray(overlay)["rayClusterConfig"]
    return config


def ranks(overlay: str) -> Manifest:
    (group,) = cluster(overlay)["workerGroupSpecs"]
    return dict(group)


def pods(overlay: str) -> list[Manifest]:
    """Every pod template: labels and spec."""
    config = cluster(overlay)
    templates = [config["headGroupSpec"]["template"], *(group["template"] for group in config["workerGroupSpecs"])]
    templates += [manifest["spec"]["template"] for manifest in of_kind(overlay, "StatefulSet", "Job")]
    return templates


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every mapping within, with its value."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield key, below
            yield from walk(below)
    elif isinstance(value, list):
        for below in value:
            yield from walk(below)


def different() -> list[str]:
    """Every manifest once: most are the same in every overlay, and checking each takes its time."""
    return sorted({document for overlay in OVERLAYS for document in rendered(overlay).split("\n---\n")})


def test_kubernetes_accepts_its_own_kinds() -> None:
    found = [yaml.load(document, LOADER) for document in different()]
    own = [one for one in found if not CUSTOM.search(one["apiVersion"])]
    assert {one["kind"] for one in own} >= {"Job", "NetworkPolicy", "PodDisruptionBudget", "RoleBinding", "StatefulSet"}
    for manifest in own:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_kubernetes_and_kuberay_accept_them(tmp_path: Path) -> None:
    if not VALIDATOR.exists():
        pytest.skip("there is no validate_manifests.py beside the repository")
    (tmp_path / "all.yaml").write_text("\n---\n".join(different()))
    command = [sys.executable, str(VALIDATOR), "--operator-rules", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert " 0 of kinds with no schema here" in ran.stdout


@every_overlay
def test_every_pod_keeps_to_the_restricted_standard(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(overlay):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
        for volume in pod["spec"].get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""}), "an unbounded volume fills the node"


@every_overlay
def test_only_who_speaks_to_kubernetes_has_a_token(overlay: str) -> None:
    bound = {subject["name"] for binding in of_kind(overlay, "RoleBinding") for subject in binding["subjects"]}
    with_token = {
        pod["spec"]["serviceAccountName"] for pod in pods(overlay) if pod["spec"]["automountServiceAccountToken"]
    }
    assert with_token == bound == ({"head"} if cluster(overlay).get("enableInTreeAutoscaling") else set())


@every_overlay
def test_what_is_referred_to_is_there(overlay: str) -> None:
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests(overlay)}
    keys = {"secretKeyRef": "name", "secret": "secretName", "configMap": "name", "persistentVolumeClaim": "claimName"}
    kinds = {"configMap": "ConfigMap", "persistentVolumeClaim": "PersistentVolumeClaim"}
    operations = (ROOT / "docs/operations.md").read_text()
    for key, value in walk(manifests(overlay)):
        if key == "serviceAccountName":
            assert ("ServiceAccount", value) in names
        elif key in keys and isinstance(value, dict) and keys[key] in value:
            name = value[keys[key]]
            if key in kinds:
                assert (kinds[key], name) in names
            else:  # made by hand, because it holds a secret
                assert f"secret generic {name}" in operations, name


@every_overlay
def test_operators_are_told_of_it(overlay: str) -> None:
    assert f"| `{overlay}` |" in (ROOT / "docs/operations.md").read_text()


@every_overlay
def test_every_selector_selects_something(overlay: str) -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(overlay)]

    def selects(selector: Manifest) -> bool:
        return any(selector.items() <= one.items() for one in labels)

    found = 0
    for key, value in walk(of_kind(overlay, "NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "StatefulSet")):
        if key in ("podSelector", "selector") and value:
            found += 1
            assert selects(value["matchLabels"]), value
    for service in of_kind(overlay, "Service"):
        assert selects(service["spec"]["selector"])
    assert found >= 5


@every_overlay
def test_ports_fit(overlay: str) -> None:
    config = yaml.safe_load(ray(overlay)["serveConfigV2"])
    port = config["http_options"]["port"]
    named = {
        one["name"]: one["containerPort"]
        for pod in pods(overlay)
        for container in containers(pod)
        for one in container.get("ports", [])
    }
    assert named["serve"] == port
    assert config["http_options"]["host"] == "0.0.0.0", "Serve's own 127.0.0.1 would be reached by nobody"
    for route in of_kind(overlay, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}, "streams are long"
            assert [(backend["name"], backend["port"]) for backend in rule["backendRefs"]] == [
                ("mixtral-serve-svc", port)
            ]
    for monitor in of_kind(overlay, "PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= named.keys()
    allowed = {
        one["port"]
        for policy in of_kind(overlay, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for one in rule.get("ports", [])
    }
    assert allowed <= set(named.values())
    assert {port, named["metrics"], named["dashboard"]} <= allowed


@every_overlay
def test_everything_is_denied_that_no_policy_allows(overlay: str) -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name in ("api", "metrics", "operator"):
        assert policies[name]["policyTypes"] == ["Ingress"]
        assert all(rule["from"] and rule["ports"] for rule in policies[name]["ingress"])


@every_overlay
def test_versions_are_those_that_are_installed(overlay: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (installed,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert cluster(overlay)["rayVersion"] == installed
    wanted = "cpu" if overlay == "cpu-demo" else "cuda"
    images = {container["image"] for pod in pods(overlay) for container in containers(pod)}
    assert {image for image in images if "redis" not in image} == {
        f"registry.example.com/mixtral-serve:{project}-{wanted}"
    }
    assert all(":" in image and not image.endswith(":latest") for image in images)


@every_overlay
def test_what_kuberay_wants_of_ray_pods(overlay: str) -> None:
    config = cluster(overlay)
    assert config["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head takes no work"
    assert config["authOptions"] == {"mode": "token"}
    for key, value in walk(config):
        if key == "rayStartParams":
            assert all(isinstance(one, str) for one in value.values())
    text = json.dumps(manifests(overlay))
    for dead in ("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "HorizontalPodAutoscaler"):
        assert dead not in text
    spec = ranks(overlay)["template"]["spec"]
    assert not {"livenessProbe", "readinessProbe"} & spec["containers"][0].keys(), "KubeRay brings its own"
    assert spec["enableServiceLinks"] is False


@every_overlay
def test_pods_with_gpus_can_be_scheduled_and_have_shared_memory(overlay: str) -> None:
    spec = ranks(overlay)["template"]["spec"]
    resources = spec["containers"][0]["resources"]
    gpus = resources["limits"].get("nvidia.com/gpu")
    tolerated = {toleration["key"] for toleration in spec.get("tolerations", [])}
    assert ("nvidia.com/gpu" in tolerated) is (gpus is not None)
    assert ("nodeSelector" in spec) is (gpus is not None)
    assert resources["limits"] == resources["requests"], "a rank that is throttled holds all the others up"
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert gib(volume["emptyDir"]["sizeLimit"]) <= gib(resources["limits"]["memory"]) / 4, "it counts as memory"


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


@every_overlay
def test_applying_a_change_is_never_refused_because_a_job_is_there(overlay: str) -> None:
    """A job's template cannot be changed, and every new image changes it."""
    for job in of_kind(overlay, "Job"):
        assert 0 < job["spec"]["ttlSecondsAfterFinished"] <= 3600


@every_overlay
def test_weights_are_read_only_but_for_the_job_that_fills_them(overlay: str) -> None:
    for pod in pods(overlay):
        for container in containers(pod):
            for mount in container.get("volumeMounts", []):
                if mount["name"] == "weights":
                    assert mount.get("readOnly", False) is (container["name"] != "fetch")

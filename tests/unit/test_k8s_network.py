"""Who can reach whom, by the network policies of every overlay: each connection that is needed, and no other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.unit.test_k8s_manifests import OVERLAYS, Manifest, of_kind

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: overlays cannot be built"
)
OURS = "mixtral"
NAMESPACE = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Place:
    """A pod, or something in another namespace, or outside of the cluster where that has no name."""

    namespace: str = OURS
    labels: dict[str, str] = field(default_factory=dict)


def ours(name: str, **labels: str) -> Place:
    return Place(labels={f"app.kubernetes.io/{key}": value for key, value in ({"name": name} | labels).items()})


RANKS, HEAD = ours("mixtral-serve", component="ranks"), ours("mixtral-serve", component="head")
REDIS, WEIGHTS = ours("redis"), ours("weights")
GATEWAY, KUBERAY, PROMETHEUS = Place("envoy-gateway-system"), Place("kuberay-operator"), Place("monitoring")
DNS, NEIGHBOUR, INTERNET = Place("kube-system"), Place("default"), Place("")
GLOO_STORE, NCCL = 29500, 45123  # drawn anew for each group: any port


def reaches(policies: list[Manifest], source: Place, target: Place, port: int) -> bool:
    leaves = source.namespace != OURS or allows(policies, "Egress", source, target, port)
    return leaves and (target.namespace != OURS or allows(policies, "Ingress", target, source, port))


def allows(policies: list[Manifest], direction: str, own: Place, other: Place, port: int) -> bool:
    """Policies add up; what none of them selects is free."""
    chosen = [one for one in policies if direction in one["policyTypes"] and selects(one["podSelector"], own.labels)]
    peers = {"Ingress": "from", "Egress": "to"}[direction]
    return not chosen or any(
        (peers not in rule or any(is_peer(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or any(allowed["port"] == port for allowed in rule["ports"]))
        for policy in chosen
        for rule in policy.get(direction.lower(), [])
    )


def is_peer(peer: dict[str, Any], place: Place) -> bool:
    assert peer.keys() <= {"podSelector", "namespaceSelector"}
    if "namespaceSelector" in peer:
        return selects(peer["namespaceSelector"], {NAMESPACE: place.namespace})
    return place.namespace == OURS and selects(peer["podSelector"], place.labels)


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_must_reach_each_other_does_and_nothing_else(overlay: str) -> None:
    policies = [policy["spec"] for policy in of_kind(overlay, "NetworkPolicy")]
    has_weights, scales = overlay != "cpu-demo", overlay == "autoscale"
    expected = [
        # Ray, gloo's and NCCL's rendezvous and connections, HAProxy to the replica on another pod.
        (RANKS, RANKS, GLOO_STORE, True), (RANKS, RANKS, NCCL, True), (RANKS, RANKS, 8000, True),
        (RANKS, HEAD, 6379, True), (HEAD, RANKS, NCCL, True), (RANKS, DNS, 53, True),
        (KUBERAY, HEAD, 8265, True), (KUBERAY, RANKS, 8000, True), (KUBERAY, HEAD, 6379, False),
        # Requests come through the gateway, to pods with replicas.
        (GATEWAY, RANKS, 8000, True), (GATEWAY, HEAD, 8000, False), (GATEWAY, HEAD, 8265, False),
        (NEIGHBOUR, RANKS, 8000, False), (NEIGHBOUR, HEAD, 8265, False), (NEIGHBOUR, RANKS, NCCL, False),
        (PROMETHEUS, RANKS, 8080, True), (PROMETHEUS, HEAD, 8080, True), (PROMETHEUS, RANKS, 8000, False),
        # Redis knows the cluster: the head alone speaks to it.
        (HEAD, REDIS, 6379, has_weights), (RANKS, REDIS, 6379, False), (NEIGHBOUR, REDIS, 6379, False),
        (WEIGHTS, REDIS, 6379, False), (WEIGHTS, RANKS, 8000, False),
        # Only the job reads from outside, and only the autoscaler speaks to Kubernetes.
        (RANKS, INTERNET, 443, False), (WEIGHTS, INTERNET, 443, has_weights), (WEIGHTS, INTERNET, 80, False),
        (HEAD, INTERNET, 443, scales), (HEAD, NEIGHBOUR, 8000, False), (RANKS, GATEWAY, 443, False),
    ]  # fmt: skip
    wrong = [row for row in expected if reaches(policies, *row[:3]) is not row[3]]
    assert wrong == []

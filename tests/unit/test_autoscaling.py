"""How many replicas the policy wants, and what a replica tells it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from deployments.autoscaling import KV_USE, WAIT, Policy, stats
from deployments.metrics import Metrics
from tests.unit.fake_engine import FakeEngine


class Config:
    def get_target_ongoing_requests(self) -> float:
        return 10.0


CONFIG = Config()


@dataclass
class Context:
    """What Serve would say, with metrics of two replicas."""

    total_num_requests: float = 0.0
    aggregated_metrics: dict[str, dict[str, float]] | None = None
    current_num_replicas: int = 2
    target_num_replicas: int = 2
    config: Config = CONFIG


def wanted(requests: float, wait_s: tuple[float, float] = (0, 0), kv_use: tuple[float, float] = (0, 0)) -> float:
    said = {WAIT: dict(zip("ab", wait_s, strict=True)), KV_USE: dict(zip("ab", kv_use, strict=True))}
    return Policy(target_wait_s=2.0, target_kv_use=0.8)(Context(requests, said))[0]


@pytest.mark.parametrize(
    ("requests", "wait_s", "kv_use", "replicas"),
    [
        (0, (0, 0), (0, 0), 0),  # min_replicas is Serve's to keep
        (20, (0, 0), (0.1, 0.1), 2),
        (35, (0, 0), (0.1, 0.1), 3.5),
        (4, (3, 3), (0.1, 0.1), 3),  # few requests, but they wait
        (4, (0, 0), (1.0, 1.0), 2.5),  # few requests with long prompts
        (4, (500, 500), (0.1, 0.1), 4),  # at most twice as many at once
        (4, (4, 0), (0.1, 0.1), 2),  # one ill replica is not helped by another
        (90, (3, 3), (1.0, 1.0), 9),
    ],
)
def test_the_larger_need_counts(
    requests: float, wait_s: tuple[float, float], kv_use: tuple[float, float], replicas: float
) -> None:
    assert wanted(requests, wait_s, kv_use) == pytest.approx(replicas)


def test_before_replicas_have_said_anything_requests_count_alone() -> None:
    assert Policy()(Context(30, None))[0] == 3
    assert Policy()(Context(30, {WAIT: {}}))[0] == 3
    assert Policy()(Context(30, None, current_num_replicas=0, target_num_replicas=1))[0] == 1


@pytest.mark.parametrize("targets", [(0, 0.5), (1, 0), (1, 1.5)])
def test_targets_that_cannot_be_are_refused(targets: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="target_wait_s must be above 0"):
        Policy(*targets)


# Ray Serve's own, at its first import.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_serve_makes_the_policy_from_its_config() -> None:
    from ray.serve.config import AutoscalingPolicy

    policy = AutoscalingPolicy(
        policy_function="deployments.autoscaling:Policy", policy_kwargs={"target_wait_s": 1.0, "target_kv_use": 0.5}
    )
    made = policy.get_policy()(**policy.policy_kwargs)
    assert made(Context(0, {KV_USE: {"a": 0.75}}))[0] == pytest.approx(3)


def test_what_a_replica_tells() -> None:
    now = 10.0
    metrics = Metrics("fake", "replica-1", clock=lambda: now)
    with metrics.timer(1), metrics.timer(1):
        now = 12.5
        assert stats(FakeEngine(), metrics) == {WAIT: 2.5, KV_USE: 4 / 30}
    assert stats(FakeEngine(), metrics)[WAIT] == 0

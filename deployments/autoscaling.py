"""How many replicas there should be. Serve asks every few seconds, in its controller; knows no ray itself.

Two ways of asking for one more, and the larger counts:

    requests   all requests under way / target_ongoing_requests
    pressure   replicas there are x how much more than its target a replica's wait or KV memory is, at most twice

Requests alone do not see that long prompts fill the memory of a replica with few of them, nor that it cannot keep up.
In a Serve config file:

    deployments: [{name: ingress, autoscaling_config: {policy: {policy_function: deployments.autoscaling:Policy}, ...}}]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from deployments.metrics import Metrics
from deployments.serving import Engine

WAIT = "wait_s"
KV_USE = "kv_use"
MOST_AT_ONCE = 2.0  # a wait may be a hundred times its target, but nobody needs a hundred times the replicas


class Config(Protocol):
    def get_target_ongoing_requests(self) -> float: ...


class Context(Protocol):
    """The part of Serve's AutoscalingContext that is read here."""

    current_num_replicas: int
    target_num_replicas: int
    config: Config

    @property
    def total_num_requests(self) -> float: ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """What replicas' record_autoscaling_stats said, over look_back_period_s."""


class Policy:
    """Serve's delays, factors and bounds are put on what it returns."""

    def __init__(self, target_wait_s: float = 2.0, target_kv_use: float = 0.8) -> None:
        if not (target_wait_s > 0 and 0 < target_kv_use <= 1):
            raise ValueError(
                f"policy_kwargs: target_wait_s must be above 0 and target_kv_use above 0 and at most 1, "
                f"not {target_wait_s} and {target_kv_use}"
            )
        self._targets = {WAIT: target_wait_s, KV_USE: target_kv_use}

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        if context.current_num_replicas == 0:  # Serve itself starts the first one
            return context.target_num_replicas, {}
        by_requests = context.total_num_requests / context.config.get_target_ongoing_requests()
        return max(by_requests, context.current_num_replicas * self._pressure(context)), {}

    def _pressure(self, context: Context) -> float:
        """1: as it should be. The mean of all replicas, since one more does not help a single ill one."""
        said = context.aggregated_metrics or {}
        means = {name: sum(values.values()) / len(values) for name, values in said.items() if values}
        ratios = [means[name] / target for name, target in self._targets.items() if name in means]
        return min(max(ratios, default=0.0), MOST_AT_ONCE)


def stats(engine: Engine, metrics: Metrics) -> dict[str, float]:
    """What a replica tells the policy of itself."""
    kv = engine.stats()
    return {WAIT: metrics.longest_wait_s(), KV_USE: kv.pages_used / kv.pages_total}

"""One replica: an engine with its ranks in the replica's placement group, and the HTTP application in front.

Serve makes it an actor (deployments/app.py binds it), calls reconfigure and __serve_build_asgi_app__ once, check_health
ever after, reconfigure again when the operator changes user_config, and the application's own shutdown once the last
answer is out.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cluster.config import SchedulerConfig
from cluster.launch import launch
from deployments import access_log, autoscaling
from deployments.api import create_app
from deployments.live import Live
from deployments.metrics import Metrics
from deployments.ray_metrics import RayMetrics
from deployments.resolve import Resolved
from deployments.serving import Engine
from deployments.settings import Settings, SettingsError, environment

logger = logging.getLogger("ray.serve")  # what Serve shows and keeps per replica


class Ingress:
    def __init__(self, resolved: Resolved, stdout: Path | None = None) -> None:
        self._resolved = resolved
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        self._live = Live(resolved.settings, environment())
        access_log.keep(resolved.settings.access_log, stdout)

    def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Serve's, before the first request and whenever the operator has changed user_config."""
        if self._engine is None:
            self._live.apply(user_config)
        else:
            self._live.change(user_config)
            self._limit_engine()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve
        from ray.util.placement_group import get_current_placement_group

        logger.info("configuration\n%s", self._resolved.table())
        context = serve.get_replica_context()
        check_grace(context._deployment_config.graceful_shutdown_timeout_s, self._resolved.settings)  # known here only
        replica = context.replica_id.unique_id
        metrics = self._metrics = Metrics(self._resolved.model_names[0], replica)
        self._engine = await launch(self._resolved.engine, get_current_placement_group(), metrics)
        self._limit_engine()
        return create_app(
            self._engine, self._resolved, self._live, replica=replica, metrics=metrics, beside=RayMetrics(metrics)
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the autoscaling policy."""
        if self._engine is None or self._metrics is None:
            return {}
        return autoscaling.stats(self._engine, self._metrics)

    def drain(self) -> bool:
        """Take no more requests; those that run go on. Whether any still do."""
        if self._engine is None:
            return False
        self._engine.drain()
        stats = self._engine.stats()
        return stats.running + stats.waiting > 0

    def check_health(self) -> None:
        """Raises when only a new replica helps. Reads a flag: a busy engine is not an ill one."""
        if self._engine is not None and not self._engine.healthy:
            raise RuntimeError("the engine cannot answer any more")

    def _limit_engine(self) -> None:
        assert self._engine is not None
        self._engine.limit(SchedulerConfig(**self._live.scheduler.model_dump()))


def check_grace(graceful_shutdown_timeout_s: float, settings: Settings) -> None:
    """A Serve config file may say how long a shutdown waits; build() sets it to what the longest answer takes."""
    longest = settings.limits.request_timeout_s
    if graceful_shutdown_timeout_s < longest:
        raise SettingsError(
            f"graceful_shutdown_timeout_s: {graceful_shutdown_timeout_s:g} s would cut answers, which may take "
            f"limits.request_timeout_s, {longest:g} s; raise the one or lower the other."
        )

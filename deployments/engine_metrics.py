"""What the engine knows of itself, as metrics: read when somebody looks, so it costs nothing between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.messages import EngineStats, ExpertsStatus, RankStatus


class EngineFacts(Protocol):
    """The part of deployments/serving.py's Engine that is read here."""

    @property
    def healthy(self) -> bool: ...

    @property
    def ready(self) -> bool: ...

    def stats(self) -> EngineStats: ...

    def ranks(self) -> Sequence[RankStatus]: ...

    def experts(self) -> ExpertsStatus: ...


def engine_metrics(engine: EngineFacts) -> Iterator[Metric]:
    yield _gauge("healthy", "1 while this replica can serve.", engine.healthy)
    yield _gauge("ready", "1 while requests should be sent here.", engine.ready)
    yield from _counters(engine.stats())
    yield from _ranks(engine.ranks())
    yield from _experts(engine.experts())


def _counters(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("num_requests_running", "Sequences that steps compute.", stats.running)
    yield _gauge("num_requests_waiting", "Sequences that wait for pages or for their turn.", stats.waiting)
    yield _gauge("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", stats.pages_used / stats.pages_total)
    yield _gauge("kv_cache_pages", "KV pages there are.", stats.pages_total)
    yield _counter("engine_steps", "Steps taken.", stats.steps)
    yield _counter(
        "prompt_tokens", "Prompt tokens computed, those from the prefix cache not included.", stats.prompt_tokens
    )
    yield _counter("generation_tokens", "Tokens generated.", stats.generated_tokens)
    asked = stats.prompt_tokens + stats.cached_tokens
    yield _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", asked)
    yield _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_tokens)
    yield _counter("num_preemptions", "Sequences that had to give their pages back and begin again.", stats.preemptions)
    yield _counter("recoveries", "Times the ranks were formed anew.", stats.recoveries)


def _ranks(ranks: Sequence[RankStatus]) -> Iterator[Metric]:
    up = GaugeMetricFamily("mixtral_rank_up", "1 for a rank that is ready, 0 in any other state.", labels=("rank",))
    where = GaugeMetricFamily("mixtral_rank_info", "1, with where the rank is.", labels=("rank", "node", "device"))
    age = GaugeMetricFamily("mixtral_rank_last_step_age_seconds", "Since the rank's last step.", labels=("rank",))
    for one in ranks:
        up.add_metric((str(one.rank),), one.state == "ready")
        if one.node:  # a dead one is nowhere
            where.add_metric((str(one.rank), one.node, one.device), 1)
        if one.last_step_age_s is not None:
            age.add_metric((str(one.rank),), one.last_step_age_s)
    yield up
    yield where
    yield age


def _experts(experts: ExpertsStatus) -> Iterator[Metric]:
    yield _gauge(
        "expert_placement", "Number of the placement in force: counts up with every change.", experts.placement
    )
    place = GaugeMetricFamily(
        "mixtral_expert_location", "1 for every rank that holds the expert.", labels=("layer", "expert", "rank")
    )
    for layer, of_layer in enumerate(experts.ranks):
        for expert, ranks in enumerate(of_layer):
            for rank in ranks:
                place.add_metric((str(layer), str(expert), str(rank)), 1)
    yield place
    imbalance = GaugeMetricFamily(
        "mixtral_expert_imbalance_ratio", "Rows of the busiest rank over the mean of all; 1: even.", labels=("layer",)
    )
    for layer, ratio in enumerate(experts.imbalance):
        imbalance.add_metric((str(layer),), ratio)
    yield imbalance


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mixtral_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"mixtral_{name}", text, value=value)

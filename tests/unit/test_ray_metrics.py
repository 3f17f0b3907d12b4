"""The copy of the metrics that Ray's agent shows: same names, same numbers, and nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from deployments.access_log import Record
from deployments.metrics import Metrics
from deployments.ray_metrics import RayMetrics
from tests.unit.fake_engine import FakeEngine

Shown = dict[str, dict[tuple[tuple[str, str], ...], float]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What Ray was told last, by name and labels."""
    told: Shown = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert name not in told, "one gauge for each name"
            assert description
            self.keys = set(tag_keys)
            self.values = told[name] = {}

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert set(tags) == self.keys
            self.values[tuple(sorted(tags.items()))] = value

    monkeypatch.setattr("deployments.ray_metrics.Gauge", Gauge)
    return told


class Source:
    """What Metrics.collect() would give."""

    def __init__(self) -> None:
        self.ranks = {"0": 1.0, "1": 1.0}

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("mixtral_tokens", "Tokens.", labels=("replica",))
        tokens.add_metric(("r",), 7)
        yield tokens
        seconds = HistogramMetricFamily("mixtral_wait_seconds", "Waits.", labels=("replica",))
        seconds.add_metric(("r",), [("0.5", 1), ("+Inf", 3)], 2.25)
        yield seconds
        up = GaugeMetricFamily("mixtral_rank_up", "Ranks.", labels=("rank",))
        for rank, value in self.ranks.items():
            up.add_metric((rank,), value)
        yield up


def metrics(source: Any) -> RayMetrics:
    return RayMetrics(source, interval_s=0.001)


def test_every_sample_keeps_name_labels_and_number(shown: Shown) -> None:
    copier = metrics(Source())
    copier.copy()
    copier.copy()
    replica = ("replica", "r")
    assert shown == {
        "mixtral_tokens_total": {(replica,): 7},
        "mixtral_wait_seconds_bucket": {(("le", "0.5"), replica): 1, (("le", "+Inf"), replica): 3},
        "mixtral_wait_seconds_count": {(replica,): 3},
        "mixtral_wait_seconds_sum": {(replica,): 2.25},
        "mixtral_rank_up": {(("rank", "0"),): 1, (("rank", "1"),): 1},
    }


def test_ray_shows_whatever_the_replica_shows(shown: Shown) -> None:
    """Name by name and number by number, so that a metric need only be recorded."""
    ours = Metrics("m", "r", clock=lambda: 7.0)
    ours.watch(FakeEngine())
    ours.canary(ok=True)
    ours.answered("/v1/completions", 200, Record(key="a", prompt_tokens=3))
    metrics(ours).copy()
    samples = [one for family in text_string_to_metric_families(ours.text().decode()) for one in family.samples]
    expected: Shown = {}
    for sample in samples:
        expected.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    assert shown == expected


def test_what_is_gone_is_shown_as_none(shown: Shown) -> None:
    source = Source()
    copier = metrics(source)
    copier.copy()
    del source.ranks["1"]
    copier.copy()
    assert shown["mixtral_rank_up"] == {(("rank", "0"),): 1, (("rank", "1"),): 0}


def test_at_the_end_levels_are_zero_and_counts_stay(shown: Shown) -> None:
    copier = metrics(Source())
    copier.copy()
    with copier:
        pass
    assert set(shown["mixtral_rank_up"].values()) == {0}
    assert shown["mixtral_tokens_total"] == {(("replica", "r"),): 7}


def test_a_copy_that_fails_is_not_the_last_one(shown: Shown, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Source):
        copies = 0
        third = threading.Event()

        def collect(self) -> Iterator[Metric]:
            self.copies += 1
            if self.copies == 1:
                raise RuntimeError("once")
            if self.copies == 3:
                self.third.set()
            return super().collect()

    source = Failing()
    with metrics(source):
        assert source.third.wait(timeout=30)
    assert "could not be copied" in caplog.text
    assert shown["mixtral_tokens_total"]

"""The replica's metrics, shown by the Ray agent of its node as well: the only address Prometheus has for each of many.

    Metrics.collect() ──every few seconds──▶ one Ray gauge per sample name ──▶ agent, as ray_mixtral_*

Gauges for everything, counters and histogram buckets too, because the agent rebuilds histograms from the middle of
their buckets and so gets their sums wrong, and because a name stays as it is then. rate() asks for numbers, not types.
"""

from __future__ import annotations

import logging
import threading

from ray.util.metrics import Gauge

from deployments.metrics import Metrics

logger = logging.getLogger("ray.serve")

INTERVAL_S = 5.0  # Ray's agent hears from this process every 10 s

Sample = tuple[str, tuple[tuple[str, str], ...]]  # name and labels


class RayMetrics:
    """A thread that copies. What is not there any more is shown as 0, and so is every gauge once the replica stops."""

    def __init__(self, metrics: Metrics, interval_s: float = INTERVAL_S) -> None:
        self._metrics = metrics
        self._interval_s = interval_s
        self._gauges: dict[str, Gauge] = {}
        self._levels: set[Sample] = set()  # what was shown last and may fall: neither counter nor histogram
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-metrics", daemon=True)

    def __enter__(self) -> RayMetrics:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self.copy()
            except Exception:  # the thread's boundary: a failed copy must not be the last one
                logger.exception("the metrics could not be copied to Ray")
        for sample in self._levels:
            self._set(sample, 0.0)

    def copy(self) -> None:
        levels: set[Sample] = set()
        for family in self._metrics.collect():
            for name, labels, value, *_ in family.samples:
                sample = name, tuple(sorted(labels.items()))
                self._set(sample, value, family.documentation)
                if family.type == "gauge":
                    levels.add(sample)
        for gone in self._levels - levels:
            self._set(gone, 0.0)
        self._levels = levels

    def _set(self, sample: Sample, value: float, text: str = "") -> None:
        name, labels = sample
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tuple(label for label, _ in labels))
        self._gauges[name].set(value, dict(labels))

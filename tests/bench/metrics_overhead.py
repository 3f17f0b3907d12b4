"""What counting costs:  python -m tests.bench.metrics_overhead

A step is told on the engine's thread, an event on the event loop; a copy for Ray's agent runs on a thread of its own.
The model has 32 layers of 8 experts.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from cluster.messages import EngineStats, StepTimes, TokenEvent
from cluster.observer import StepRecord
from deployments.metrics import Metrics

LAYERS, EXPERTS = 32, 8
STATS = EngineStats(1, 2, 30, 4, steps=5, prompt_tokens=6, generated_tokens=7, preemptions=0)
TIMES = StepTimes(*[0.001] * 7)
PLAIN = StepRecord(10, 20, 21, "all_reduce", 0.001, 0.02, 0.001, 0.0001, TIMES, STATS)
ROWS, SLOTS = ((5,) * EXPERTS,) * LAYERS, (tuple(range(EXPERTS)),) * LAYERS
WITH_LOAD = StepRecord(10, 20, 21, "all_reduce", 0.001, 0.02, 0.001, 0.0001, TIMES, STATS, ROWS, SLOTS)


def microseconds(work: Callable[[], object], number: int) -> float:
    return min(timeit.repeat(work, number=number, repeat=5)) / number * 1e6


def main() -> None:
    metrics = Metrics("model", "replica")
    timer, event = metrics.timer(1), TokenEvent("a", (1,))
    for what, work, number in (
        ("a step", lambda: metrics.step(PLAIN), 5000),
        ("a step that reports the experts' load (once a second)", lambda: metrics.step(WITH_LOAD), 1000),
        ("a token of an answer", lambda: timer.event(event), 10000),
        ("a scrape of /metrics", metrics.text, 20),
    ):
        print(f"{what:<55} {microseconds(work, number):8.1f} us")


if __name__ == "__main__":
    main()

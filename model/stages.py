"""Where a step's time goes: one stopwatch that is always in exactly one stage.

Host time: on a GPU it says what launching costs, not what the kernels take.
"""

from __future__ import annotations

from time import perf_counter
from typing import Literal

Stage = Literal["build", "attention", "router", "experts", "exchange", "head", "sample"]


class Stages:
    """start() ends the running stage and begins the next; take() ends all and returns the sums."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}
        self._running: Stage | None = None
        self._since = 0.0

    def start(self, stage: Stage) -> None:
        now = perf_counter()
        self._end(now)
        self._running = stage
        self._since = now

    def take(self) -> dict[Stage, float]:
        self._end(perf_counter())
        self._running = None
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _end(self, now: float) -> None:
        if self._running is not None:
            self._seconds[self._running] = self._seconds.get(self._running, 0.0) + now - self._since

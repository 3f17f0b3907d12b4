"""When the last step ended: what /health tells of a rank."""

from __future__ import annotations

from time import monotonic


class StepClock:
    def __init__(self) -> None:
        self._last: float | None = None

    def tick(self) -> None:
        self._last = monotonic()

    def age(self) -> float | None:
        return None if self._last is None else monotonic() - self._last

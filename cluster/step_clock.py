"""When the last step ended, which /health tells, and how long the next may take."""

from __future__ import annotations

from time import monotonic

MIN_DEADLINE_S = 30.0
MAX_DEADLINE_S = 3000.0  # below the transports' own timeout
FIRST_DEADLINE_S = 600.0  # of the first step, of which nothing is known
SLACK = 10  # times the predicted
DECAY = 0.9


class StepClock:
    def __init__(self) -> None:
        self._last: float | None = None

    def tick(self) -> None:
        self._last = monotonic()

    def age(self) -> float | None:
        return None if self._last is None else monotonic() - self._last


class StepForecast:
    """Predicts a step from those before it, on the safe side.

    A step should take no longer than one of more tokens took, and no longer per token than one of fewer.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by bits of the number of tokens; slow steps fade slowly

    def note(self, tokens: int, seconds: float) -> None:
        size = tokens.bit_length()
        before = self._seconds.get(size, seconds)
        self._seconds[size] = max(seconds, DECAY * before + (1 - DECAY) * seconds)

    def deadline_s(self, tokens: int) -> float:
        """After which a step counts as hung."""
        if not self._seconds:
            return FIRST_DEADLINE_S
        predicted = min(s * max(1.0, 2 * tokens / (1 << size)) for size, s in self._seconds.items())
        return min(max(MIN_DEADLINE_S, SLACK * predicted), MAX_DEADLINE_S)

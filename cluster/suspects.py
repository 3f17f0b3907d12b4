"""Which request crashes its ranks, if one does. Pure: hears of steps and crashes, decides who runs alone.

    crash 1   everybody in the step is suspected
    crash 2   whoever was in both is tried alone, one after the other
    crash 3   of somebody who was alone: that is the culprit

A request is cleared by a step that gives it a token: it has passed the point where it was when the ranks crashed.
Computing a part of its prompt clears nobody, since the part that crashes may be yet to come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set

TRIED_ALONE_AFTER = 2  # crashes
CULPRIT_AFTER = 3

# What its caller is told; HTTP knows the error by these words.
CULPRIT = "The ranks crashed three times on this request, the last time with nothing beside it; it is not tried again."


class Suspects:
    """By key of the request."""

    def __init__(self) -> None:
        self._crashes: dict[str, int] = {}

    @property
    def any(self) -> bool:
        return bool(self._crashes)

    @property
    def alone(self) -> str | None:
        """Who must be in the next step and nobody else: whoever crashed most often, among those the first."""
        worst = max(self._crashes, key=lambda key: self._crashes[key], default=None)
        return worst if worst is not None and self._crashes[worst] >= TRIED_ALONE_AFTER else None

    def crashed(self, keys: Collection[str]) -> str | None:
        """A step with these requests crashed; the culprit, if that is clear now."""
        for key in keys:
            self._crashes[key] = self._crashes.get(key, 0) + 1
        culprit = next(iter(keys)) if len(keys) == 1 else None
        if culprit is None or self._crashes[culprit] < CULPRIT_AFTER:
            return None
        del self._crashes[culprit]
        return culprit

    def cleared(self, keys: Iterable[str]) -> None:
        """These got a token, or are gone."""
        for key in keys:
            self._crashes.pop(key, None)

    def forget_all_but(self, keys: Set[str]) -> None:
        """Requests that ended while they were suspected must not be waited for."""
        self.cleared(self._crashes.keys() - keys)

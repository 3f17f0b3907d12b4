"""A step that ranks have been handed, as calls to their actors: one result, or one sentence on who failed and how."""

from __future__ import annotations

from typing import Any

from cluster.errors import CanaryFailed, StepFailed
from cluster.messages import StepResult
from cluster.placement import Placement
from cluster.ray_rank import Rank, ended, failed
from cluster.results import merge
from cluster.step_clock import StepClock

DEATHS_WITHIN_S = 0.3  # a failed step is heard of before the death that caused it
SLOW_DEATHS_WITHIN_S = 3.0  # on a machine that is busy with other things


class RayStep:
    def __init__(self, ranks: list[Rank], references: list[Any], clock: StepClock, placement: Placement) -> None:
        self._ranks = ranks
        self._references = references
        self._clock = clock
        self._placement = placement

    def result(self, timeout: float | None = None) -> StepResult:
        import ray

        try:
            results: list[StepResult] = ray.get(self._references, timeout=timeout)
        except ray.exceptions.GetTimeoutError:  # a TimeoutError
            raise
        except ray.exceptions.RayError as error:
            raise self._failure() from error
        self._clock.tick()
        return merge(results, self._placement)

    def abandon(self) -> None:
        """Nobody will ask for the rest; Ray logs what was raised and never looked at."""
        for reference in ended(self._references):
            failed(reference)

    def _failure(self) -> StepFailed:
        """Which rank failed, and how, in one sentence. A death comes first: the others only fail because of it."""
        lost, raised = self._outcome(DEATHS_WITHIN_S)
        if lost is None and all(isinstance(error, ConnectionError) for _, error in raised):
            lost, raised = self._outcome(SLOW_DEATHS_WITHIN_S)  # somebody is missed: perhaps Ray has yet to hear of it
        if lost is not None and lost.state == "frozen":
            return StepFailed(f"{lost} froze during a step; it held {self._experts(lost)}", "frozen")
        if lost is not None:
            return StepFailed(f"{lost} died during a step; it held {self._experts(lost)}", "died")
        rank, cause = min(raised, key=lambda failure: isinstance(failure[1], ConnectionError))
        if isinstance(cause, CanaryFailed):
            return cause
        text = str(cause) if isinstance(cause, StepFailed) else f"{type(cause).__name__}: {cause}"
        return StepFailed(f"{rank}, which holds {self._experts(rank)}, failed in a step: {text}")

    def _outcome(self, within_s: float) -> tuple[Rank | None, list[tuple[Rank, Exception]]]:
        """The first rank that is gone, and what others have raised. Waits for all to end one way or the other."""
        import ray

        ended(self._references, within_s)
        raised: list[tuple[Rank, Exception]] = []
        for rank, reference in zip(self._ranks, self._references, strict=True):
            try:
                ray.get(reference, timeout=0)
            except ray.exceptions.RayTaskError as error:
                raised.append((rank, error.cause))
            except ray.exceptions.RayActorError:
                return rank, raised
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError as error:  # its answer was lost on the way
                raised.append((rank, error))
        return None, raised

    def _experts(self, rank: Rank) -> str:
        held = sorted({expert for layer in self._placement.slots_of(rank.number) for expert in layer})
        return "experts " + " ".join(map(str, held))

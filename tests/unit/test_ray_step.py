"""What a step says that Ray could not give the result of. No cluster: answers are made up."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster.errors import StepFailed
from cluster.placement import even_placement
from cluster.ray_rank import Rank
from cluster.ray_step import RayStep
from cluster.step_clock import StepClock


class FakeRank:
    state = "ready"

    def __init__(self, number: int) -> None:
        self.number = number

    def __str__(self) -> str:
        return f"rank {self.number}"


def get(references: Any, timeout: float | None = None) -> Any:
    """Of references that are the answers."""
    answers = references if isinstance(references, list) else [references]
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return references


def step(monkeypatch: pytest.MonkeyPatch, *answers: object) -> RayStep:
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda references, **options: (references, []))
    ranks: list[Any] = [FakeRank(number) for number in range(len(answers))]
    fakes: list[Rank] = ranks
    return RayStep(fakes, list(answers), StepClock(), even_placement(1, 4, len(answers)))


@pytest.mark.parametrize("lost", [ray.exceptions.RaySystemError("cannot be read"), ray.exceptions.WorkerCrashedError()])
def test_an_answer_that_is_lost_is_a_failed_step(monkeypatch: pytest.MonkeyPatch, lost: Exception) -> None:
    """Neither a death nor what a rank raised; the ranks are formed anew all the same."""
    with pytest.raises(StepFailed, match=f"rank 1, which holds experts 2 3, failed in a step: {type(lost).__name__}"):
        step(monkeypatch, object(), lost).result()


def test_a_death_comes_before_an_answer_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = (ray.exceptions.RaySystemError("cannot be read"), ray.exceptions.ActorDiedError())
    with pytest.raises(StepFailed, match="rank 1 died during a step") as failed:
        step(monkeypatch, *answers).result()
    assert failed.value.cause == "died"

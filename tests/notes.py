"""An observer that keeps what the engine tells it."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from cluster.observer import FailureCause, Silence, StepRecord


@dataclass
class Notes(Silence):
    steps: list[StepRecord] = field(default_factory=list)
    failures: list[FailureCause] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)  # on time.monotonic(), beside failures
    pauses: list[float] = field(default_factory=list)
    moves: list[int] = field(default_factory=list)
    canaries: list[bool] = field(default_factory=list)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def rank_failed(self, cause: FailureCause) -> None:
        self.failed_at.append(monotonic())
        self.failures.append(cause)

    def recovered(self, pause_s: float) -> None:
        self.pauses.append(pause_s)

    def rebalanced(self, moves: int) -> None:
        self.moves.append(moves)

    def canary(self, ok: bool) -> None:
        self.canaries.append(ok)

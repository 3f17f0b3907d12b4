"""What the engine loop tells whoever keeps count: once per step, on the engine's thread, so it must cost microseconds.

deployments/metrics.py listens. Knows no metric names and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.messages import EngineStats, Exchange, StepTimes

FailureCause = Literal["died", "frozen", "step_failed", "deadline"]
Rejection = Literal["queue_full", "not_ready", "draining", "invalid", "deadline", "other"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step. Filled by the engine loop."""

    prompt_tokens: int  # computed in this step
    decode_tokens: int
    sequences: int
    exchange: Exchange
    schedule_s: float  # planning it
    step_s: float  # from handing it out to having its result; it overlaps with the step before
    postprocess_s: float  # taking its result in
    publish_s: float  # handing its events to the event loop
    ranks: StepTimes  # of rank 0
    stats: EngineStats  # after it
    slot_rows: tuple[tuple[int, ...], ...] = ()  # if this step reported the load: per layer, rows of every slot
    slot_experts: tuple[tuple[int, ...], ...] = ()  # with them: per layer, the expert in every slot
    graph: bool | None = None  # whether rank 0 replayed a captured graph; None: it has captured none


class Observer(Protocol):
    def step(self, record: StepRecord) -> None: ...

    def rejected(self, reason: Rejection) -> None:
        """A request was not taken in, or failed before its first step. From any thread."""

    def rank_failed(self, cause: FailureCause) -> None:
        """A recovery begins."""

    def recovered(self, pause_s: float) -> None:
        """From the failure to the first plan of the new group."""

    def rebalanced(self, moves: int) -> None:
        """So many slots hold another expert from this step on."""

    def canary(self, ok: bool) -> None: ...


class Silence:
    """Nobody listens."""

    def step(self, record: StepRecord) -> None: ...

    def rejected(self, reason: Rejection) -> None: ...

    def rank_failed(self, cause: FailureCause) -> None: ...

    def recovered(self, pause_s: float) -> None: ...

    def rebalanced(self, moves: int) -> None: ...

    def canary(self, ok: bool) -> None: ...

"""What other threads tell the engine's thread, through its inbox."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

from cluster.config import SchedulerConfig
from cluster.messages import EncodeRequest, Request
from cluster.observer import FailureCause
from cluster.placement import Placement


@dataclass(frozen=True, slots=True)
class Add:
    key: str
    request: Request | EncodeRequest
    arrived_s: float = field(default_factory=monotonic)


@dataclass(frozen=True, slots=True)
class Abort:
    key: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Died:
    reason: str
    epoch: int
    cause: FailureCause = "died"


@dataclass(frozen=True, slots=True)
class Limit:
    limits: SchedulerConfig


@dataclass(frozen=True, slots=True)
class Move:
    """Every rank of this epoch has fetched the placement: use it from the next step on."""

    placement: Placement
    moves: int
    epoch: int
    moved: Future[bool]  # False: the ranks have been formed anew meanwhile, and not all have it


Command = Add | Abort | Died | Limit | Move | None  # None ends the loop

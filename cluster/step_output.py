"""What a computed step gives, while a device may still be at it: who asks for the result waits, not who computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cluster.messages import StepResult


class OnTheWay:
    """Numbers that leave the device. values() waits for them, and for nothing that was launched after them."""

    def __init__(self, x: Tensor) -> None:
        self._here = x.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if x.is_cuda:
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record()

    def values(self) -> tuple[int, ...]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return tuple(self._here.tolist())


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`known`: all of the result but the sampled ids, where those are still to come."""

    known: StepResult
    token_ids: OnTheWay | None = None

    def result(self) -> StepResult:
        return self.known if self.token_ids is None else replace(self.known, token_ids=self.token_ids.values())

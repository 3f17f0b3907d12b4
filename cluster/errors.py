"""What the engine can answer instead of tokens. HTTP turns each class into one status code.

EngineError (RuntimeError)
├── RequestRejected         not started, nothing lost: try again after retry_after_s
│   ├── QueueFull           running and waiting are both at their limits          429
│   ├── EngineNotReady      loading, or a rank is gone and not yet replaced        503
│   └── EngineDraining      shutting down: no new work                             503
├── RequestInvalid          the request can never run here                         400
└── StepFailed              the ranks could not run a step; names rank and cause   500
    └── CanaryFailed        they could, and an expert or a collective was wrong
"""

from __future__ import annotations

from cluster.observer import FailureCause


class EngineError(RuntimeError):
    pass


class RequestRejected(EngineError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(RequestRejected):
    pass


class EngineNotReady(RequestRejected):
    pass


class EngineDraining(RequestRejected):
    pass


class RequestInvalid(EngineError):
    pass


class StepFailed(EngineError):
    def __init__(self, message: str, cause: FailureCause = "step_failed") -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[StepFailed], tuple[str, FailureCause]]:
        return type(self), (str(self), self.cause)  # it comes from ranks, pickled


class CanaryFailed(StepFailed):
    pass

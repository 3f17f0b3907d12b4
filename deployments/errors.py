"""Every answer that is not an answer: OpenAI's error envelope, and which failure becomes which status.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

400 the request is wrong · 401 no valid key · 404 no such model or route · 405 method · 413 body too large
429 queue full · 503 not ready or draining (both with Retry-After) · 504 deadline · 500 our mistake
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi.responses import JSONResponse

from cluster.errors import EngineError, QueueFull, RequestInvalid, RequestRejected
from cluster.suspects import CULPRIT

_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with an error status. The message is written for the caller."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.envelope(), self.status, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """What a caller may know of our own mistakes; the log has the rest."""
    return ApiError(500, "The server made a mistake; its log says which.", code="internal_error")


def from_engine(error: EngineError, retry_after_s: Callable[[], float]) -> ApiError:
    """retry_after_s: when a place will be free, which is asked only for those who need one."""
    match error:
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after_s=retry_after_s())
        case RequestRejected():
            return ApiError(503, str(error), code="not_ready", retry_after_s=error.retry_after_s)
        case RequestInvalid():
            return invalid(str(error))
        case _:
            return not_finished(str(error))


def not_finished(reason: str | None) -> ApiError:
    """The engine gave an answer up."""
    code = "request_crashes_ranks" if reason == CULPRIT else "engine_error"
    return ApiError(500, reason or "The engine could not finish the answer.", code=code)

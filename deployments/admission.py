"""Who may come in, and who has to come back later: keys, how many requests one key may have, the pace of answers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.access_log import record_of, route_of
from deployments.errors import ApiError
from deployments.live import Live

OPEN_ROUTES = ("/health", "/ready")  # probes have no key; /health then says its status only

WINDOW_S = 60.0
UNKNOWN_S = 10.0  # where nothing has finished lately
LONGEST_S = 600.0


class Pace:
    """What Retry-After says: each caller who is sent away is given the next place that will become free.

    finished at  ──x──x────x──x──▶ now: 4 in 8 s, so one place every 2 s
    sent away    first: come back in 2 s, second: in 4 s, ...
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._finished: deque[float] = deque(maxlen=4096)
        self._promised: deque[float] = deque(maxlen=4096)  # when those who were sent away will be back

    def finished(self) -> None:
        self._finished.append(self._clock())

    def retry_after_s(self) -> float:
        now = self._clock()
        while self._finished and self._finished[0] < now - WINDOW_S:
            self._finished.popleft()
        while self._promised and self._promised[0] <= now:
            self._promised.popleft()
        if not self._finished:
            return UNKNOWN_S
        seconds_each = max(now - self._finished[0], 1e-3) / len(self._finished)
        wait = min((len(self._promised) + 1) * seconds_each, LONGEST_S)
        self._promised.append(now + wait)
        return wait


class RequireKey:
    """ASGI middleware: 401 for every route but the open ones, before anything of the request is read."""

    def __init__(self, app: ASGIApp, live: Live) -> None:
        self.app = app
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        keys = self._live.keys
        if scope["type"] == "http" and keys.required and not self._is_open(route_of(scope)):
            authorization = Headers(scope=scope).get("authorization")
            name = keys.name_of(authorization)
            if name is None:
                problem = "is not valid" if authorization else "is missing"
                error = ApiError(401, f"The API key {problem}; send Authorization: Bearer KEY.", code="invalid_api_key")
                await error.response()(scope, receive, send)
                return
            record_of(scope).key = name
        await self.app(scope, receive, send)

    def _is_open(self, route: str) -> bool:
        return route in OPEN_ROUTES or (route == "/metrics" and self._live.open_metrics)


class KeyLimit:
    """ASGI middleware: 429 for the key that has limits.max_concurrent_per_key POSTs running. Behind RequireKey."""

    def __init__(self, app: ASGIApp, live: Live, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._live = live
        self._clock = clock
        self._running: dict[str, int] = {}
        self._paces: dict[str, Pace] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = record_of(scope).key if scope["type"] == "http" and scope["method"] == "POST" else None
        if key is None:
            await self.app(scope, receive, send)
            return
        pace = self._paces.setdefault(key, Pace(self._clock))
        allowed = self._live.limits.max_concurrent_per_key
        if allowed is not None and self._running.get(key, 0) >= allowed:
            message = f"This API key has {allowed} requests running already, limits.max_concurrent_per_key here."
            error = ApiError(429, message, code="key_limit", retry_after_s=pace.retry_after_s())
            record_of(scope).error = error.code
            await error.response()(scope, receive, send)
            return
        self._running[key] = self._running.get(key, 0) + 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running[key] -= 1
            pace.finished()

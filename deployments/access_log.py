"""One JSON line for each request once it is over: who, what, how long, how many tokens. Never what was said.

The middleware makes a Record; whoever answers the request fills it in.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.messages import TokenEvent
from deployments.settings import SettingsError

logger = logging.getLogger("mixtral.access")

STDOUT = "stdout"
CLIENT_LEFT = 499  # instead of a status that nobody is there to be told
_PROBES = ("/health", "/ready", "/metrics")  # every few seconds, and they say nothing


@dataclass(slots=True)
class Record:
    """What one request has come to. Times are of time.monotonic()."""

    started: float = field(default_factory=time.monotonic)
    key: str | None = None  # the name of the API key, by RequireKey
    request_id: str | None = None  # of the answer
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)  # of all choices
    error: str | None = None  # the code of what was said instead of the answer, or instead of the rest of a stream

    def add(self, event: TokenEvent) -> None:
        if event.token_ids and self.first_token is None:
            self.first_token = time.monotonic()
        self.completion_tokens += len(event.token_ids)
        self.cached_tokens += event.cached_tokens
        if event.finish_reason is not None:
            self.finish_reasons.append(event.finish_reason)

    def usage(self) -> dict[str, Any]:
        """OpenAI's."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


Answered = Callable[[str, int, Record], None]  # told of every answer: the route's pattern, the status, what came of it


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The request's; a new one where no log is kept."""
    record = scope.setdefault("state", {}).setdefault("record", Record())
    assert isinstance(record, Record)
    return record


def route_of(scope: MutableMapping[str, Any]) -> str:
    """The path below Serve's route prefix, which it leaves in the path and names as root_path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class AccessLog:
    """ASGI middleware, outermost: what is refused is logged too."""

    def __init__(self, app: ASGIApp, answered: Answered) -> None:
        self.app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_of(scope) in _PROBES:
            await self.app(scope, receive, send)
            return
        record = record_of(scope)
        status: int | None = None
        complete = False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            await send(message)
            status = message.get("status", status)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = status or 500  # what the server's last resort is about to say
            record.error = record.error or "internal_error"
            raise
        finally:
            logger.info(_line(scope, record, status, complete))
            pattern = getattr(scope.get("route"), "path", "none")  # what the caller wrote may be anything
            self._answered(pattern, CLIENT_LEFT if status is None else status, record)


def _line(scope: Scope, record: Record, status: int | None, complete: bool) -> str:
    first = record.first_token
    fields = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": record.request_id,
        "key": record.key,
        "method": scope["method"],
        "route": route_of(scope)[:200],
        "status": status,
        "complete": complete,  # false: the client left first
        "seconds": round(time.monotonic() - record.started, 4),
        "first_token_s": None if first is None else round(first - record.started, 4),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reason": ",".join(record.finish_reasons) or None,
        "error": record.error,
    }
    return json.dumps(fields, separators=(",", ":"))


def keep(where: str | None, stdout: Path | None = None) -> None:
    """Where lines go: stdout, a file that is appended to, or nowhere. Called once, when a replica starts.

    stdout: the file that stands for it, where this process's own is not what a person would look at.
    """
    if where is None:
        handler: logging.Handler = logging.NullHandler()
    elif where == STDOUT:
        handler = logging.StreamHandler(sys.stdout) if stdout is None else logging.FileHandler(stdout)
    else:
        try:
            handler = logging.FileHandler(Path(where).expanduser(), encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"access_log: {where} cannot be written ({error.strerror}).") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    for before in logger.handlers[:]:
        logger.removeHandler(before)
        before.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

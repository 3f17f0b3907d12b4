"""Bytes of a request body to a JSON object, with every bound that keeps a hostile one cheap. Knows no fields."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import ApiError, invalid
from deployments.live import Live

MAX_DEPTH = 64
TIMEOUT_S = 60.0  # for a whole body to arrive: half of one holds a place among the requests


class BodyLimit:
    """ASGI middleware: no route receives more than limits.max_body_bytes, whatever Content-Length claims."""

    def __init__(self, app: ASGIApp, live: Live) -> None:
        self.app = app
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        max_bytes = self._live.limits.max_body_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > max_bytes:
            await _too_large(max_bytes).response()(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise _too_large(max_bytes)
            return message

        await self.app(scope, limited, send)


async def read_json(request: Request, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The body as a JSON object. Numbers are finite and texts are encodable, so nothing below has to ask again."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        # Also what keeps a foreign web page from posting to a server on localhost without a preflight.
        raise invalid(f"Send the body with Content-Type: application/json, not {content_type[:60]!r}.")
    try:
        async with asyncio.timeout(timeout_s):
            body = await request.body()
    except TimeoutError:
        raise invalid(f"The body did not arrive within {timeout_s:g} s.") from None
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_not_a_number)
        if b"\\ud" in body.lower():  # may be half of a surrogate pair, which no tokenizer can encode
            json.dumps(value, ensure_ascii=False).encode()
        if _is_deep(value, body):
            raise invalid(f"The body is nested too deeply; {MAX_DEPTH} levels are possible.")
    except RecursionError:
        raise invalid(f"The body is nested too deeply; {MAX_DEPTH} levels are possible.") from None
    except UnicodeError:
        raise invalid("The body is not valid UTF-8 text.") from None
    except ValueError as error:  # json's own; an integer of thousands of digits is one too
        raise invalid(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise invalid(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The body is larger than {max_bytes} bytes; send less or raise limits.max_body_bytes.")


def _is_deep(value: object, body: bytes) -> bool:
    """Whether more than MAX_DEPTH objects and lists lie within one another: all below may then use recursion."""
    if body.count(b"{") + body.count(b"[") <= MAX_DEPTH:
        return False
    layer = [value]
    for _ in range(MAX_DEPTH):
        inner = [
            list(each.values()) if isinstance(each, dict) else each for each in layer if isinstance(each, dict | list)
        ]
        if not inner:
            return False
        layer = [item for items in inner for item in items]
    return any(isinstance(each, dict | list) for each in layer)


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

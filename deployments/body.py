"""Bytes of a request body to a JSON object, with every bound that keeps a hostile one cheap. Knows no fields."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import ApiError, invalid

TIMEOUT_S = 60.0  # for a whole body to arrive: half of one holds a place among the requests


class BodyLimit:
    """ASGI middleware: no route receives more than max_bytes, whatever Content-Length claims."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self._too_large()
            return message

        await self.app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self.max_bytes} bytes; send less or raise limits.max_body_bytes."
        )


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
        value = json.loads(body.decode(), parse_constant=_not_a_number)
        if b"\\ud" in body.lower():  # may be half of a surrogate pair, which no tokenizer can encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None
    except UnicodeError:
        raise invalid("The body is not valid UTF-8 text.") from None
    except ValueError as error:  # json's own; an integer of thousands of digits is one too
        raise invalid(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise invalid(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

"""Token events to server-sent events, and the response that sends them until the client goes away.

data: {...chunk...}     one per event; a line starting with ":" where nothing came for a while
data: {"error": ...}    instead of the rest, when the answer fails after the status line has gone out
data: [DONE]            only after a complete answer
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.answers import Answer, Answers, Item
from deployments.errors import ApiError, internal
from deployments.replies import Json, Reply, usage

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: dumps() makes one per call


def data(payload: Json) -> bytes:
    return b"data: " + _to_json(payload).encode() + b"\n\n"


async def sent_events(
    reply: Reply, first: Item, rest: Answers, prompt_tokens: int, count: int, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The whole stream. `first` was awaited by the caller, so that an early failure had a status of its own."""
    answers = [Answer() for _ in range(count)]
    no_usage: Json = {"usage": None} if include_usage else {}

    def chunks(item: Item) -> bytes:
        if item is None:
            return KEEP_ALIVE
        index, event = item
        answers[index].add(event)
        return b"".join(data(reply.chunk([choice]) | no_usage) for choice in reply.choices(index, event))

    try:
        for index in range(count):
            for choice in reply.opening(index):
                yield data(reply.chunk([choice]) | no_usage)
        yield chunks(first)
        async for item in rest:
            yield chunks(item)
    except ApiError as error:
        yield data(error.envelope())
        return
    except Exception:  # too late for a status: the client gets an answer here, the log the reason
        logger.exception("a stream failed")
        yield data(internal().envelope())
        return
    if include_usage:
        yield data(reply.chunk([]) | {"usage": usage(prompt_tokens, answers)})
    yield DONE


class EventStream(Response):
    """Sends chunks until they end or the client goes, and closes the answers they are made from either way."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], answers: Answers) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Both: chunks that were never asked for would not close what they read.
        async with aclosing(self._answers), aclosing(self._chunks):
            try:
                await until_disconnect(receive, self._send(send))
            except (ClientDisconnect, OSError):
                logger.debug("a client left its stream")

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What work returns, or ClientDisconnect once the client is gone; work is over in either case."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

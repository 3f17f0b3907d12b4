"""Token events to one document or to server-sent events, and the response that sends those until the client goes away.

data: {...chunk...}     one per event; a line starting with ":" where nothing came for a while
data: {"error": ...}    instead of the rest, when the answer fails after the status line has gone out
data: [DONE]            only after a complete answer
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.access_log import Record
from deployments.answers import Answers, Item
from deployments.concurrency import until_disconnect
from deployments.errors import ApiError, internal
from deployments.replies import Choice, Json, Reply

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: dumps() makes one per call


def data(payload: Json) -> bytes:
    return b"data: " + _to_json(payload).encode() + b"\n\n"


async def sent_events(
    reply: Reply, choices: Sequence[Choice], record: Record, first: Item, rest: Answers, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The whole stream. `first` was awaited by the caller, so that an early failure had a status of its own."""
    no_usage: Json = {"usage": None} if include_usage else {}

    def chunks(parts: Sequence[Json]) -> bytes:
        return b"".join(data(reply.chunk([part]) | no_usage) for part in parts)

    def sent(item: Item) -> bytes:
        if item is None:
            return KEEP_ALIVE
        index, event = item
        record.add(event)
        return chunks(choices[index].add(event))

    try:
        for choice in choices:
            yield chunks(choice.opening())
        yield sent(first)
        async for item in rest:
            yield sent(item)
    except ApiError as error:
        record.error = error.code
        yield data(error.envelope())
        return
    except Exception:  # too late for a status: the client gets an answer here, the log the reason
        logger.exception("a stream failed")
        record.error = "internal_error"
        yield data(internal().envelope())
        return
    if include_usage:
        yield data(reply.chunk([]) | {"usage": record.usage()})
    yield DONE


async def gather(reply: Reply, choices: Sequence[Choice], record: Record, answers: Answers) -> Json:
    """The answer as one document."""
    parts = [choice.opening() for choice in choices]
    async for item in answers:
        if item is not None:
            index, event = item
            record.add(event)
            parts[index] += choices[index].add(event)
    return reply.whole(parts) | {"usage": record.usage()}


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

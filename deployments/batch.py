"""mixtral-serve batch: the requests of a file through the HTTP application, in this process and without a network.

So a line means exactly what the same request means to the server, fields and errors included. As many run at once as
the engine runs; whatever it cannot take just now waits here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message
from tqdm import tqdm

from deployments.batch_file import Entry, Output, read_body
from deployments.concurrency import together
from deployments.serving import Engine

RETRY_S = 1.0


class BatchStopped(Exception):
    """The engine can answer nothing more. What is answered is kept."""


@dataclass(frozen=True, slots=True)
class Answered:
    status: int
    body: Any


async def run_batch(
    app: ASGIApp, engine: Engine, source: Path, entries: list[Entry], output: Output, *, at_once: int, quiet: bool
) -> int:
    """Answer what the output does not hold yet; how many of these answers are errors."""
    todo = [entry for entry in entries if entry.custom_id not in output.done]
    failed = 0
    with tqdm(total=len(entries), initial=len(output.done), unit=" requests", disable=quiet) as bar:

        async def work(rest: Iterator[Entry]) -> None:
            nonlocal failed
            for entry in rest:
                answered = await _answer(app, engine, entry.url, read_body(source, entry))
                output.write(_line(entry, answered))
                failed += answered.status != 200
                bar.set_postfix(errors=failed, refresh=False)
                bar.update()

        rest = iter(todo)  # shared: each worker takes the next one
        await together(work(rest) for _ in range(min(at_once, len(todo))))
    return failed


async def _answer(app: ASGIApp, engine: Engine, url: str, body: dict[str, Any]) -> Answered:
    content = json.dumps(body).encode()
    while True:
        answered = await _post(app, url, content)
        if answered.status not in (429, 503):
            return answered
        if not engine.healthy:
            raise BatchStopped(answered.body["error"]["message"])
        await asyncio.sleep(RETRY_S)


async def _post(app: ASGIApp, path: str, content: bytes) -> Answered:
    """One request, as a server would hand it to the application."""
    unread = [content]
    status = 0
    received = bytearray()

    async def receive() -> Message:
        if not unread:  # nobody leaves
            await asyncio.Event().wait()
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        received.extend(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    return Answered(status, json.loads(received))


def _line(entry: Entry, answered: Answered) -> dict[str, Any]:
    request_id = answered.body.get("id") or f"req-{secrets.token_hex(12)}"
    return {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": entry.custom_id,
        "response": {"status_code": answered.status, "request_id": request_id, "body": answered.body},
        "error": None,
    }

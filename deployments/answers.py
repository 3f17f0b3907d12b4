"""The answers of one HTTP request: one engine request per prompt, read as one stream.

Owns their lifetime. Whoever closes the stream, or is cancelled while reading it, ends all of them; a deadline
and a failure of any one do the same. Knows neither JSON nor HTTP statuses beyond ApiError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from cluster.errors import EngineError
from cluster.messages import FinishReason, Request, TokenEvent
from deployments.errors import ApiError, from_engine
from deployments.serving import Engine

# (which prompt, what came), or None where nothing came for a while
Item = tuple[int, TokenEvent] | None
Answers = AsyncGenerator[Item, None]


async def run(engine: Engine, requests: Sequence[Request], timeout_s: float, silence_s: float) -> Answers:
    """The events of all requests as they come, and None after every silence_s without one.

    Raises ApiError when a request is rejected or fails, or when timeout_s have passed.
    """
    # What came, and each reader once it is done: well or not.
    queue: asyncio.Queue[tuple[int, TokenEvent] | asyncio.Task[None]] = asyncio.Queue()
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout_s
    readers = [asyncio.create_task(_read(engine, index, request, queue)) for index, request in enumerate(requests)]
    for reader in readers:
        reader.add_done_callback(queue.put_nowait)
    try:
        unfinished = len(readers)
        while unfinished:
            try:
                async with asyncio.timeout_at(min(deadline, clock() + silence_s)):
                    item = await queue.get()
            except TimeoutError:
                if clock() >= deadline:
                    message = f"The answer took longer than {timeout_s:g} s, limits.request_timeout_s of this server."
                    raise ApiError(504, message, code="deadline_exceeded") from None
                yield None
                continue
            if isinstance(item, asyncio.Task):
                _reraise(item)
                unfinished -= 1
            else:
                _raise_if_failed(item[1])
                yield item
    finally:
        # Cancelled inside the engine's iterator, which is how it learns that nobody listens any more.
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    engine: Engine, index: int, request: Request, queue: asyncio.Queue[tuple[int, TokenEvent] | asyncio.Task[None]]
) -> None:
    finish_reason: FinishReason | None = None
    async for event in engine.generate(request):
        finish_reason = event.finish_reason
        queue.put_nowait((index, event))
    assert finish_reason is not None, f"the events of {request.request_id} ended without a finish_reason"


def _reraise(reader: asyncio.Task[None]) -> None:
    try:
        reader.result()
    except EngineError as error:
        raise from_engine(error) from None


def _raise_if_failed(event: TokenEvent) -> None:
    if event.finish_reason == "error":
        raise ApiError(500, event.error or "The engine could not finish the answer.", code="engine_error")
    if event.finish_reason == "abort":
        raise ApiError(503, "The server ended the answer before it was finished.", code="aborted", retry_after_s=1)


@dataclass(slots=True)
class Answer:
    """One whole answer, gathered from its events by add()."""

    text: str = ""
    finish_reason: FinishReason | None = None
    tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        self.finish_reason = event.finish_reason
        self.tokens += len(event.token_ids)
        self.cached_tokens += event.cached_tokens


async def gather(items: Answers, count: int) -> list[Answer]:
    answers = [Answer() for _ in range(count)]
    async for item in items:
        if item is not None:
            index, event = item
            answers[index].add(event)
    return answers

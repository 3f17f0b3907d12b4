"""The answers of one HTTP request: one engine request per prompt, read as one stream of choices.

Owns their lifetime. Whoever closes the stream, or is cancelled while reading it, ends all of them; a deadline, too long
a silence and a failure of any one do the same. Knows neither JSON nor HTTP statuses beyond ApiError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from cluster.errors import EngineError
from cluster.messages import Request, TokenEvent
from deployments.admission import Pace
from deployments.errors import ApiError, from_engine, not_finished
from deployments.serving import Service

# (which choice of the HTTP answer, what came), or None where nothing came for a while
Item = tuple[int, TokenEvent] | None
Answers = AsyncGenerator[Item, None]
Queue = asyncio.Queue[tuple[int, TokenEvent] | asyncio.Task[None]]


async def run(service: Service, requests: Sequence[Request]) -> Answers:
    """The events of all requests as they come, and None after every keep_alive_s without one.

    Raises ApiError when a request is rejected or fails, or when it has taken too long.
    """
    # What came, and each reader once it is done: well or not.
    queue: Queue = asyncio.Queue()
    watch = _Watch(service)
    readers = [asyncio.create_task(_read(service, index, request, queue)) for index, request in enumerate(requests)]
    for reader in readers:
        reader.add_done_callback(queue.put_nowait)
    try:
        unfinished = len(readers)
        while unfinished:
            try:
                async with asyncio.timeout_at(watch.next_look()):
                    item = await queue.get()
            except TimeoutError:
                watch.check()
                yield None
                continue
            if isinstance(item, asyncio.Task):
                _reraise(item, service.pace)
                unfinished -= 1
            else:
                watch.event(*item)
                yield item
    finally:
        # Cancelled inside the engine's iterator, which is how it learns that nobody listens any more.
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def with_shared_prompts(items: Answers, choices_per_prompt: int) -> Answers:
    """The same, but every choice begins with its prompt's log-probabilities, which only come with the first choice."""
    shared: dict[int, TokenEvent] = {}  # by prompt: what its first choice began with
    waiting: dict[int, list[tuple[int, TokenEvent]]] = {}
    begun: set[int] = set()

    def ready(index: int, event: TokenEvent) -> tuple[int, TokenEvent]:
        if index in begun:
            return index, event
        begun.add(index)
        return index, replace(event, prompt_logprobs=shared[index // choices_per_prompt].prompt_logprobs)

    async with aclosing(items):
        async for item in items:
            if item is None:
                yield None
                continue
            index, event = item
            prompt = index // choices_per_prompt
            if index % choices_per_prompt == 0:
                shared.setdefault(prompt, event)
            if prompt not in shared:
                waiting.setdefault(prompt, []).append(item)
                continue
            yield ready(index, event)
            for held in waiting.pop(prompt, []):
                yield ready(*held)


class _Watch:
    """When to look at the clock while nothing comes, and what has taken too long."""

    def __init__(self, service: Service) -> None:
        self._clock = asyncio.get_running_loop().time
        self._service = service
        self._limits = service.live.limits  # those the request came in under
        self._deadline = self._clock() + self._limits.request_timeout_s
        self._begun: set[int] = set()  # choices that are not finished; the others wait for their turn
        self._last_event = self._deadline

    def next_look(self) -> float:
        moments = [self._deadline, self._clock() + self._service.keep_alive_s]
        if self._begun:
            moments.append(self._last_event + self._limits.idle_timeout_s)
        return min(moments)

    def event(self, index: int, event: TokenEvent) -> None:
        self._last_event = self._clock()
        if event.finish_reason is None:
            self._begun.add(index)
        else:
            self._begun.discard(index)
        if event.finish_reason == "error":
            self._check_deadline()  # the engine keeps it as well, and does not start what comes too late
            raise not_finished(event.error)
        if event.finish_reason == "abort":
            raise ApiError(503, "The server ended the answer before it was finished.", code="aborted", retry_after_s=1)

    def check(self) -> None:
        self._check_deadline()
        if not self._begun:
            return
        if not self._service.engine.ready:  # a rank is being replaced: silence is what is to be expected
            self._last_event = self._clock()
        elif self._clock() - self._last_event >= self._limits.idle_timeout_s:
            message = f"No token came for {self._limits.idle_timeout_s:g} s, limits.idle_timeout_s of this server."
            raise ApiError(504, message, code="idle_timeout")

    def _check_deadline(self) -> None:
        if self._clock() >= self._deadline:
            seconds = self._limits.request_timeout_s
            message = f"The answer took longer than {seconds:g} s, limits.request_timeout_s of this server."
            raise ApiError(504, message, code="deadline_exceeded")


async def _read(service: Service, index: int, request: Request, queue: Queue) -> None:
    finished = 0
    with service.metrics.timer(request.n) as timer:
        async for event in service.engine.generate(request):
            timer.event(event)
            finished += event.finish_reason is not None
            queue.put_nowait((index * request.n + event.choice, event))
    assert finished == request.n, f"{finished} of {request.n} choices of {request.request_id} ended"


def _reraise(reader: asyncio.Task[None], pace: Pace) -> None:
    try:
        reader.result()
        pace.finished()
    except EngineError as error:
        raise from_engine(error, pace.retry_after_s) from None

"""The engine: requests in, token events out. One loop in its own thread, three calls: schedule, step, postprocess.

    event loop (asyncio)                      engine thread
    generate() ──Add──▶ inbox ──────────────▶ schedule ▶ step ▶ postprocess ─┐
       ▲  queue per request ◀── _deliver ◀── one list of events per step ◀──┘

The thread owns the scheduler; nothing else touches it. Text is made on the event loop's side, so that the
thread, on which the ranks wait, does only what steps need.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from cluster.answer_text import AnswerText
from cluster.config import EngineConfig
from cluster.errors import EngineDraining, EngineNotReady, QueueFull, RequestInvalid
from cluster.exchange_rule import choose_exchange
from cluster.kv_pool import PagePool
from cluster.messages import EngineStats, RankStatus, Request, SamplingParams, TokenEvent
from cluster.scheduler import Scheduler
from cluster.worker_group import WorkerGroup
from model.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Add:
    key: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class _Abort:
    key: str


@dataclass(frozen=True, slots=True)
class _Fail:
    reason: str


_Command = _Add | _Abort | _Fail | None  # None ends the loop


class Engine:
    """Made on the event loop that will call it, with a group that has been started."""

    def __init__(
        self, config: EngineConfig, group: WorkerGroup, num_pages: int, max_model_len: int, tokenizer: Tokenizer
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._config = config
        self._group = group
        self._pool = PagePool(
            num_pages, config.kv.page_size, prefix_caching=config.kv.prefix_caching, key=secrets.token_bytes(32)
        )
        self._scheduler = Scheduler(config.scheduler, self._pool, tokenizer.eos_ids)
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        # By a key of our own: events of an aborted request may still be on their way when its id is used again.
        self._streams: dict[str, asyncio.Queue[TokenEvent]] = {}
        self._keys: dict[str, str] = {}  # request_id -> key
        self._counter = itertools.count()
        self._event_loop = asyncio.get_running_loop()
        self._failure: str | None = None
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Can this engine ever answer again?"""
        return self._failure is None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Should requests be sent here?"""
        return self.healthy and not self._draining

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        """The request's events, one per step that gave it tokens. Closing the iterator aborts the request."""
        self._check(request)
        sampling = request.sampling
        if sampling.seed is None:  # drawn here, so that a replay after preemption gives the same tokens
            sampling = replace(sampling, seed=secrets.randbits(63))
        key = self._keys[request.request_id] = f"{request.request_id}/{next(self._counter)}"
        stream = self._streams[key] = asyncio.Queue()
        self._inbox.put(_Add(key, request.prompt_ids, sampling))
        before = request.prompt_ids if request.continues_prompt else ()
        text = AnswerText(self.tokenizer.incremental(before), sampling.stop)
        finished = False
        try:
            while not finished:
                event = await stream.get()
                finished = event.finish_reason is not None
                shown, stopped = self._text(text, event)
                reason = "stop" if stopped else event.finish_reason
                yield replace(event, request_id=request.request_id, text=shown, finish_reason=reason)
                if stopped:
                    return
        finally:
            if not finished:
                self.abort(request.request_id)
            del self._streams[key], self._keys[request.request_id]

    def abort(self, request_id: str) -> None:
        """Stop working on a request, if it is still there; its stream ends."""
        if (key := self._keys.get(request_id)) is not None:
            self._inbox.put(_Abort(key))

    def fail(self, reason: str) -> None:
        """The ranks cannot go on: answer every request with the reason and take no more. Callable from any thread."""
        self._inbox.put(_Fail(reason))

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=self._pool.num_pages,
            pages_used=self._pool.num_held,
            steps=scheduler.num_steps,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
        )

    def ranks(self) -> tuple[RankStatus, ...]:
        return self._group.ranks()

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    async def stop(self) -> None:
        """End the loop and the ranks. Requests still open get a last event."""
        self._draining = True
        self._inbox.put(_Fail("the server is shutting down"))
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._group.stop)

    def _check(self, request: Request) -> None:
        if self._failure is not None:
            raise EngineNotReady(self._failure, retry_after_s=10)
        if self._draining:
            raise EngineDraining("the server is shutting down", retry_after_s=10)
        length = len(request.prompt_ids) + request.sampling.max_tokens
        if not request.prompt_ids or length > self.max_model_len:
            raise RequestInvalid(
                f"the prompt has {len(request.prompt_ids)} tokens and {request.sampling.max_tokens} more were asked "
                f"for; together they must be 1 to {self.max_model_len}"
            )
        if request.request_id in self._keys:
            raise RequestInvalid(f"request_id {request.request_id!r} is already running")
        limits = self._config.scheduler
        if len(self._streams) >= limits.max_running + limits.max_waiting:
            raise QueueFull(f"{len(self._streams)} requests are running or waiting already", retry_after_s=1)

    def _text(self, text: AnswerText, event: TokenEvent) -> tuple[str, bool]:
        """The event's text; the token that ends an answer is not part of it."""
        token_ids = event.token_ids[:-1] if event.finish_reason == "stop" else event.token_ids
        shown, stopped = text.push(token_ids)
        if event.finish_reason is not None and not stopped:
            rest, stopped = text.flush()
            shown += rest
        return shown, stopped

    def _run(self) -> None:
        try:
            while self._take_commands():
                plan = self._scheduler.schedule()
                if plan is not None:
                    plan = replace(plan, exchange=choose_exchange(self._config.parallel, plan.num_tokens))
                    result = self._group.step(plan).result()
                    self._publish(self._scheduler.postprocess(plan, result))
        except Exception as error:  # a process boundary of its own: whoever waits gets an answer
            log.exception("the engine's loop failed")
            self._give_up(str(error))

    def _take_commands(self) -> bool:
        """Wait for work, then take in all that has come. False: the loop shall end."""
        idle = not (self._scheduler.num_running or self._scheduler.num_waiting)
        while idle or not self._inbox.empty():
            match self._inbox.get():
                case _Add(key, prompt_ids, sampling):
                    if self._failure is None:
                        self._scheduler.add(key, prompt_ids, sampling)
                    else:
                        self._publish([TokenEvent(key, (), finish_reason="error", error=self._failure)])
                case _Abort(key):
                    if self._scheduler.abort(key):
                        self._publish([TokenEvent(key, (), finish_reason="abort")])
                case _Fail(reason):
                    self._give_up(reason)
                case None:
                    return False
            idle = not (self._scheduler.num_running or self._scheduler.num_waiting) and self._inbox.empty()
        return True

    def _give_up(self, reason: str) -> None:
        self._failure = self._failure or reason
        request_ids = self._scheduler.abort_all()
        self._publish([TokenEvent(r, (), finish_reason="error", error=self._failure) for r in request_ids])

    def _publish(self, events: list[TokenEvent]) -> None:
        """One crossing to the event loop per step, whatever the number of requests."""
        if events:
            self._event_loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # else its caller has just gone
                stream.put_nowait(event)

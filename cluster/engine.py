"""The engine as its callers see it: requests in, token events out, on their event loop.

    event loop (asyncio)                         engine thread (engine_loop.py)
    generate() ──Add──▶ inbox ─────────────────▶ schedule ▶ step ▶ postprocess ─┐
       ▲  queue per request ◀── _deliver ◀─── one list of events per step ◀────┘

Text is made here (answer.py), so that the thread, on which the ranks wait, does only what steps need.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Literal

from cluster.answer import Answers
from cluster.commands import Abort, Add, Died, Limit, Move
from cluster.config import EngineConfig, SchedulerConfig
from cluster.crash_bundle import CrashBundles
from cluster.engine_loop import EngineLoop
from cluster.errors import EngineDraining, EngineError, EngineNotReady, QueueFull, RequestInvalid, StepFailed
from cluster.expert_load import ExpertLoad
from cluster.graph_ladder import ladder_for
from cluster.kv_pool import PagePool
from cluster.messages import (
    EncodeRequest,
    EngineStats,
    ExpertsStatus,
    Grammar,
    RankStatus,
    Request,
    TokenEvent,
)
from cluster.observer import FailureCause, Observer, Rejection, Silence
from cluster.placement import Placement
from cluster.rebalancing import Rebalancing, rebalance
from cluster.request_check import check_request
from cluster.scheduler import Event, Scheduler
from cluster.worker_group import WorkerGroup
from model.config import Architecture, MixtralConfig
from model.errors import ModelError
from model.tokenizer import Tokenizer

Task = Literal["generate", "embed", "classify", "token_classify", "question_answering"]
TASKS: dict[Architecture, Task] = {
    "MixtralForCausalLM": "generate",
    "MixtralModel": "embed",
    "MixtralForSequenceClassification": "classify",
    "MixtralForTokenClassification": "token_classify",
    "MixtralForQuestionAnswering": "question_answering",
}
REFUSALS: dict[type[EngineError], Rejection] = {
    QueueFull: "queue_full",
    EngineNotReady: "not_ready",
    EngineDraining: "draining",
    RequestInvalid: "invalid",
}
STOP_TIMEOUT_S = 5.0  # for the step under way; then the ranks are ended all the same


class Engine:
    """Made on the event loop that will call it, with a group that has been started."""

    def __init__(
        self,
        config: EngineConfig,
        model: MixtralConfig,
        group: WorkerGroup,
        placement: Placement,
        num_pages: int,
        max_model_len: int,
        tokenizer: Tokenizer,
        observer: Observer | None = None,
        crash_directory: Path | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self.max_model_len = max_model_len
        self._config = config
        self._limits = config.scheduler  # as they are now
        self._group = group
        # With a sliding window a sequence's first pages are given back: what is left of a prefix is of no use.
        prefix_caching = config.kv.prefix_caching and model.sliding_window is None
        secret = secrets.token_bytes(32)
        self._pools = [
            PagePool(num_pages, config.kv.page_size, prefix_caching=prefix_caching, key=secret)
            for _ in range(config.parallel.data)
        ]
        self._scheduler = Scheduler(config.scheduler, self._pools, tokenizer.eos_ids, model.sliding_window)
        self._load = ExpertLoad(placement, monotonic())
        # By a key of our own: events of an aborted request may still be on their way when its id is used again.
        self._streams: dict[str, asyncio.Queue[Event]] = {}
        self._keys: dict[str, str] = {}  # request_id -> key
        self._counter = itertools.count()
        self._event_loop = asyncio.get_running_loop()
        self._draining = False
        self._moving = asyncio.Lock()
        self._observer = observer or Silence()
        self._loop = EngineLoop(
            self._scheduler,
            group,
            config.parallel,
            self._load,
            self._publish,
            self.stats,
            self._observer,
            ladder_for(config),
            None if crash_directory is None else CrashBundles(crash_directory),
        )
        self._loop.start()

    @property
    def task(self) -> Task:
        """What the checkpoint was made for."""
        return TASKS[self._model.architecture]

    @property
    def labels(self) -> tuple[str, ...]:
        """What the scores of a classifier mean, in order."""
        return self._model.labels

    @property
    def healthy(self) -> bool:
        """Can this engine ever answer again?"""
        return self._loop.failure is None and self._loop.alive

    @property
    def recovering(self) -> bool:
        """Are ranks being replaced? Whoever runs waits, and goes on afterwards."""
        return self._loop.recovering

    @property
    def ready(self) -> bool:
        """Should requests be sent here?"""
        return self.healthy and not self._draining and not self._loop.recovering

    async def generate(self, request: Request) -> AsyncIterator[TokenEvent]:
        """The request's events, one per choice and step. Closing the iterator aborts the request."""
        with self._refusals_told():
            request = await self._made_ready(request)
        answers = Answers(request, self.tokenizer)
        key, stream = self._submit(request)
        try:
            while answers.open:
                event = await stream.get()
                assert isinstance(event, TokenEvent)
                shown = answers.show(event)
                if shown is None:
                    continue
                if shown.finish_reason is not None and event.finish_reason is None:
                    self._loop.put(Abort(key, event.choice))  # the text ended the choice, not the token
                yield shown
        finally:
            self._forget(request.request_id, key, abort=bool(answers.open))

    async def encode(self, request: EncodeRequest) -> list[list[float]]:
        """Pooled hidden states of a text, or class scores where the checkpoint has a head for them."""
        with self._refusals_told():
            self._check(request)
        key, stream = self._submit(request)
        event = None
        try:
            event = await stream.get()
        finally:
            self._forget(request.request_id, key, abort=event is None)
        if isinstance(event, TokenEvent):
            raise StepFailed("the request was aborted")
        if event.error is not None:
            raise StepFailed(event.error)
        return [list(row) for row in event.rows]

    async def prepare(self, grammar: Grammar, *, opens_text: bool) -> None:
        """RequestInvalid where generate() would raise it because of the grammar. Once asked, the grammar is at hand."""
        await self._prepare(replace(grammar, opens_text=opens_text))

    def abort(self, request_id: str) -> None:
        """Stop working on a request, if it is still there; its stream ends."""
        if (key := self._keys.get(request_id)) is not None:
            self._loop.put(Abort(key))

    def rank_lost(self, reason: str, epoch: int, cause: FailureCause = "died") -> None:
        """What the worker group saw, perhaps between two steps. Callable from any thread."""
        self._loop.put(Died(reason, epoch, cause))

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=sum(pool.num_pages for pool in self._pools),
            pages_used=sum(pool.num_held for pool in self._pools),
            steps=scheduler.steps,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            recoveries=self._loop.recoveries,
            cached_tokens=scheduler.cached_tokens,
        )

    def ranks(self) -> tuple[RankStatus, ...]:
        return self._group.ranks()

    def experts(self) -> ExpertsStatus:
        """Where they are, and how much each is used lately."""
        return self._load.status()

    def doubts(self) -> list[str]:
        """Expert slots and collectives that have not shown lately that they work."""
        return self._loop.doubts()

    async def proved(self) -> None:
        """Returns when every slot and collective has shown once that it works; raises if they never will."""
        await asyncio.to_thread(self._loop.wait_until_proved)
        if self._loop.failure is not None:
            raise EngineError(self._loop.failure)

    async def rebalance(self) -> Rebalancing:
        """Move experts so that ranks have as much to do as each other, by the load lately. Steps go on meanwhile."""
        if self._moving.locked():
            raise EngineNotReady("experts are being moved already", retry_after_s=5)
        if self._loop.recovering:
            raise EngineNotReady("a rank died and is being replaced", retry_after_s=2)
        async with self._moving:
            epoch = self._group.epoch
            planned = rebalance(self._load.placement, self._load.rows())
            if planned.moves:
                moved: Future[bool] = Future()
                with contextlib.suppress(StepFailed):  # the loop hears of it too
                    await asyncio.to_thread(self._group.fetch, planned.placement)
                    self._loop.put(Move(planned.placement, planned.moves, epoch, moved))
                    if await asyncio.wrap_future(moved):
                        return planned
                raise EngineNotReady("a rank died while experts were moved; they are where they were", retry_after_s=5)
            return planned

    def limit(self, limits: SchedulerConfig) -> None:
        """Admit by these limits from now on; whoever runs goes on. The ranks were built for those of the start."""
        for name, least in (("max_running", 1), ("max_step_tokens", 1), ("max_waiting", 0)):
            wanted, most = getattr(limits, name), getattr(self._config.scheduler, name)
            if not least <= wanted <= most:
                raise ValueError(f"{name} can be {least} to {most} while the server runs, not {wanted}")
        self._limits = limits
        self._loop.put(Limit(limits))

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    async def stop(self) -> None:
        """End the loop and the ranks. Requests still open get a last event."""
        self._draining = True
        self._loop.put(None)
        await asyncio.to_thread(self._loop.join, STOP_TIMEOUT_S)
        await asyncio.to_thread(self._group.stop)

    async def _made_ready(self, request: Request) -> Request:
        """The request as the scheduler wants it, checked, its grammar compiled."""
        self._check(request)
        sampling = request.sampling
        if sampling.grammar is not None:
            sampling = replace(sampling, grammar=replace(sampling.grammar, opens_text=not request.continues_prompt))
            await self._prepare(sampling.grammar)
            self._check(request)
        if sampling.seed is None:  # drawn here, so that a replay after preemption gives the same tokens
            sampling = replace(sampling, seed=secrets.randbits(62))
        return replace(request, sampling=sampling)

    @contextlib.contextmanager
    def _refusals_told(self) -> Iterator[None]:
        """Whoever keeps count learns of a request that is not taken in, and why."""
        try:
            yield
        except EngineError as error:
            self._observer.rejected(REFUSALS.get(type(error), "other"))
            raise

    def _check(self, request: Request | EncodeRequest) -> None:
        """Can this request be taken in now?"""
        if self._loop.failure is not None:
            raise EngineNotReady(self._loop.failure, retry_after_s=10)
        if self._loop.recovering:
            raise EngineNotReady("a rank died and is being replaced", retry_after_s=2)
        if self._draining:
            raise EngineDraining("the server is shutting down", retry_after_s=10)
        check_request(request, self._model.vocab_size, self.max_model_len)
        if request.request_id in self._keys:
            raise RequestInvalid(f"request_id {request.request_id!r} is already running")
        if len(self._streams) >= self._limits.max_running + self._limits.max_waiting:
            raise QueueFull(f"{len(self._streams)} requests are running or waiting already", retry_after_s=1)

    async def _prepare(self, grammar: Grammar | None) -> None:
        """Compile a grammar before its request joins the queue: no step waits for it."""
        assert grammar is not None
        try:
            await asyncio.to_thread(self._group.prepare, grammar)
        except ModelError as error:
            raise RequestInvalid(str(error)) from None
        except StepFailed as error:  # the rank that chooses tokens has died, which the loop will hear of too
            raise EngineNotReady(str(error), retry_after_s=2) from None

    def _submit(self, request: Request | EncodeRequest) -> tuple[str, asyncio.Queue[Event]]:
        key = self._keys[request.request_id] = f"{request.request_id}/{next(self._counter)}"
        stream = self._streams[key] = asyncio.Queue()
        self._loop.put(Add(key, request))
        return key, stream

    def _forget(self, request_id: str, key: str, *, abort: bool) -> None:
        if abort:
            self._loop.put(Abort(key))
        del self._streams[key], self._keys[request_id]

    def _publish(self, events: Sequence[Event]) -> None:
        """One crossing to the event loop per step, whatever the number of requests."""
        with contextlib.suppress(RuntimeError):  # the event loop has closed: nobody listens any more
            self._event_loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:  # else its caller has just gone
                stream.put_nowait(event)

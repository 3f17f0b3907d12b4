"""The engine's thread: schedule, step, postprocess, one step ahead; and what happens when the ranks fail.

    inbox ──▶ Scheduler.schedule ──▶ WorkerGroup.step ──▶ Scheduler.postprocess ──▶ publish(events)
                     ▲                      │ StepFailed, or a death between steps
                     └─────────────── recovery.py

Everything a sequence needs to go on is here: prompt, generated ids, seed. The ranks hold weights and what can be
computed again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from time import monotonic

from cluster.commands import Abort, Add, Command, Died, Limit, Move
from cluster.config import ParallelConfig
from cluster.crash_bundle import CrashBundles
from cluster.errors import CanaryFailed, StepFailed
from cluster.exchange_rule import choose_exchange
from cluster.expert_load import ExpertLoad
from cluster.graph_ladder import GraphLadder
from cluster.messages import EngineStats, StepPlan, TokenEvent
from cluster.observer import Observer
from cluster.proofs import Proofs
from cluster.recovery import Recovery
from cluster.scheduler import Event, Scheduler
from cluster.step_clock import StepForecast
from cluster.under_way import UnderWay
from cluster.worker_group import WorkerGroup

log = logging.getLogger(__name__)

STEPS_AHEAD = 1
CHECK_EVERY_S = 60.0  # when idle
ASK_LOAD_EVERY_S = 1.0  # while there is work

LAST_PLANS = 8


class EngineLoop:
    """Owns scheduler and steps. put() and the read-only facts are for other threads."""

    def __init__(
        self,
        scheduler: Scheduler,
        group: WorkerGroup,
        parallel: ParallelConfig,
        load: ExpertLoad,
        publish: Callable[[Sequence[Event]], None],  # called on this thread, at most once per step
        stats: Callable[[], EngineStats],
        observer: Observer,
        graphs: GraphLadder,
        bundles: CrashBundles | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._group = group
        self._parallel = parallel
        self._load = load
        self._load_asked = 0.0  # when a plan last wanted to know it
        self._publish = publish
        self._stats = stats
        self._observer = observer
        self._graphs = graphs
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._under_way: deque[UnderWay] = deque()
        self._forecast = StepForecast()
        self._finished = 0.0  # when the last step was
        placement = load.placement
        self._proofs = Proofs(parallel, len(placement.expert_of), placement.num_slots)
        self._proved = threading.Event()
        self._checked = monotonic()
        self.failure: str | None = None  # why it will never answer again
        self._recovery = Recovery(scheduler, group, observer, bundles)
        self._plans: deque[StepPlan] = deque(maxlen=LAST_PLANS)  # for those who want to know what went on
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def recovering(self) -> bool:
        return self._recovery.active

    @property
    def recoveries(self) -> int:
        return self._recovery.count

    def doubts(self) -> list[str]:
        """What has not shown for too long that it works. From any thread."""
        return self._proofs.doubts(monotonic())

    def wait_until_proved(self) -> None:
        """Until everything has shown once that it works, or the loop has failed."""
        self._proved.wait()

    def put(self, command: Command) -> None:
        self._inbox.put(command)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (failure := self._work()) is not None:
                self._recover(failure)
            reason = "the server is shutting down"
        except Exception as error:  # a process boundary of its own: whoever waits gets an answer
            log.exception("the engine cannot go on")
            reason = self.failure = str(error) or type(error).__name__  # some say nothing
        self._proved.set()  # it will never be; nobody need wait
        self._send(self._scheduler.fail_all(reason))
        self._refuse_the_rest(reason)

    def _refuse_the_rest(self, reason: str) -> None:
        """Whoever still asks gets an answer: until the end if the loop has failed, else whoever has asked already."""
        while self.failure is not None or not self._inbox.empty():
            match self._inbox.get():
                case Add(key, request, arrived_s):
                    self._scheduler.add(key, request, arrived_s)
                    self._send(self._scheduler.fail_all(reason))
                case Move(moved=moved):
                    moved.set_result(False)
                case None:
                    return

    def _work(self) -> StepFailed | None:
        """The loop. None: it was told to end. Else: why the ranks have to be formed anew."""
        try:
            while self._take_commands():
                self._expire()
                began = monotonic()
                plan = self._schedule(began)
                if plan is not None:
                    plan = self._complete(plan, began)
                    planned = monotonic()
                    self._plans.append(plan)
                    self._under_way.append(UnderWay(plan, self._group.step(plan), planned - began, planned))
                if len(self._under_way) > STEPS_AHEAD or (plan is None and self._under_way):
                    self._finish(self._under_way[0].deadline_s(self._forecast))
        except StepFailed as failure:
            return failure
        return None

    def _expire(self) -> None:
        """Who has waited too long is told so."""
        events = self._scheduler.expire(monotonic())
        for _ in {event.request_id for event in events}:
            self._observer.rejected("deadline")
        self._send(events)

    def _schedule(self, now: float) -> StepPlan | None:
        """The next step. A canary if one is due; for one request if that is to be tried alone and finds room."""
        exchange = self._proofs.due(now)
        if exchange is not None and not any(step.plan.canary for step in self._under_way):
            return replace(self._scheduler.for_nobody(), exchange=exchange, canary=True)
        rows = self._graphs.due(now, idle=not self._scheduler.has_work)
        if rows is not None and not any(step.plan.capture for step in self._under_way):
            return replace(self._scheduler.for_nobody(), exchange=self._graphs.exchange, capture=rows)
        alone = self._recovery.alone()
        if alone is None:
            return self._scheduler.schedule(now)
        plan = self._scheduler.schedule(now, only=alone)
        return plan if plan is not None or self._under_way else self._scheduler.schedule(now)

    def _complete(self, plan: StepPlan, now: float) -> StepPlan:
        """What of a plan is not the scheduler's to say."""
        if plan.canary or plan.capture:
            return replace(plan, placement=self._load.placement.number)
        asks = now - self._load_asked >= ASK_LOAD_EVERY_S
        if asks:
            self._load_asked = now
        graph = self._graphs.rows_for(plan)
        exchange = self._graphs.exchange if graph else choose_exchange(self._parallel, plan.num_tokens)
        placement = self._load.placement.number
        return replace(plan, exchange=exchange, placement=placement, report_load=asks, graph=graph)

    def _finish(self, timeout_s: float) -> None:
        """Wait for the first step under way, take in what it gave, tell everybody."""
        step = self._under_way[0]
        result = step.result(timeout_s)
        done = monotonic()
        self._under_way.popleft()
        if not step.plan.capture:
            self._forecast.note(step.num_tokens, done - max(step.handed_out, self._finished))
        self._finished = done
        events = self._scheduler.postprocess(step.plan, result)
        slot_rows = result.slot_rows if step.plan.placement == self._load.placement.number else ()
        if slot_rows:
            self._load.add(slot_rows, done)
        if step.plan.canary or step.plan.capture:
            self._done_for_nobody(step.plan, done)
            return
        self._proofs.step(step.plan.exchange, slot_rows, done)
        self._recovery.completed(events)
        taken = monotonic()
        self._send(events)
        slot_experts = self._load.placement.expert_of if slot_rows else ()
        published = monotonic()
        self._observer.step(
            step.record(result, self._stats(), slot_rows, slot_experts, done=done, taken=taken, published=published)
        )

    def _done_for_nobody(self, plan: StepPlan, now: float) -> None:
        current = plan.placement == self._load.placement.number  # else experts have moved since
        if plan.capture and current:
            self._graphs.captured(plan.capture, now)
            log.info("graphs of decode steps %s", self._graphs.progress())
        if plan.canary and current:
            self._proofs.canary(plan.exchange, now)
        if plan.canary:
            self._recovery.proved()
            self._observer.canary(True)
        if not self._proofs.doubts(now) and self._graphs.complete:
            self._proved.set()

    def _recover(self, failure: StepFailed) -> None:
        wrong = isinstance(failure, CanaryFailed)
        if wrong:
            self._observer.canary(False)
        if self._under_way and self._under_way[0].plan.capture and not self._graphs.failed():
            log.error("graphs cannot be captured: decode steps are launched kernel by kernel, which is slower")
        self._send(self._recovery.blame(failure, self._scheduler.keys_under_way(), self._plans))
        self._under_way.clear()
        self._proofs.forget()
        self._graphs.forget(monotonic())
        self._recovery.run(anew=wrong)  # a rank computes something else than it did: none keeps its weights

    def _salvage(self) -> None:
        """Take in the steps that all ranks had finished: nobody is to be suspected for those."""
        with suppress(StepFailed):
            while self._under_way:
                self._finish(0)

    def _idle_for_s(self) -> float:
        """How long there is nothing to do but wait. Then, now and then, is the time to see that no page was lost."""
        if self._under_way or self._scheduler.has_work:
            return 0.0
        now = monotonic()
        if now - self._checked > CHECK_EVERY_S:
            self._checked = now
            self._scheduler.check_integrity()
        return self._proofs.due_in_s(now) if self._graphs.complete else 0.0

    def _take_commands(self) -> bool:
        """Take in all that has come; wait for the first if nothing else is to do. False: the loop shall end."""
        wait_s = self._idle_for_s()
        while True:
            try:
                command = self._inbox.get(block=wait_s > 0, timeout=wait_s)
            except queue.Empty:
                return True
            wait_s = 0.0
            match command:
                case Add(key, request, arrived_s):
                    self._scheduler.add(key, request, arrived_s)
                case Abort(key, choice):
                    if self._scheduler.abort(key, choice) and choice is None:
                        self._send([TokenEvent(key, (), finish_reason="abort")])
                case Died(reason, epoch, cause):
                    if epoch == self._group.epoch:  # else that death has been dealt with
                        self._salvage()
                        raise StepFailed(reason, cause)
                case Limit(limits):
                    self._scheduler.limit(limits)
                case Move():
                    self._move(command)
                case None:
                    return False

    def _move(self, command: Move) -> None:
        """Experts sit elsewhere from the next plan on; the ranks have them already."""
        current = command.epoch == self._group.epoch
        if current:
            self._group.adopt(command.placement)
            self._load.move(command.placement)
            self._proofs.renew(monotonic())
            self._graphs.drop(monotonic())
            self._observer.rebalanced(command.moves)
        command.moved.set_result(current)

    def _send(self, events: Sequence[Event]) -> None:
        if events:
            self._publish(events)

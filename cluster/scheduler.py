"""Which tokens run this step. Plain Python: decides and never runs; no torch, no I/O, no clock it was not given.

    waiting ──admit──▶ running, in a data group ──finish──▶ gone
       ▲                 │
       └────preempt──────┘     pages back, tokens kept: they are computed again later, perhaps in another group

Every data group has pages of its own (data_group.py) and a budget of tokens for each step, spent in this order:
decodes (one token each, so that nobody who streams waits for somebody's long prompt), then prompts already begun, then
prompts admitted now (admission.py says into which group).

It plans one step ahead: while step n runs, n + 1 is scheduled as if nobody ended in n. The token that n samples is
named LAST_SAMPLED in n + 1, and whoever did end in n is left out of n + 1's results. Steps run in order, so a page
given back while a step still writes to it is safe: its next owner writes later.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Collection, Iterable, Set
from collections.abc import Sequence as Many
from dataclasses import dataclass

from cluster.admission import choose_place
from cluster.config import SchedulerConfig
from cluster.data_group import DataGroup, GroupStep
from cluster.kv_pool import PagePool
from cluster.messages import (
    EncodeEvent,
    EncodeRequest,
    Request,
    SequenceChunk,
    StepPlan,
    StepResult,
    TokenEvent,
)
from cluster.sequence import Sequence
from cluster.waiting import WaitingQueue

Event = TokenEvent | EncodeEvent

log = logging.getLogger(__name__)

DEADLINE = "deadline"


@dataclass(slots=True)
class _Live:
    """A request of which at least one choice lives."""

    choices: dict[int, Sequence]
    begun: bool = False  # one of them has run


class Scheduler:
    """`pools`: one for each data group, all alike."""

    def __init__(
        self, config: SchedulerConfig, pools: Many[PagePool], eos_ids: Iterable[int], window: int | None = None
    ) -> None:
        self._config = config
        self._groups = [DataGroup(number, pool, window) for number, pool in enumerate(pools)]
        self._eos_ids = frozenset(eos_ids)
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._requests: dict[str, _Live] = {}
        self._deadlines: list[tuple[float, str]] = []  # a heap of keys; the dead are skipped when they come up
        self._deadlines_moved = 0.0  # seconds that were added to every deadline since the first
        self._under_way: deque[list[tuple[Sequence, int]]] = deque()  # per step not taken in yet: who, in which life
        self._releases: list[int] = []  # sequences the ranks may forget
        self._num_alive = 0
        self._next_number = 0
        self._next_step = 0
        self.steps = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0

    @property
    def num_running(self) -> int:
        return sum(len(group.running) for group in self._groups)

    @property
    def num_waiting(self) -> int:
        return self._num_alive - self.num_running

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._under_way)

    @property
    def keys(self) -> Set[str]:
        """Of the requests that are not done."""
        return self._requests.keys()

    def keys_under_way(self) -> set[str]:
        """Of the requests in the first step that was not taken in."""
        return {sequence.key for sequence, _ in self._under_way[0]} if self._under_way else set()

    def limit(self, config: SchedulerConfig) -> None:
        """From now on these limits; whoever runs goes on."""
        self._config = config

    def add(self, key: str, request: Request | EncodeRequest, now: float) -> None:
        assert key not in self._requests
        leader = Sequence.of(key, request, self._next_number, now)
        choices = {0: leader}
        if isinstance(request, Request):
            for choice in range(1, request.n):
                choices[choice] = Sequence.of(key, request, self._next_number + choice, now, choice, leader)
                leader.followers.append(choices[choice])
        self._requests[key] = _Live(choices)
        self._next_number += len(choices)
        self._num_alive += len(choices)
        self._waiting.push(leader)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s - self._deadlines_moved, key))

    def abort(self, key: str, choice: int | None = None) -> bool:
        """Forget a request, or one of its choices; False if it is gone already."""
        sequences = [s for s in self._choices(key) if choice is None or s.choice == choice]
        for sequence in sequences:
            self._drop(sequence)
        return bool(sequences)

    def fail(self, key: str, error: str) -> list[Event]:
        """End a request that cannot go on; what to tell its caller."""
        sequences = self._choices(key)
        self.abort(key)
        return [sequence.failure(error) for sequence in sequences]

    def fail_all(self, error: str) -> list[Event]:
        """End every request, for an engine that cannot go on."""
        return [event for key in list(self._requests) for event in self.fail(key, error)]

    def start_over(self, lost: Collection[int] | None = None) -> None:
        """The ranks have forgotten all sequences, and those of the groups in `lost` (None: all) their pages too.

        The steps under way are void. Whoever has lost pages waits again, with the tokens it has; the others go on
        from what was accepted, and the ranks are told of them anew.
        """
        self._under_way.clear()
        self._releases.clear()
        self._next_step = 0
        for group in self._groups:
            for sequence in group.start_over(pages_lost=lost is None or group.number in lost):
                self._waiting.push(sequence)
        for sequence in self._waiting:  # also those that were preempted with a sample under way
            sequence.in_flight = 0

    def move_deadlines(self, seconds: float) -> None:
        """Nothing could run for so long: whoever waits may wait so much longer."""
        self._deadlines_moved += seconds

    def expire(self, now: float) -> list[Event]:
        """End the requests that have not begun by their deadline."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= now - self._deadlines_moved:
            _, key = heapq.heappop(self._deadlines)
            if key in self._requests and not self._requests[key].begun:
                events += self.fail(key, DEADLINE)
        return events

    def schedule(self, now: float, only: str | None = None) -> StepPlan | None:
        """The next step, or None if nothing can run. `only`: for this request and nobody else."""
        steps = [GroupStep(self._config.max_step_tokens) for _ in self._groups]
        for group, step in zip(self._groups, steps, strict=True):
            for sequence in group.advance(step, only):
                self._wait_again(sequence)
            for sequence, chunk in step.chunks.items():
                self._waiting.charge(sequence, len(chunk.token_ids))
        self._admit(steps, now, only)
        chunks = tuple(chunk for step in steps for chunk in step.chunks.values())
        if not chunks:
            return None
        starts = tuple(start for step in steps for start in step.starts)
        releases, self._releases = tuple(self._releases), []
        group_tokens = tuple(step.num_tokens for step in steps) if len(steps) > 1 else ()
        plan = StepPlan(self._next_step, chunks, starts, releases, group_tokens=group_tokens)
        self._next_step += 1
        self.steps += 1
        self._under_way.append([(sequence, sequence.life) for step in steps for sequence in step.chunks])
        return plan

    def for_nobody(self) -> StepPlan:
        """A step without tokens, in its place among the others."""
        plan = StepPlan(self._next_step, ())
        self._next_step += 1
        self._under_way.append([])
        return plan

    def postprocess(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in what a step gave: tokens appended, finished sequences gone, pages published."""
        assert result.step == plan.step
        sampled = dict(zip(result.seqs, result.token_ids, strict=True))
        events: list[Event] = []
        for chunk, (sequence, life) in zip(plan.chunks, self._under_way.popleft(), strict=True):
            if chunk.sample:
                sequence.in_flight -= 1
            if sequence.gone:
                continue  # it ended, or was aborted, while this step ran
            try:
                event = self._take_in(sequence, life, chunk, result, sampled.get(sequence.number))
            except Exception:  # whatever is wrong with one sequence, the others go on
                log.exception("sequence %d of request %s fails", sequence.number, sequence.key)
                event = sequence.failure("internal error; the server's log says more")
            if event is not None:
                events.append(event)
                if isinstance(event, EncodeEvent) or event.finish_reason is not None:
                    self._drop(sequence)
        return events

    def check_integrity(self) -> None:
        """Everybody is in one place, and every page is where its holders say."""
        for group in self._groups:
            group.check_integrity()
        alive = {id(s) for live in self._requests.values() for s in live.choices.values()}
        running = [s for group in self._groups for s in group.running]
        assert len(alive) == self._num_alive
        assert {id(s) for s in running} <= alive
        assert all(id(s) in alive and not s.pages and not s.running for s in self._waiting)

    def _choices(self, key: str) -> list[Sequence]:
        live = self._requests.get(key)
        return [] if live is None else list(live.choices.values())

    def _admit(self, steps: Many[GroupStep], now: float, only: str | None) -> None:
        while self.num_running < self._config.max_running:
            own = (s for s in self._waiting if s.key == only)
            sequence = self._waiting.peek() if only is None else next(own, None)
            if sequence is None or sequence.in_flight:
                return  # preempted a moment ago: its last token is still to come
            place = choose_place(sequence, self._groups, steps, self._config.max_step_tokens)
            if place is None:
                return
            self._waiting.remove(sequence)
            self._waiting.admitted(sequence)
            place.group.admit(sequence, place.pages, place.step)
            self._waiting.charge(sequence, len(place.step.chunks[sequence].token_ids))
            self._requests[sequence.key].begun = True
            if sequence.waited_s is None:
                sequence.waited_s = now - sequence.arrived_s
                sequence.num_cached = min(sequence.num_accepted, sequence.num_prompt)
                self.cached_tokens += sequence.num_cached

    def _take_in(
        self, sequence: Sequence, life: int, chunk: SequenceChunk, result: StepResult, token_id: int | None
    ) -> Event | None:
        """What a step says of one sequence that was in it; what to tell its caller."""
        if sequence.number in result.failed:
            return sequence.failure(result.failed[sequence.number])
        if life == sequence.life:
            self._accept(sequence, chunk, result)
        elif sequence.wants_all_rows:
            return None  # preempted meanwhile: its rows must come from one life, so all of them come again
        if not chunk.sample:
            return None
        if sequence.sampling is None:
            return EncodeEvent(sequence.key, tuple(sequence.pooled))
        if token_id is None:
            return sequence.failure("the ranks gave no token for it")
        self.generated_tokens += 1
        number = sequence.number
        return sequence.take(token_id, result.logprobs.get(number), result.routing.get(number), self._eos_ids)

    def _accept(self, sequence: Sequence, chunk: SequenceChunk, result: StepResult) -> None:
        """The chunk's tokens are in pages, with whatever rows of theirs somebody wants."""
        accepted = chunk.start + len(chunk.token_ids)
        self._groups[sequence.group].accept(sequence, accepted)
        if chunk.start < sequence.num_prompt:
            self.prompt_tokens += min(accepted, sequence.num_prompt) - chunk.start
            if accepted >= sequence.num_prompt:
                self._release_followers(sequence)
        if sequence.wants_all_rows:
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence.number, ())
            sequence.pooled += result.pooled.get(sequence.number, ())

    def _wait_again(self, sequence: Sequence) -> None:
        """Its pages were taken: it waits, with the tokens it has."""
        self._release(sequence)
        self._waiting.push(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """The ranks may forget it, if they were told of it."""
        if sequence.started:
            self._releases.append(sequence.number)
            sequence.started = False

    def _drop(self, sequence: Sequence) -> None:
        """The sequence is gone, wherever it was."""
        sequence.gone = True
        if sequence.running:
            self._groups[sequence.group].remove(sequence)
            self._release(sequence)
        elif sequence.leader is not None and sequence in sequence.leader.followers:
            sequence.leader.followers.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release_followers(sequence)
        self._num_alive -= 1
        choices = self._requests[sequence.key].choices
        del choices[sequence.choice]
        if not choices:
            del self._requests[sequence.key]

    def _release_followers(self, leader: Sequence) -> None:
        """The other choices of a prompt need wait no longer: its pages are there, or will never be."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            self._waiting.push(follower)

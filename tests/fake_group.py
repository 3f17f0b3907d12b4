"""A worker group without a model: the next token is a function of all tokens so far, read from fake pages.

It keeps what each slot of each page holds, as a rank would, so that a scheduler that hands out a page twice,
forgets a token or finds the wrong prefix gives wrong tokens here.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from cluster.crash_bundle import RankReport
from cluster.errors import CanaryFailed, StepFailed
from cluster.messages import (
    LAST_SAMPLED,
    Grammar,
    RankStatus,
    Routing,
    SequenceChunk,
    SequenceStart,
    StepPlan,
    StepResult,
    StepTimes,
    TokenLogprob,
)
from cluster.placement import Placement

VOCABULARY = 50


def next_token(token_ids: list[int], seed: int, index: int) -> int:
    """What the fake model answers; 2 (end of sequence) about once in 50."""
    return hash((tuple(token_ids), seed, index)) % VOCABULARY


@dataclass
class _State:
    start: SequenceStart
    num_generated: int
    pages: list[int] = field(default_factory=list)
    last_sampled: int = LAST_SAMPLED


class FakeGroup:
    def __init__(self, num_pages: int, page_size: int, window: int | None = None, groups: int = 1) -> None:
        self._num_pages = num_pages
        self._page_size = page_size
        self._window = window
        self._groups = range(groups)
        self.lost: Collection[int] = self._groups  # groups that lose their pages in a recovery
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}  # group and slot -> position and token
        self._states: dict[int, _State] = {}
        self.plans: list[StepPlan] = []
        self.computed = 0  # tokens
        self.fail_with: Exception | None = None
        self.fail_sequence: str | None = None  # why the first sequence of each plan fails
        self.tickets: threading.Semaphore | None = None  # each step takes one, and waits for it
        self.fail_at: set[int] = set()  # steps, counted over all epochs, that fail once
        self.hang_at: set[int] = set()  # likewise steps that are not done in time
        self.poison: int | None = None  # a token that no step survives
        self.steps = 0
        self.epoch = 0
        self.prepare_error: Exception | None = None
        self.graph: bool | None = None  # what every step says of graphs
        self.slot_rows: tuple[tuple[int, ...], ...] = ()  # what every step reports, if its plan wants the load
        self.stopped = False
        self.canaries: list[StepPlan] = []
        self.wrong_canaries: set[int] = set()  # counted over all epochs
        self.captured: list[StepPlan] = []  # of this epoch
        self.failing_captures = 0  # so many more
        self.renewed = 0  # recoveries in which no rank was kept
        self.fetched: Placement | None = None
        self.placement = 0  # adopted; plans handed out before still name the one before
        self._placement_used = 0
        self._next_step = 0

    def start(self) -> int:
        return self._num_pages

    def step(self, plan: StepPlan) -> FakeStep:
        return FakeStep(self, plan)

    def compute(self, plan: StepPlan) -> StepResult:
        if plan.canary:
            return self._prove(plan)
        if plan.capture:
            return self._capture(plan)
        if self.tickets is not None:
            self.tickets.acquire()
        if self.fail_with is not None:
            raise self.fail_with
        self.steps += 1
        if self.steps in self.fail_at:
            raise StepFailed("rank 1 died during a step")
        if self.steps in self.hang_at:
            raise TimeoutError
        if any(self.poison in chunk.token_ids for chunk in plan.chunks):
            raise StepFailed("rank 0 died during a step", "died")
        self._in_order(plan)
        self.plans.append(plan)
        for number in plan.releases:
            del self._states[number]
        for start in plan.starts:
            assert start.seq not in self._states
            self._states[start.seq] = _State(start, len(start.token_ids) - start.num_prompt)
        self._check_groups(plan)
        for chunk in plan.chunks:
            self._store(chunk)
        return self._result(plan)

    def recover(self, *, anew: bool = False) -> frozenset[int]:
        """Everything is forgotten, but for the pages of the groups that lose no rank."""
        kept = set() if anew else set(self._groups) - set(self.lost)
        self.epoch += 1
        self.plans, self._states, self._next_step = [], {}, 0
        self.captured = []
        self.renewed += anew
        self._slots = {place: held for place, held in self._slots.items() if place[0] in kept}
        return frozenset(self._groups) - kept

    def fetch(self, placement: Placement) -> None:
        self.fetched = placement

    def adopt(self, placement: Placement) -> None:
        assert placement is self.fetched
        self.placement = placement.number

    def prepare(self, grammar: Grammar) -> None:
        if self.prepare_error is not None:
            raise self.prepare_error

    def ranks(self) -> tuple[RankStatus, ...]:
        return ()

    def reports(self) -> tuple[RankReport, ...]:
        return (RankReport(0, "File x.py, line 1", 1, 0),)

    def stop(self) -> None:
        self.stopped = True

    def _in_order(self, plan: StepPlan) -> None:
        assert plan.step == self._next_step
        assert self._placement_used <= plan.placement <= self.placement
        self._placement_used = plan.placement
        self._next_step += 1

    def _prove(self, plan: StepPlan) -> StepResult:
        self.canaries.append(plan)
        if len(self.canaries) in self.wrong_canaries:
            raise CanaryFailed("a canary found on rank 0: layer 1, experts 2 3")
        self._in_order(plan)
        return StepResult(plan.step, (), (), StepTimes())

    def _capture(self, plan: StepPlan) -> StepResult:
        self._in_order(plan)
        if self.failing_captures:
            self.failing_captures -= 1
            raise StepFailed("rank 0 failed in a step: OutOfMemoryError")
        self.captured.append(plan)
        return StepResult(plan.step, (), (), StepTimes())

    def _check_groups(self, plan: StepPlan) -> None:
        """Chunks come group by group, and with several groups the plan says how many tokens each has."""
        order = [self._states[chunk.seq].start.group for chunk in plan.chunks]
        assert order == sorted(order)
        assert set(order) <= set(self._groups)
        tokens = dict.fromkeys(self._groups, 0)
        for group, chunk in zip(order, plan.chunks, strict=True):
            tokens[group] += len(chunk.token_ids)
        assert plan.group_tokens == (tuple(tokens.values()) if len(tokens) > 1 else ())

    def _store(self, chunk: SequenceChunk) -> None:
        state = self._states[chunk.seq]
        state.pages.extend(chunk.new_pages)
        for position, token in enumerate(chunk.token_ids, chunk.start):
            if token == LAST_SAMPLED:
                token = state.last_sampled
                assert token != LAST_SAMPLED
            if position < chunk.start + chunk.num_stored:
                assert self._slots[self._slot(state, position)] == (position, token), "said to be stored, and is not"
            else:
                self._slots[self._slot(state, position)] = (position, token)
            self.computed += 1

    def _result(self, plan: StepPlan) -> StepResult:
        sampled: dict[int, int] = {}
        logprobs: dict[int, TokenLogprob] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        pooled: dict[int, tuple[tuple[float, ...], ...]] = {}
        routing: dict[int, Routing] = {}
        for chunk in plan.chunks:
            state = self._states[chunk.seq]
            end = chunk.start + len(chunk.token_ids)
            sampling = state.start.sampling
            if sampling is None:
                pooled[chunk.seq] = tuple((float(self._read(state, p)),) for p in range(chunk.start, end))
                continue
            if sampling.prompt_logprobs is not None:
                targets = state.start.token_ids[chunk.start + 1 : min(end + 1, state.start.num_prompt)]
                prompt_logprobs[chunk.seq] = tuple(TokenLogprob(token, -1.0, 1, ()) for token in targets)
            if chunk.sample:
                first = 0 if self._window is None else max(0, end - self._window)
                assert sampling.seed is not None
                token = next_token(
                    [self._read(state, p) for p in range(first, end)], sampling.seed, state.num_generated
                )
                state.num_generated += 1
                state.last_sampled = sampled[chunk.seq] = token
                if sampling.logprobs is not None:
                    logprobs[chunk.seq] = TokenLogprob(token, -0.5, 1, ())
                if sampling.return_routing:
                    routing[chunk.seq] = (((token % 4, 0.75), (4, 0.25)),)
        failed = {plan.chunks[0].seq: self.fail_sequence} if self.fail_sequence else {}
        return StepResult(
            plan.step,
            tuple(sampled),
            tuple(sampled.values()),
            StepTimes(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            failed=failed,
            routing=routing,
            slot_rows=self.slot_rows if plan.report_load else (),
            graph=self.graph,
        )

    def _read(self, state: _State, position: int) -> int:
        stored, token = self._slots[self._slot(state, position)]
        assert stored == position, "somebody else's page"
        return token

    def _slot(self, state: _State, position: int) -> tuple[int, int]:
        page = state.pages[position // self._page_size]
        assert page < self._num_pages
        return state.start.group, page * self._page_size + position % self._page_size


class FakeStep:
    """Computed when its result is asked for: until then the engine plans ahead of it."""

    def __init__(self, group: FakeGroup, plan: StepPlan) -> None:
        self._group = group
        self._plan = plan

    def result(self, timeout: float | None = None) -> StepResult:
        return self._group.compute(self._plan)

"""A worker group without a model: the next token is a function of all tokens so far, read from fake pages.

It keeps what each slot of each page holds, as a rank would, so that a scheduler that hands out a page twice,
forgets a token or finds the wrong prefix gives wrong tokens here.
"""

from __future__ import annotations

import threading

from cluster.messages import RankStatus, StepPlan, StepResult, StepTimes
from cluster.worker_group import PendingStep

VOCABULARY = 50


def next_token(token_ids: list[int], seed: int, index: int) -> int:
    """What the fake model answers; 2 (end of sequence) about once in 25."""
    return hash((tuple(token_ids), seed, index)) % VOCABULARY


class FakeGroup:
    def __init__(self, num_pages: int, page_size: int) -> None:
        self._num_pages = num_pages
        self._page_size = page_size
        self._slots: dict[int, int] = {}  # slot -> token
        self._pages: dict[int, list[int]] = {}
        self._sampling: dict[int, tuple[int, int]] = {}  # seq -> (seed, tokens sampled)
        self.plans: list[StepPlan] = []
        self.fail_with: Exception | None = None
        self.tickets: threading.Semaphore | None = None  # each step takes one, and waits for it
        self.stopped = False

    def start(self) -> int:
        return self._num_pages

    def step(self, plan: StepPlan) -> PendingStep:
        if self.tickets is not None:
            self.tickets.acquire()
        if self.fail_with is not None:
            raise self.fail_with
        assert plan.step == len(self.plans)
        self.plans.append(plan)
        for number in plan.releases:
            del self._pages[number], self._sampling[number]
        for start in plan.starts:
            assert start.seq not in self._pages
            assert start.sampling.seed is not None
            self._pages[start.seq] = []
            self._sampling[start.seq] = (start.sampling.seed, start.num_generated)
        sampled: dict[int, int] = {}
        for chunk in plan.chunks:
            pages = self._pages[chunk.seq]
            pages.extend(chunk.new_pages)
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self._slots[self._slot(pages, position)] = token
        for chunk in plan.chunks:
            if chunk.sample:
                end = chunk.start + len(chunk.token_ids)
                context = [self._slots[self._slot(self._pages[chunk.seq], p)] for p in range(end)]
                seed, index = self._sampling[chunk.seq]
                sampled[chunk.seq] = next_token(context, seed, index)
                self._sampling[chunk.seq] = (seed, index + 1)
        return Done(StepResult(plan.step, tuple(sampled), tuple(sampled.values()), StepTimes()))

    def ranks(self) -> tuple[RankStatus, ...]:
        return ()

    def stop(self) -> None:
        self.stopped = True

    def _slot(self, pages: list[int], position: int) -> int:
        return pages[position // self._page_size] * self._page_size + position % self._page_size


class Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result

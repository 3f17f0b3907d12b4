"""A scheduler and a fake group, stepped by hand, always one step ahead, as the engine drives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import replace

from cluster.config import SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import EncodeEvent, EncodeRequest, Pooling, Request, SamplingParams, StepPlan, TokenEvent
from cluster.scheduler import Scheduler
from tests.fake_group import FakeGroup, next_token

EOS = 2


class Rig:
    def __init__(
        self,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        budget: int = 16,
        max_running: int = 8,
        prefix: bool = True,
        window: int | None = None,
        groups: int = 1,
    ) -> None:
        prefix = prefix and window is None
        self.pools = [PagePool(num_pages, page_size, prefix_caching=prefix, key=b"k") for _ in range(groups)]
        self.scheduler = Scheduler(SchedulerConfig(max_running, budget, 1024), self.pools, (EOS,), window)
        self.group = FakeGroup(num_pages, page_size, window, groups)
        self.now = 0.0
        self.owners: list[str] = []  # of the sequences, by number
        self.under_way: deque[StepPlan] = deque()
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.events: list[TokenEvent | EncodeEvent] = []

    def add(self, key: str, prompt: list[int], max_tokens: int = 8, seed: int = 0, **rest: object) -> None:
        own = {name: rest.pop(name) for name in list(rest) if name in SamplingParams.__slots__}
        sampling = SamplingParams(max_tokens, seed=seed, **own)  # type: ignore[arg-type]
        request = Request(key, tuple(prompt), sampling, **rest)  # type: ignore[arg-type]
        self.scheduler.add(key, request, self.now)
        self.owners += [key] * request.n

    def encode(self, key: str, text: Many[int], pooling: Pooling = "all", priority: int = 0) -> None:
        self.scheduler.add(key, EncodeRequest(key, tuple(text), pooling, priority), self.now)
        self.owners.append(key)

    def plan(self, only: str | None = None) -> StepPlan | None:
        """Hand out the next plan."""
        plan = self.scheduler.schedule(self.now, only)
        self.scheduler.check_integrity()
        if plan is not None:
            self.under_way.append(plan)
        return plan

    def step(self, only: str | None = None) -> StepPlan | None:
        """Hand out the next plan, then take in the result of the one before."""
        plan = self.plan(only)
        if self.under_way and (plan is None or len(self.under_way) == 2):
            self.take_in()
        return plan

    def canary(self) -> None:
        """A step for nobody, in its place."""
        self.under_way.append(replace(self.scheduler.for_nobody(), canary=True))
        if len(self.under_way) == 2:
            self.take_in()

    def take_in(self) -> None:
        plan = self.under_way.popleft()
        for event in self.scheduler.postprocess(plan, self.group.step(plan).result()):
            self.events.append(event)
            if isinstance(event, TokenEvent):
                choice = (event.request_id, event.choice)
                assert choice not in self.reasons, "an event after the last one"
                self.answers.setdefault(choice, []).extend(event.token_ids)
                if event.finish_reason is not None:
                    self.reasons[choice] = event.finish_reason
        self.scheduler.check_integrity()

    def lose(self, lost: Collection[int], steps_done: int = 0) -> None:
        """Ranks of some groups die; of the steps under way the others have done so many, and nobody says so."""
        for plan in list(self.under_way)[:steps_done]:
            self.group.step(plan).result()
        self.under_way.clear()
        self.group.lost = lost
        self.group.recover()
        self.scheduler.start_over(lost)
        self.scheduler.check_integrity()

    @property
    def pages_held(self) -> int:
        return sum(pool.num_held for pool in self.pools)

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                assert self.pages_held == 0
                return
            self.step()
        raise AssertionError("the scheduler does not come to an end")

    def of(self, key: str, choice: int = 0) -> list[int]:
        return self.answers[key, choice]


def alone(prompt: list[int], max_tokens: int = 8, seed: int = 0, window: int | None = None) -> list[int]:
    """The answer to a request that never met another one."""
    tokens = list(prompt)
    for index in range(max_tokens):
        tokens.append(next_token(tokens if window is None else tokens[-window:], seed, index))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]

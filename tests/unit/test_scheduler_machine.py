"""Anything may happen in any order: hypothesis drives the scheduler, and everyone gets what they get alone."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config import SchedulerConfig
from cluster.messages import EncodeEvent, TokenEvent
from tests.unit.scheduler_rig import Rig, alone

PROMPTS = st.lists(st.integers(3, 5), min_size=1, max_size=20)  # few tokens: many shared prefixes


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(12, 40),
        budget=st.integers(1, 24),
        max_running=st.integers(1, 6),
        prefix=st.booleans(),
        window=st.sampled_from([None, None, 6]),
        groups=st.integers(1, 3),
    )
    def begin(
        self, num_pages: int, budget: int, max_running: int, prefix: bool, window: int | None, groups: int
    ) -> None:
        self.rig = Rig(
            num_pages=num_pages, budget=budget, max_running=max_running, prefix=prefix, window=window, groups=groups
        )
        self.groups = groups
        self.window = window
        self.wanted: dict[tuple[str, int], list[int]] = {}
        self.judged: dict[str, list[int]] = {}
        self.encoded: dict[str, list[int]] = {}
        self.gone: set[tuple[str, int]] = set()
        self.clock = 0.0
        self.count = 0

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 16),
        n=st.sampled_from([1, 1, 2, 3]),
        user=st.sampled_from("ab"),
        priority=st.integers(0, 1),
        patience=st.sampled_from([None, 2.0]),
        judged=st.booleans(),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        n: int,
        user: str,
        priority: int,
        patience: float | None,
        judged: bool,
    ) -> None:
        key = self._key()
        self.rig.add(
            key, prompt, max_tokens, self.count, n=n, user=user, priority=priority,
            deadline_s=None if patience is None else self.clock + patience,
            prompt_logprobs=0 if judged else None,
        )  # fmt: skip
        if judged:
            self.judged[key] = prompt
        for choice in range(n):
            self.wanted[key, choice] = alone(prompt, max_tokens, self.count + choice, self.window)

    @rule(text=PROMPTS)
    def encode(self, text: list[int]) -> None:
        key = self._key()
        self.encoded[key] = text
        self.rig.encode(key, text)

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.step()

    @rule()
    def canary(self) -> None:
        self.rig.canary()

    @precondition(lambda self: self.rig.scheduler.keys)
    @rule(data=st.data(), steps=st.integers(1, 5))
    def step_for_one(self, data: st.DataObject, steps: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.rig.scheduler.keys)))
        for _ in range(steps):
            plan = self.rig.step(key)
            assert plan is None or {self.rig.owners[chunk.seq] for chunk in plan.chunks} == {key}

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        key, choice = data.draw(st.sampled_from(sorted(self.wanted)))
        self.rig.scheduler.abort(key, None if whole else choice)
        self.gone |= {c for c in self.wanted if c[0] == key and (whole or c[1] == choice)}

    @rule(data=st.data(), steps_done=st.integers(0, 2))
    def lose(self, data: st.DataObject, steps_done: int) -> None:
        lost = data.draw(st.sets(st.integers(0, self.groups - 1)))
        self.rig.lose(lost, steps_done)

    @rule(max_running=st.integers(1, 6), budget=st.integers(1, 24))
    def limit(self, max_running: int, budget: int) -> None:
        self.rig.scheduler.limit(SchedulerConfig(max_running, budget, 1024))

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.clock += seconds
        for event in self.rig.scheduler.expire(self.clock):
            assert isinstance(event, TokenEvent)
            assert event.error == "deadline"
            assert (event.request_id, event.choice) not in self.rig.answers
            self.gone.add((event.request_id, event.choice))

    @invariant()
    def pages_are_whole(self) -> None:
        if hasattr(self, "rig"):
            self.rig.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.run()
        for choice, tokens in self.wanted.items():
            got = self.rig.answers.get(choice, [])
            assert got == tokens[: len(got)], choice
            assert choice in self.gone or got == tokens, choice
        first: dict[str, TokenEvent] = {}
        for event in self.rig.events:
            if isinstance(event, TokenEvent) and event.choice == 0:
                first.setdefault(event.request_id, event)
        for key, event in first.items():
            judged = None if event.prompt_logprobs is None else [p and p.token_id for p in event.prompt_logprobs]
            assert judged == ([None, *self.judged[key][1:]] if key in self.judged else None), key
        rows = {e.request_id: e.rows for e in self.rig.events if isinstance(e, EncodeEvent)}
        assert rows == {key: tuple((float(t),) for t in text) for key, text in self.encoded.items()}

    def _key(self) -> str:
        self.count += 1
        return f"r{self.count}"


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestScheduler = SchedulerMachine.TestCase

from __future__ import annotations

import random

import pytest

from cluster.config import SchedulerConfig
from cluster.kv_pool import PagePool
from cluster.messages import SamplingParams, StepPlan
from cluster.scheduler import Scheduler
from tests.fake_group import FakeGroup, next_token

EOS = 2


class Rig:
    """A scheduler and a fake group, stepped by hand."""

    def __init__(
        self, *, num_pages: int = 64, page_size: int = 4, budget: int = 16, max_running: int = 8, prefix: bool = True
    ) -> None:
        self.pool = PagePool(num_pages, page_size, prefix_caching=prefix, key=b"k")
        self.scheduler = Scheduler(SchedulerConfig(max_running, budget, 1024), self.pool, (EOS,))
        self.group = FakeGroup(num_pages, page_size)
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, request_id: str, prompt: list[int], max_tokens: int = 8, seed: int = 0) -> None:
        self.answers[request_id] = []
        self.scheduler.add(request_id, tuple(prompt), SamplingParams(max_tokens, seed=seed))

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            for event in self.scheduler.postprocess(plan, self.group.step(plan).result()):
                assert event.request_id not in self.reasons, "an event after the last one"
                self.answers[event.request_id] += event.token_ids
                if event.finish_reason is not None:
                    self.reasons[event.request_id] = event.finish_reason
            self.scheduler.check_integrity()
        return plan

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            if self.step() is None:
                return
        raise AssertionError("the scheduler does not come to an end")


def alone(prompt: list[int], max_tokens: int = 8, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for index in range(max_tokens):
        tokens.append(next_token(tokens, seed, index))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def test_one_request() -> None:
    rig = Rig()
    rig.add("a", [5, 6, 7])
    rig.run()
    assert rig.answers["a"] == alone([5, 6, 7])
    assert rig.pool.num_held == 0


def test_a_long_prompt_is_chunked_and_decodes_go_on_beside_it() -> None:
    rig = Rig(budget=8)
    rig.add("short", [9], max_tokens=20, seed=3)
    rig.step()
    rig.add("long", list(range(3, 33)))
    plan = rig.step()
    assert plan is not None
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 7]
    rig.run()
    assert rig.answers == {"short": alone([9], 20, 3), "long": alone(list(range(3, 33)))}


def test_the_token_budget_holds() -> None:
    rig = Rig(budget=5)
    for number in range(8):
        rig.add(str(number), list(range(3, 9)), seed=number)
    while (plan := rig.step()) is not None:
        assert plan.num_tokens <= 5
    assert rig.answers == {str(n): alone(list(range(3, 9)), seed=n) for n in range(8)}


def test_max_running_holds() -> None:
    rig = Rig(max_running=2)
    for number in range(5):
        rig.add(str(number), [number + 3])
    while rig.step() is not None:
        assert rig.scheduler.num_running <= 2
    assert len(rig.reasons) == 5


def test_preemption_gives_the_same_tokens() -> None:
    rig = Rig(num_pages=8, budget=32)
    prompts = {str(n): [n + 3] * 6 for n in range(4)}
    for request_id, prompt in prompts.items():
        rig.add(request_id, prompt, max_tokens=16)
    rig.run()
    assert rig.scheduler.preemptions > 0
    assert rig.answers == {request_id: alone(prompt, 16) for request_id, prompt in prompts.items()}


def test_a_cached_prefix_is_not_computed_again() -> None:
    rig = Rig()
    prompt = list(range(3, 20))
    rig.add("cold", prompt)
    rig.run()
    before = rig.scheduler.prompt_tokens
    rig.add("warm", prompt)
    plan = rig.step()
    assert plan is not None
    assert plan.chunks[0].start == 16
    assert rig.scheduler.prompt_tokens - before == 1
    rig.run()
    assert rig.answers["warm"] == rig.answers["cold"] == alone(prompt)


def test_an_aborted_request_gives_its_pages_back_and_no_event() -> None:
    rig = Rig(prefix=False)
    rig.add("a", list(range(3, 30)), max_tokens=50)
    rig.add("b", [4])
    rig.step()
    assert rig.scheduler.abort("a")
    assert not rig.scheduler.abort("a")
    tokens = list(rig.answers["a"])
    rig.run()
    assert rig.answers["a"] == tokens
    assert rig.answers["b"] == alone([4])
    assert rig.pool.num_held == 0


def test_stop_token_ids_end_an_answer_and_ignore_eos_does_not() -> None:
    rig = Rig()
    tokens = alone([8], 30)
    rig.scheduler.add("stop", (8,), SamplingParams(30, seed=0, stop_token_ids=(tokens[2],)))
    rig.answers["stop"] = []
    rig.run()
    assert rig.answers["stop"] == tokens[: tokens.index(tokens[2]) + 1]
    assert rig.reasons["stop"] == "stop"

    rig.scheduler.add("on", (8,), SamplingParams(200, seed=0, ignore_eos=True))
    rig.answers["on"] = []
    rig.run()
    assert len(rig.answers["on"]) == 200
    assert EOS in rig.answers["on"]
    assert rig.reasons["on"] == "length"


@pytest.mark.parametrize("seed", range(8))
def test_random_histories_give_everyone_what_they_get_alone(seed: int) -> None:
    chance = random.Random(seed)
    rig = Rig(num_pages=chance.randint(12, 40), budget=chance.randint(1, 20), max_running=chance.randint(1, 6))
    wanted: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for number in range(60):
        prompt = [chance.randint(3, 5) for _ in range(chance.randint(1, 24))]  # few tokens: many shared prefixes
        max_tokens = chance.randint(1, 20)
        rig.add(str(number), prompt, max_tokens, seed=number)
        wanted[str(number)] = alone(prompt, max_tokens, number)
        for _ in range(chance.randint(0, 4)):
            rig.step()
        if chance.random() < 0.1:
            victim = str(chance.randint(0, number))
            if rig.scheduler.abort(victim):
                aborted.add(victim)
            rig.scheduler.check_integrity()
    rig.run()
    for request_id, tokens in wanted.items():
        got = rig.answers[request_id]
        assert got == tokens[: len(got)], f"seed {seed}, request {request_id}"
        assert request_id in aborted or got == tokens, f"seed {seed}, request {request_id}"
    assert rig.pool.num_held == 0

"""The engine's thread over a fake group: what it tells its observer, and what it does when ranks fail."""

from __future__ import annotations

import queue
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic, sleep

import pytest

from cluster.commands import Add, Died, Move
from cluster.config import ParallelConfig, SchedulerConfig
from cluster.engine_loop import EngineLoop
from cluster.expert_load import ExpertLoad
from cluster.graph_ladder import GraphLadder, graph_exchange
from cluster.kv_pool import PagePool
from cluster.messages import EngineStats, Request, SamplingParams, StepPlan, TokenEvent
from cluster.placement import even_placement
from cluster.scheduler import Event, Scheduler
from cluster.suspects import CULPRIT
from tests.fake_group import FakeGroup, FakeStep, next_token
from tests.notes import Notes

WAIT_S = 10
POISON = 99  # no token that is ever sampled


class Desk:
    """Who asks the loop for tokens, and reads its answers."""

    def __init__(self, group: FakeGroup, parallel: ParallelConfig, graphs: Sequence[int] = ()) -> None:
        self.group = group
        self.load = ExpertLoad(even_placement(1, 4, parallel.ranks), 0.0)
        self.notes = Notes()
        self.pool = PagePool(64, 4, prefix_caching=True, key=b"k")
        self.scheduler = Scheduler(SchedulerConfig(8, 32, 8), [self.pool], (2,))
        self._events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
        self._tokens: dict[str, list[int]] = {}
        self._ends: dict[str, TokenEvent] = {}
        self.loop = EngineLoop(
            self.scheduler,
            group,
            parallel,
            self.load,
            lambda events: self._events.put(list(events)),
            lambda: EngineStats(self.scheduler.num_running, 0, 64, self.pool.num_held, self.scheduler.steps, 0, 0, 0),
            self.notes,
            GraphLadder(graphs, graph_exchange(parallel)),
        )
        self.loop.start()

    def ask(self, key: str, prompt: tuple[int, ...] = (5, 6), max_tokens: int = 6) -> None:
        self.loop.put(Add(key, Request(key, prompt, SamplingParams(max_tokens, seed=0, ignore_eos=True))))

    def answer(self, key: str) -> tuple[list[int], TokenEvent]:
        """The tokens of a request and its last event."""
        while key not in self._ends:
            for event in self._events.get(timeout=WAIT_S):
                assert isinstance(event, TokenEvent)
                self._tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if event.finish_reason is not None:
                    self._ends[event.request_id] = event
        return self._tokens.get(key, []), self._ends[key]

    def end(self) -> None:
        self.loop.put(None)
        self.loop.join(WAIT_S)


@contextmanager
def desk(
    group: FakeGroup | None = None, parallel: ParallelConfig | None = None, graphs: Sequence[int] = ()
) -> Iterator[Desk]:
    made = Desk(group or FakeGroup(64, 4), parallel or ParallelConfig(), graphs)
    try:
        yield made
    finally:
        made.end()
        assert made.pool.num_held == 0


def alone(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for index in range(count):
        tokens.append(next_token(tokens, 0, index))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(5))
def test_a_request_that_kills_its_ranks_fails_alone(seed: int) -> None:
    """Beside others, some already running, some not yet; its poison sits anywhere in its prompt."""
    chance = random.Random(seed)
    group = FakeGroup(64, 4)
    group.poison = POISON
    with desk(group) as asked:
        prompts = {f"good{n}": tuple(chance.choices(range(3, 50), k=chance.randint(1, 12))) for n in range(7)}
        bad = [*chance.choices(range(3, 50), k=40)]
        bad[chance.randrange(40)] = POISON
        for number, (key, prompt) in enumerate(prompts.items()):
            if number == 4:
                asked.ask("bad", tuple(bad))
            asked.ask(key, prompt, max_tokens=12)
        tokens, end = asked.answer("bad")
        assert (tokens, end.finish_reason, end.error) == ([], "error", CULPRIT)
        for key, prompt in prompts.items():
            assert asked.answer(key)[0] == alone(prompt, 12), f"seed {seed}"
        assert asked.loop.failure is None
        assert asked.notes.failures == ["died"] * 3, "three crashes, not one more"


def test_a_request_alone_on_the_server_is_given_three_tries_too() -> None:
    group = FakeGroup(64, 4)
    group.poison = POISON
    with desk(group) as asked:
        asked.ask("bad", (5, POISON))
        assert asked.answer("bad")[1].error == CULPRIT
        asked.ask("good")
        assert asked.answer("good")[0] == alone((5, 6), 6)
        assert asked.notes.failures == ["died"] * 3


def test_two_that_crash_one_after_the_other_without_a_step_between_are_the_ranks_fault() -> None:
    group = FakeGroup(64, 4)
    group.fail_at = set(range(1, 100))
    with desk(group) as asked:
        asked.ask("first")
        assert asked.answer("first")[1].error == CULPRIT
        asked.ask("second", (7, 8))
        assert "recoveries in a row" in str(asked.answer("second")[1].error)
        assert asked.loop.failure is not None


def test_a_loop_that_cannot_go_on_says_why_even_if_the_error_says_nothing() -> None:
    group = FakeGroup(64, 4)
    group.fail_with = AssertionError()
    with desk(group) as asked:
        asked.ask("first")
        assert asked.answer("first")[1].error == "AssertionError"
        assert asked.loop.failure == "AssertionError"


def test_a_step_that_is_not_done_in_time_is_a_failure_of_its_own_kind() -> None:
    group = FakeGroup(64, 4)
    group.hang_at = {2}
    with desk(group) as asked:
        asked.ask("a")
        assert asked.answer("a")[0] == alone((5, 6), 6)
        assert asked.notes.failures == ["deadline"]


def test_what_all_ranks_had_finished_before_a_death_is_kept() -> None:
    group = FakeGroup(64, 4)
    with desk(group) as asked:
        step = group.step

        def step_and_die(plan: StepPlan) -> FakeStep:
            if group.epoch == 0 and plan.chunks and plan.chunks[0].start == 2:
                asked.loop.put(Died("rank 0 died", 0))  # read when the first step has been taken in
            return step(plan)

        group.step = step_and_die  # type: ignore[method-assign]
        asked.ask("a", max_tokens=3)
        assert asked.answer("a")[0] == alone((5, 6), 3)
        assert asked.notes.failures == ["died"]
        assert group.computed == 2 + 1 + 4, "the second step was taken in too: all but the last token computed again"


def test_the_first_steps_are_canaries_and_a_slot_without_rows_gets_another() -> None:
    group = FakeGroup(64, 4)
    with desk(group) as asked:
        asked.loop.wait_until_proved()
        assert asked.loop.doubts() == []
        assert [plan.exchange for plan in group.canaries] == ["none"]
        asked.ask("a")
        assert asked.answer("a")[0] == alone((5, 6), 6)
        assert len(group.canaries) == 1, "not for every request"
    assert asked.notes.canaries == [True]
    assert {plan.step for plan in group.canaries} | {plan.step for plan in group.plans} == set(range(7))


def test_with_two_exchanges_each_gets_a_canary() -> None:
    group = FakeGroup(64, 4)
    with desk(group, ParallelConfig(tensor=2)) as asked:
        asked.loop.wait_until_proved()
        assert {plan.exchange for plan in group.canaries} == {"all_reduce", "all_to_all"}


def test_a_wrong_canary_replaces_every_rank_and_loses_nothing() -> None:
    group = FakeGroup(64, 4)
    group.wrong_canaries = {1}
    with desk(group) as asked:
        asked.ask("a")
        assert asked.answer("a")[0] == alone((5, 6), 6)
        assert (group.epoch, group.renewed) == (1, 1)
        assert asked.notes.canaries == [False, True]


def test_canaries_that_stay_wrong_end_the_engine() -> None:
    group = FakeGroup(64, 4)
    group.wrong_canaries = set(range(1, 100))
    with desk(group) as asked:
        asked.loop.wait_until_proved()
        eventually(lambda: asked.loop.failure is not None)
        assert "a canary found" in str(asked.loop.failure)


def test_deaths_between_requests_do_not_add_up() -> None:
    group = FakeGroup(64, 4)
    with desk(group) as asked:
        for _ in range(10):
            asked.loop.wait_until_proved()
            proved = len(asked.notes.canaries)
            asked.loop.put(Died("rank 0 died", group.epoch))
            eventually(lambda: len(asked.notes.canaries) > proved)  # noqa: B023
        assert asked.loop.failure is None
        assert group.epoch == 10


def test_experts_move_between_two_steps_unless_the_ranks_were_formed_anew() -> None:
    group = FakeGroup(64, 4)
    with desk(group) as asked:
        first = asked.load.placement
        wanted = replace(first, number=1, expert_of=(tuple(reversed(first.expert_of[0])),))
        moves: list[Future[bool]] = [Future(), Future()]
        group.fetch(wanted)
        step = group.step

        def step_and_move(plan: StepPlan) -> FakeStep:
            if plan.chunks and plan.chunks[0].start == 10:
                asked.loop.put(Move(wanted, 4, 1, moves[0]))  # of an epoch that is not
                asked.loop.put(Move(wanted, 4, 0, moves[1]))
            return step(plan)

        group.step = step_and_move  # type: ignore[method-assign]
        asked.ask("a", max_tokens=40)
        assert [moved.result(WAIT_S) for moved in moves] == [False, True]
        assert asked.answer("a")[0] == alone((5, 6), 40)
        assert asked.load.placement is wanted
        assert asked.notes.moves == [4]
        assert {plan.placement for plan in group.plans} == {0, 1}
        assert group.canaries[-1].placement == 1, "what moved is proved anew"


def eventually(holds: object) -> None:
    assert callable(holds)
    deadline = monotonic() + WAIT_S
    while not holds():
        assert monotonic() < deadline, "it did not come true"
        sleep(0.001)


def test_every_step_is_reported_with_its_tokens_and_its_time() -> None:
    group = FakeGroup(64, 4)
    group.graph = True
    with desk(group) as asked:
        asked.ask("a", (5, 6, 7), max_tokens=6)
        assert asked.answer("a")[0] == alone((5, 6, 7), 6)
    first, *rest = asked.notes.steps
    assert (first.prompt_tokens, first.decode_tokens, first.sequences) == (3, 0, 1)
    assert {(record.prompt_tokens, record.decode_tokens) for record in rest} == {(0, 1)}
    assert [record.stats.steps for record in asked.notes.steps] == sorted(r.stats.steps for r in asked.notes.steps)
    for record in asked.notes.steps:
        assert record.graph is True
        assert min(record.schedule_s, record.step_s, record.postprocess_s, record.publish_s) >= 0
    assert asked.notes.failures == []


def test_a_failed_step_and_a_death_are_told_apart_and_paid_for_with_one_pause_each() -> None:
    group = FakeGroup(64, 4)
    group.fail_at = {3}
    with desk(group) as asked:
        asked.ask("a")
        assert asked.answer("a")[0] == alone((5, 6), 6)
        assert asked.notes.failures == ["step_failed"]
        asked.loop.put(Died("rank 0 died", group.epoch))
        eventually(lambda: len(asked.notes.pauses) == 2)
        assert asked.notes.failures == ["step_failed", "died"]
        assert min(asked.notes.pauses) >= 0


def test_graphs_are_captured_before_anybody_is_let_in_and_steps_name_them() -> None:
    with desk(parallel=ParallelConfig(tensor=2), graphs=(1, 2, 4)) as made:
        made.loop.wait_until_proved()
        assert [(plan.capture, plan.exchange) for plan in made.group.captured] == [
            (rows, "all_reduce") for rows in (4, 2, 1)
        ]
        made.ask("a", max_tokens=4)
        assert made.answer("a")[0] == alone((5, 6), 4)
        prompt, *decodes = made.group.plans
        assert prompt.graph == 0
        assert {(plan.graph, plan.exchange) for plan in decodes if plan.chunks} == {(1, "all_reduce")}


def test_after_a_recovery_steps_are_computed_and_graphs_captured_anew_when_idle() -> None:
    group = FakeGroup(64, 4)
    group.fail_at = {3}
    with desk(group, graphs=(2, 1)) as made:
        made.loop.wait_until_proved()
        made.ask("a", max_tokens=8)
        assert made.answer("a")[0] == alone((5, 6), 8)
        assert {plan.graph for plan in group.plans} == {0}, "of the new epoch: nothing was captured, somebody waited"
        eventually(lambda: [plan.capture for plan in group.captured] == [2, 1])
        made.ask("b", max_tokens=3)
        made.answer("b")
        assert {plan.graph for plan in group.plans if len(plan.chunks) == 1 and not plan.starts} >= {1}


def test_when_experts_have_moved_graphs_are_captured_anew() -> None:
    with desk(graphs=(1,)) as made:
        made.loop.wait_until_proved()
        moved = replace(made.load.placement, number=1)
        made.group.fetch(moved)
        told: Future[bool] = Future()
        made.loop.put(Move(moved, 1, 0, told))
        assert told.result(WAIT_S)
        eventually(lambda: [plan.placement for plan in made.group.captured] == [0, 1])


def test_captures_that_fail_are_given_up_and_requests_served_all_the_same() -> None:
    group = FakeGroup(64, 4)
    group.failing_captures = 2
    with desk(group, graphs=(2, 1)) as made:
        made.loop.wait_until_proved()
        assert group.epoch == 2
        made.ask("a")
        assert made.answer("a")[0] == alone((5, 6), 6)
        assert group.captured == []


def test_a_capture_that_fails_once_is_tried_again() -> None:
    group = FakeGroup(64, 4)
    group.failing_captures = 1
    with desk(group, graphs=(2, 1)) as made:
        made.loop.wait_until_proved()
        assert [plan.capture for plan in group.captured] == [2, 1]


def test_a_server_that_is_never_idle_captures_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.graph_ladder.BUSY_EVERY_S", 0.0)
    group = FakeGroup(64, 4)
    group.fail_at = {3}
    with desk(group, graphs=(4, 2)) as made:
        made.loop.wait_until_proved()
        made.ask("a", max_tokens=60)
        assert made.answer("a")[0] == alone((5, 6), 60)
        assert [plan.capture for plan in group.captured] == [4, 2]
        steps = [plan.step for plan in group.plans]
        assert steps[0] < group.captured[-1].step < steps[-1], "while it was answered"
        assert group.plans[-1].graph == 2

"""Steps on their way through a rank, with a worker that only writes down what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from cluster.errors import StepFailed
from cluster.messages import StepPlan, StepResult, StepTimes
from cluster.step_line import StepLine

WAIT_S = 10.0  # for what must happen


@dataclass
class Output:
    plan: StepPlan

    def result(self) -> StepResult:
        return StepResult(self.plan.step, (), (), StepTimes())


@dataclass
class Scribe:
    """A worker whose computing of a step can be held up, and fail."""

    next_step: int = 0
    log: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)  # that have computed
    prepared: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # one more with each
    computing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    tickets: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # each step takes one
    fails_at: int = -1
    failure: BaseException | None = None  # how; None: as workers say it
    unprepared: int = -1

    def prepare(self, plan: StepPlan) -> StepPlan:
        if plan.step != self.next_step or plan.step == self.unprepared:
            raise StepFailed(f"step {plan.step} is not {self.next_step}")
        self.log.append(f"prepare {plan.step}")
        self.next_step += 1
        self.prepared.release()
        return plan

    def compute(self, plan: StepPlan) -> Output:
        self.threads.add(threading.get_ident())
        self.log.append(f"compute {plan.step}")
        self.computing.release()
        assert self.tickets.acquire(timeout=WAIT_S)
        if plan.step == self.fails_at:
            raise self.failure or StepFailed(f"step {plan.step} failed")
        self.log.append(f"computed {plan.step}")
        return Output(plan)

    def join(self, leave: threading.Event) -> None:
        self.next_step = 0
        self.log.append("join")


class Rig:
    """Two callers, as an actor has."""

    def __init__(self) -> None:
        self.worker = Scribe()
        self.line = StepLine(self.worker)
        self.callers = ThreadPoolExecutor(2)
        self.line.form(self.worker.join, epoch=0)

    def step(self, number: int, epoch: int = 0) -> Future[StepResult]:
        return self.callers.submit(self.line.step, StepPlan(number, ()), epoch)

    def under_way(self, *numbers: int) -> list[Future[StepResult]]:
        """Steps that are prepared, the first of them computing."""
        steps = [self.step(number) for number in numbers]
        assert all(self.worker.prepared.acquire(timeout=WAIT_S) for _ in numbers)
        assert self.worker.computing.acquire(timeout=WAIT_S)
        return steps

    def go_on(self, steps: int = 1) -> None:
        self.worker.tickets.release(steps)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.go_on(100)
    rig.callers.shutdown()
    rig.line.stop()


def test_the_next_step_is_prepared_while_one_computes(rig: Rig) -> None:
    first, second = rig.under_way(0, 1)
    assert "prepare 1" in rig.worker.log
    assert "computed 0" not in rig.worker.log
    rig.go_on(2)
    assert [step.result(WAIT_S).step for step in (first, second)] == [0, 1]
    assert rig.worker.log[-3:] == ["computed 0", "compute 1", "computed 1"]


def test_one_thread_computes_whoever_brings_the_steps(rig: Rig) -> None:
    rig.go_on(6)
    for number in range(6):
        assert rig.step(number).result(WAIT_S).step == number
    assert len(rig.worker.threads) == 1
    assert threading.get_ident() not in rig.worker.threads


def test_steps_that_come_in_the_wrong_order_are_computed_in_the_right_one(rig: Rig) -> None:
    second = rig.step(1)
    assert not rig.worker.prepared.acquire(timeout=0.02)
    rig.go_on(2)
    assert rig.step(0).result(WAIT_S).step == 0
    assert second.result(WAIT_S).step == 1
    for what in ("prepare", "computed"):
        assert [line for line in rig.worker.log if line.split()[0] == what] == [f"{what} 0", f"{what} 1"]


def test_a_step_whose_predecessor_never_comes_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.step_line.TURN_S", 0.01)
    with pytest.raises(StepFailed, match="step 1 is not 0"):
        rig.step(1).result(WAIT_S)
    with pytest.raises(StepFailed, match="a step before this one failed"):
        rig.step(0).result(WAIT_S)


def test_behind_a_step_that_fails_nothing_is_computed(rig: Rig) -> None:
    rig.worker.fails_at = 0
    first, second = rig.under_way(0, 1)
    rig.go_on()
    with pytest.raises(StepFailed, match="step 0 failed"):
        first.result(WAIT_S)
    with pytest.raises(StepFailed, match="a step before this one failed"):
        second.result(WAIT_S)
    assert "compute 1" not in rig.worker.log


class Panic(BaseException):
    """What a library that is not written in Python may raise."""


def test_what_no_caller_expects_is_a_failed_step(rig: Rig) -> None:
    """Else it would end whoever waits: the engine's thread, or an actor, as if that were to blame."""
    rig.worker.fails_at, rig.worker.failure = 0, Panic("index out of bounds")
    rig.go_on()
    with pytest.raises(StepFailed, match="Panic: index out of bounds"):
        rig.step(0).result(WAIT_S)
    with pytest.raises(StepFailed, match="a step before this one failed"):
        rig.step(1).result(WAIT_S)


def test_a_step_that_cannot_be_prepared_takes_nothing_from_the_one_that_computes(rig: Rig) -> None:
    rig.worker.unprepared = 1
    (first,) = rig.under_way(0)
    with pytest.raises(StepFailed, match="step 1 is not 1"):
        rig.step(1).result(WAIT_S)
    rig.go_on()
    assert first.result(WAIT_S).step == 0


def test_who_waits_for_a_step_that_fails_is_sent_away(rig: Rig) -> None:
    rig.worker.unprepared = 0
    second = rig.step(1)
    with pytest.raises(StepFailed, match="step 0 is not 0"):
        rig.step(0).result(WAIT_S)
    with pytest.raises(StepFailed, match="a step before this one failed"):
        second.result(WAIT_S)


def test_a_closed_line_is_empty_when_what_computes_has_come_back(rig: Rig) -> None:
    first, second = rig.under_way(0, 1)
    rig.line.close(0)
    empty = threading.Thread(target=rig.line.wait_until_empty)
    empty.start()
    empty.join(0.02)
    assert empty.is_alive(), "a step still computes"
    rig.go_on()
    empty.join(WAIT_S)
    assert not empty.is_alive()
    assert first.result(WAIT_S).step == 0
    with pytest.raises(StepFailed, match="the group was aborted"):
        second.result(WAIT_S)
    with pytest.raises(StepFailed, match="the group was aborted"):
        rig.step(2).result(WAIT_S)
    assert rig.worker.log[-1] == "computed 0", "and nothing after it"


def test_who_waits_for_its_turn_is_sent_away_when_the_line_closes(rig: Rig) -> None:
    waits = rig.step(1)
    rig.line.close(0)
    with pytest.raises(StepFailed, match="the group was aborted"):
        waits.result(WAIT_S)
    rig.line.wait_until_empty()


def test_a_late_step_of_an_earlier_epoch_does_no_harm(rig: Rig) -> None:
    rig.line.form(rig.worker.join, epoch=1)
    for number in (0, 1):  # also one that would otherwise wait for its turn
        with pytest.raises(StepFailed, match="the group was aborted"):
            rig.step(number, epoch=0).result(WAIT_S)
    rig.go_on()
    assert rig.step(0, epoch=1).result(WAIT_S).step == 0
    assert rig.worker.log == ["join", "join", "prepare 0", "compute 0", "computed 0"]


def test_a_group_is_formed_when_the_last_one_s_steps_have_ended(rig: Rig) -> None:
    first, second = rig.under_way(0, 1)
    forming = threading.Thread(target=rig.line.form, args=(rig.worker.join, 1))
    forming.start()
    forming.join(0.02)
    assert forming.is_alive()
    rig.go_on()
    forming.join(WAIT_S)
    assert first.result(WAIT_S).step == 0
    assert isinstance(second.exception(WAIT_S), StepFailed)
    assert rig.worker.log[-2:] == ["computed 0", "join"]


def test_a_group_that_is_given_up_while_it_forms_takes_no_steps(rig: Rig) -> None:
    def join(leave: threading.Event) -> None:
        rig.worker.join(leave)
        rig.line.close(1)
        assert leave.is_set(), "whoever waits for others to join is told"

    rig.line.form(join, epoch=1)
    with pytest.raises(StepFailed, match="the group was aborted"):
        rig.step(0, epoch=1).result(WAIT_S)


def test_a_group_that_was_given_up_before_it_formed_never_forms(rig: Rig) -> None:
    """Both calls are on their way at once. It would wait for others who have left already."""
    rig.line.close(1)
    with pytest.raises(StepFailed, match="the group was aborted"):
        rig.line.form(rig.worker.join, epoch=1)
    rig.line.wait_until_empty()
    assert rig.worker.log == ["join"], "of the epoch before"
    rig.line.form(rig.worker.join, epoch=2)
    rig.go_on()
    assert rig.step(0, epoch=2).result(WAIT_S).step == 0


def test_what_forming_raises_is_raised_and_nothing_is_taken(rig: Rig) -> None:
    def join(leave: threading.Event) -> None:
        raise ConnectionError("nobody came")

    with pytest.raises(ConnectionError, match="nobody came"):
        rig.line.form(join, epoch=1)
    with pytest.raises(StepFailed, match="the group was aborted"):
        rig.step(0, epoch=1).result(WAIT_S)

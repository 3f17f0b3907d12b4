"""One rank as its actor's threads see it: steps, and who calls it off."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig, KVConfig
from cluster.errors import StepFailed
from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.placement import even_placement
from cluster.rank_actor import RankActor
from cluster.step_line import CALLERS
from cluster.step_output import StepOutput
from cluster.worker import Prepared
from tests.tiny import write_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
PROMPT = (5, 9, 17, 30, 8)
WAIT_S = 10.0

FIRST = StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (SequenceStart(0, PROMPT, 5, GREEDY),))
SECOND = StepPlan(1, (SequenceChunk(0, (LAST_SAMPLED,), 5, (), True),))


@pytest.fixture
def actor(tmp_path: Path) -> RankActor:
    made = RankActor(EngineConfig(str(write_checkpoint(tmp_path / "tiny")), kv=KVConfig(page_size=4)))
    made.load(0, even_placement(2, 4, 1))
    made.join(None, "127.0.0.1", 8, epoch=0)
    return made


def test_after_an_abort_nothing_runs_until_there_is_a_new_group(actor: RankActor) -> None:
    first, second = actor.step(FIRST, 0), actor.step(SECOND, 0)
    actor.abort(0)
    with pytest.raises(StepFailed, match="the group was aborted"):
        actor.step(StepPlan(2, ()), 0)
    actor.join(None, "127.0.0.1", 8, epoch=1)
    with pytest.raises(StepFailed, match="the group was aborted"):
        actor.step(FIRST, 0)  # handed out before the failure, and come late
    assert actor.step(FIRST, 1).token_ids == first.token_ids
    assert actor.step(SECOND, 1).token_ids == second.token_ids


def test_an_abort_returns_when_the_step_has_come_back_and_the_next_is_not_computed(actor: RankActor) -> None:
    """A step in a collective comes back when the transport is aborted; here, when it is let go."""
    computing, let_go = threading.Event(), threading.Event()
    compute = actor._worker.compute
    computed: list[int] = []

    def hold(prepared: Prepared) -> StepOutput:
        computing.set()
        assert let_go.wait(WAIT_S)
        computed.append(prepared.plan.step)
        return compute(prepared)

    actor._worker.compute = hold  # type: ignore[method-assign]
    with ThreadPoolExecutor(CALLERS + 1) as callers:
        steps = [callers.submit(actor.step, plan, 0) for plan in (FIRST, SECOND)]
        assert computing.wait(WAIT_S)
        aborting = callers.submit(actor.abort, 0)
        with pytest.raises(TimeoutError):
            aborting.result(0.02)
        let_go.set()
        aborting.result(WAIT_S)
        assert computed == [0]
        assert isinstance(steps[1].exception(WAIT_S), StepFailed)


def test_after_an_abort_no_graph_keeps_the_group_that_it_has_captured(actor: RankActor) -> None:
    class Graphs:
        """NCCL frees nothing while one lives."""

    graphs = Graphs()
    alive = weakref.ref(graphs)
    actor._worker._graphs = graphs  # type: ignore[assignment]
    del graphs
    actor.abort(0)
    assert alive() is None


def test_who_has_lost_its_device_cannot_be_called_out_and_is_replaced(
    actor: RankActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    actor.abort(0)
    actor._config = replace(actor._config, device="cuda")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        actor.abort(0)


def test_a_rank_that_waits_for_others_to_join_is_called_back(actor: RankActor, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()

    def join_in_vain(*arguments: object) -> None:
        leave = arguments[-1]
        assert isinstance(leave, threading.Event)
        waits.set()
        assert leave.wait(WAIT_S)
        raise ConnectionError("nobody came")

    monkeypatch.setattr("cluster.process_group.join", join_in_vain)
    rendezvous = actor.open_store("127.0.0.1", 2, 1, "gloo")
    with ThreadPoolExecutor(1) as caller:
        joining = caller.submit(actor.join, rendezvous, "127.0.0.1", 8, 1)
        assert waits.wait(WAIT_S)
        actor.abort(1)
        assert isinstance(joining.exception(WAIT_S), ConnectionError)


def test_a_report_says_where_every_thread_is(actor: RankActor) -> None:
    report = actor.report()
    assert report.rank == 0
    assert "test_rank_actor.py" in report.stacks
    assert "concurrent/futures/thread.py" in report.stacks, "the thread that computes"
    assert report.resident_bytes > 0

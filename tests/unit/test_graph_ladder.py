"""Which graph a step names, and which is captured next."""

from __future__ import annotations

import pytest

from cluster.config import EngineConfig, ParallelConfig, SchedulerConfig
from cluster.graph_ladder import BUSY_EVERY_S, GraphLadder, graph_sizes, ladder_for
from cluster.messages import SamplingParams, SequenceChunk, SequenceStart, StepPlan


def climbed(*sizes: int) -> GraphLadder:
    ladder = GraphLadder(sizes, "none")
    while (rows := ladder.due(0.0, idle=True)) is not None:
        ladder.captured(rows, 0.0)
    return ladder


def decodes(*seqs: int, group_tokens: tuple[int, ...] = (), starts: tuple[SequenceStart, ...] = ()) -> StepPlan:
    chunks = tuple(SequenceChunk(seq, (5,), 3, (), sample=True) for seq in seqs)
    return StepPlan(0, chunks, starts, group_tokens=group_tokens)


def test_the_largest_comes_first_and_none_twice() -> None:
    ladder, order = GraphLadder((1, 4, 2), "none"), []
    while (rows := ladder.due(0.0, idle=True)) is not None:
        order.append(rows)
        ladder.captured(rows, 0.0)
    assert order == [4, 2, 1]
    assert ladder.complete


def test_between_steps_there_is_a_capture_now_and_then() -> None:
    ladder = climbed(1, 4)
    ladder.forget(100.0)
    assert ladder.due(100.0, idle=True) == 4
    assert ladder.due(100.0 + BUSY_EVERY_S - 1, idle=False) is None
    assert ladder.due(100.0 + BUSY_EVERY_S, idle=False) == 4
    ladder.captured(4, 112.0)
    assert ladder.rows_for(decodes(0)) == 4, "the largest holds all steps"
    assert ladder.due(112.0 + BUSY_EVERY_S - 1, idle=False) is None
    assert ladder.due(112.0 + BUSY_EVERY_S, idle=False) == 1
    ladder.captured(1, 123.0)
    assert ladder.due(1000.0, idle=False) is None


def test_a_step_gets_the_smallest_that_holds_its_largest_group() -> None:
    ladder = climbed(1, 2, 4)
    assert [ladder.rows_for(decodes(*range(n))) for n in (0, 1, 2, 3, 4, 5)] == [0, 1, 2, 4, 4, 0]
    assert ladder.rows_for(decodes(0, 1, 2, group_tokens=(1, 2))) == 2
    assert ladder.rows_for(decodes(0, 1, 2, group_tokens=(3, 0))) == 4


def test_several_tokens_of_a_text_have_no_graph() -> None:
    two = SequenceChunk(1, (5, 6), 3, (), sample=True)
    assert climbed(1, 2, 4).rows_for(StepPlan(0, (*decodes(0).chunks, two))) == 0


def test_who_wants_to_know_its_experts_has_no_graph_while_it_runs() -> None:
    ladder = climbed(2)
    curious = SequenceStart(7, (5,), 1, SamplingParams(max_tokens=4, return_routing=True))
    assert ladder.rows_for(decodes(7, starts=(curious,))) == 0
    assert ladder.rows_for(decodes(3)) == 2
    assert ladder.rows_for(decodes(3, 7)) == 0
    ladder.drop(0.0)
    ladder.captured(2, 0.0)
    assert ladder.rows_for(decodes(7)) == 0, "experts have moved; sequences run on"
    assert ladder.rows_for(StepPlan(0, decodes(3).chunks, releases=(7,))) == 2


def test_ranks_formed_anew_have_no_graphs_and_are_told_everything_again() -> None:
    ladder = climbed(1, 2)
    curious = SequenceStart(7, (5,), 1, SamplingParams(max_tokens=4, return_routing=True))
    ladder.rows_for(decodes(7, starts=(curious,)))
    ladder.forget(0.0)
    assert ladder.rows_for(decodes(0)) == 0
    assert ladder.due(0.0, idle=True) == 2
    ladder.captured(2, 0.0)
    assert ladder.rows_for(decodes(7)) == 2


def test_two_failures_without_all_graphs_between_are_no_accident() -> None:
    ladder = GraphLadder((1, 2), "none")
    assert ladder.failed()
    for rows in (2, 1):
        ladder.captured(rows, 0.0)
    ladder.forget(0.0)
    assert ladder.failed(), "all were captured since"
    assert not ladder.failed()
    assert ladder.due(0.0, idle=True) is None


def test_progress_is_a_bar() -> None:
    ladder = GraphLadder((1, 2, 3, 4), "none")
    ladder.captured(4, 0.0)
    assert ladder.progress() == "[#####...............] 1 of 4"


@pytest.mark.parametrize(
    ("device", "parallel", "exchange", "due"),
    [
        ("cpu", ParallelConfig(), "none", None),
        ("cuda", ParallelConfig(), "none", 6),
        ("cuda", ParallelConfig(tensor=2), "all_reduce", 6),
        ("cuda", ParallelConfig(data=2, exchange="all_reduce"), "all_reduce", 6),
        ("cuda", ParallelConfig(data=2, exchange="all_to_all"), "all_to_all", None),
    ],
)
def test_who_has_graphs(device: str, parallel: ParallelConfig, exchange: str, due: int | None) -> None:
    config = EngineConfig("model", device=device, parallel=parallel, scheduler=SchedulerConfig(max_running=6))  # type: ignore[arg-type]
    ladder = ladder_for(config)
    assert (ladder.exchange, ladder.due(0.0, idle=True)) == (exchange, due)


def test_a_graph_no_larger_than_it_must_be() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(6) == [1, 2, 4, 6]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(256)[-2:] == [240, 256]

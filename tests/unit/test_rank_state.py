"""What preparing a step leaves alone of the step before, which computes meanwhile."""

from __future__ import annotations

import pytest
import torch

from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.rank_state import RankState
from model.config import MixtralConfig
from model.kv_cache import KVCache
from model.shard import Shard
from tests.tiny import CONFIG

PAGE = 4
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)


def start(seq: int, group: int = 0) -> SequenceStart:
    return SequenceStart(seq, (5, 6, 7, 8), 4, GREEDY, group=group)


def prompt(seq: int, *pages: int) -> SequenceChunk:
    return SequenceChunk(seq, (5, 6, 7, 8), 0, pages, True)


def decode(seq: int, position: int, *pages: int) -> SequenceChunk:
    return SequenceChunk(seq, (LAST_SAMPLED,), position, pages, True)


@pytest.fixture
def state() -> RankState:
    kv = KVCache(
        MixtralConfig.from_dict(CONFIG, "tiny"),
        Shard(),
        num_pages=8,
        page_size=PAGE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return RankState(
        (2,),
        CONFIG["vocab_size"],
        lambda grammar: pytest.fail("there is no grammar"),
        kv,
        seats=2,
        max_tokens=8,
        group=0,
        samples=True,
    )


def test_a_step_keeps_what_the_next_one_takes_away(state: RankState) -> None:
    state.take(StepPlan(0, (prompt(0, 3), prompt(1, 5)), (start(0), start(1))))
    computing = state.take(StepPlan(1, (decode(0, 4, 6), decode(1, 4, 7))))
    numbers = computing.numbers.numbers.clone()
    following = state.take(StepPlan(2, (prompt(2, 6), decode(1, 5, 1)), (start(2),), releases=(0,)))
    assert [held.start.seq for held in computing.sampled] == [0, 1]
    assert torch.equal(computing.numbers.numbers, numbers), "its memory is the other one"
    assert [span.runs for span in computing.numbers.spans] == [((3, 1), (6, 1)), ((5, 1), (7, 1))]
    assert following.numbers.spans[1].runs == ((5, 1), (7, 1), (1, 1))


def test_who_comes_takes_the_seat_of_who_goes(state: RankState) -> None:
    first = state.take(StepPlan(0, (prompt(0, 3), prompt(1, 5)), (start(0), start(1))))
    seats = [held.seat for held in first.sampled]
    assert sorted(seats) == [0, 1]
    second = state.take(StepPlan(1, (prompt(2, 3), decode(1, 4, 6)), (start(2),), releases=(0,)))
    assert [held.seat for held in second.sampled] == seats


def test_another_group_s_sequences_are_none_of_its_business(state: RankState) -> None:
    step = state.take(StepPlan(0, (prompt(0, 3), prompt(1, 5)), (start(0), start(1, group=1))))
    assert [held.start.seq for held in step.states] == [0]
    assert step.numbers.tokens == 4
    state.take(StepPlan(1, (decode(0, 4, 4), decode(1, 4, 6)), releases=(1,)))
    (own,) = step.states
    step = state.take(StepPlan(2, (prompt(2, 5),), (start(2),)))
    assert {own.seat, step.sampled[0].seat} == {0, 1}, "and give no seat back"


def test_a_token_without_a_page_is_our_mistake(state: RankState) -> None:
    state.take(StepPlan(0, (prompt(0, 3),), (start(0),)))
    with pytest.raises(AssertionError, match="a token without a page"):
        state.take(StepPlan(1, (decode(0, 4),)))

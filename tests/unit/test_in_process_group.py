from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import EngineConfig, KVConfig
from cluster.errors import StepFailed
from cluster.in_process_group import InProcessGroup
from cluster.messages import LAST_SAMPLED, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.placement import even_placement
from tests.tiny import write_checkpoint

PROMPT = (5, 9, 17, 30, 8)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
WAIT_S = 10.0


def prompt(step: int) -> StepPlan:
    return StepPlan(step, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (SequenceStart(0, PROMPT, 5, GREEDY),))


def decode(step: int, position: int) -> StepPlan:
    return StepPlan(step, (SequenceChunk(0, (LAST_SAMPLED,), position, (), True),))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[InProcessGroup]:
    config = EngineConfig(str(write_checkpoint(tmp_path / "tiny")), kv=KVConfig(page_size=4, memory=1 << 20))
    made = InProcessGroup(config, even_placement(2, 4, 1), 64)
    assert made.start() > 2
    yield made
    made.stop()
    made.stop()


def test_plans_handed_in_ahead_are_carried_out_in_order(group: InProcessGroup) -> None:
    ahead = [group.step(prompt(0)), group.step(decode(1, 5))]
    ids = [step.result(WAIT_S).token_ids for step in ahead]
    group.recover()
    one_by_one = [group.step(plan).result(WAIT_S).token_ids for plan in (prompt(0), decode(1, 5))]
    assert ids == one_by_one
    assert group.ranks()[0].last_step_age_s is not None


def test_a_step_that_fails_voids_the_next_and_a_recovery_begins_anew(group: InProcessGroup) -> None:
    first = group.step(prompt(0)).result(WAIT_S)
    wrong = SequenceChunk(7, PROMPT, 0, (0, 1), True)  # of a sequence that nobody has heard of
    failing, following = group.step(StepPlan(1, (wrong,))), group.step(decode(2, 6))
    with pytest.raises(StepFailed, match="rank 0 failed in a step: AssertionError: ranks would disagree"):
        failing.result(WAIT_S)
    with pytest.raises(StepFailed, match="a step before this one failed"):
        following.result(WAIT_S)
    assert group.recover() == frozenset()
    assert group.epoch == 1
    assert group.step(prompt(0)).result(WAIT_S).token_ids == first.token_ids

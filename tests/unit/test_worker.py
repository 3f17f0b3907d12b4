from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import EngineConfig, KVConfig
from cluster.errors import StepFailed
from cluster.messages import SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.placement import even_placement
from cluster.worker import Worker
from model.comm import SoloComm
from tests.tiny import CONFIG, write_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
PROMPT = (5, 9, 17, 30, 8)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    directory = write_checkpoint(tmp_path / "tiny")
    made = Worker(0, EngineConfig(str(directory), kv=KVConfig(page_size=4)), even_placement(2, 4, 1))
    facts = made.load()
    assert facts.bytes_per_page == 2 * 2 * 4 * CONFIG["num_key_value_heads"] * 16 * 4  # K and V, layers, slots, heads
    made.join(SoloComm(), num_pages=8)
    return made


def test_a_prompt_whole_or_in_chunks_gives_the_same_token(worker: Worker) -> None:
    whole = worker.step(StepPlan(0, (SequenceChunk(7, PROMPT, 0, (0, 1), True),), (SequenceStart(7, GREEDY, 0),)))
    assert whole.seqs == (7,)
    first = SequenceChunk(8, PROMPT[:3], 0, (3,), False)
    nothing = worker.step(StepPlan(1, (first,), (SequenceStart(8, GREEDY, 0),)))
    assert nothing.token_ids == nothing.seqs == ()
    rest = worker.step(StepPlan(2, (SequenceChunk(8, PROMPT[3:], 3, (2,), True),)))
    assert rest.token_ids == whole.token_ids
    assert rest.times.total > 0


def test_sequences_of_one_step_do_not_see_each_other(worker: Worker) -> None:
    alone = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (SequenceStart(0, GREEDY, 0),)))
    both = StepPlan(
        1,
        (SequenceChunk(1, PROMPT[::-1], 0, (2, 3), True), SequenceChunk(2, PROMPT, 0, (4, 5), True)),
        (SequenceStart(1, GREEDY, 0), SequenceStart(2, GREEDY, 0)),
        releases=(0,),
    )
    assert worker.step(both).token_ids[1] == alone.token_ids[0]


def test_a_replayed_sequence_goes_on_with_its_own_random_numbers(worker: Worker) -> None:
    """After preemption a sequence starts again with what it had generated as part of its tokens."""
    seeded = SamplingParams(max_tokens=8, temperature=1.5, seed=11)
    first = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (SequenceStart(0, seeded, 0),)))
    second = worker.step(StepPlan(1, (SequenceChunk(0, first.token_ids, 5, (), True),)))
    again = SequenceChunk(0, PROMPT + first.token_ids, 0, (4, 5), True)
    replayed = worker.step(StepPlan(2, (again,), (SequenceStart(0, seeded, 1),), releases=(0,)))
    assert replayed.token_ids == second.token_ids


def test_a_missing_step_is_refused(worker: Worker) -> None:
    with pytest.raises(StepFailed, match="given step 3 but expected step 0"):
        worker.step(StepPlan(3, ()))

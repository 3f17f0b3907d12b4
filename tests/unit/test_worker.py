from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig, KVConfig
from cluster.errors import StepFailed
from cluster.messages import LAST_SAMPLED, Pooling, SamplingParams, SequenceChunk, SequenceStart, StepPlan
from cluster.placement import even_placement
from cluster.worker import Worker
from model.comm import alone
from tests.tiny import CONFIG, write_checkpoint

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, seed=0)
PROMPT = (5, 9, 17, 30, 8)


def start(seq: int, token_ids: tuple[int, ...] = PROMPT, sampling: SamplingParams = GREEDY) -> SequenceStart:
    return SequenceStart(seq, token_ids, len(PROMPT), sampling)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    directory = write_checkpoint(tmp_path / "tiny")
    made = Worker(0, EngineConfig(str(directory), kv=KVConfig(page_size=4)), even_placement(2, 4, 1))
    facts = made.load()
    assert facts.bytes_per_page == 2 * 2 * 4 * CONFIG["num_key_value_heads"] * 16 * 4  # K and V, layers, slots, heads
    made.join(alone(), num_pages=8)
    return made


def test_a_prompt_whole_or_in_chunks_gives_the_same_token(worker: Worker) -> None:
    whole = worker.step(StepPlan(0, (SequenceChunk(7, PROMPT, 0, (0, 1), True),), (start(7),)))
    assert whole.seqs == (7,)
    first = SequenceChunk(8, PROMPT[:3], 0, (3,), False)
    nothing = worker.step(StepPlan(1, (first,), (start(8),)))
    assert nothing.token_ids == nothing.seqs == ()
    rest = worker.step(StepPlan(2, (SequenceChunk(8, PROMPT[3:], 3, (2,), True),)))
    assert rest.token_ids == whole.token_ids
    assert rest.times.total > 0


def test_sequences_of_one_step_do_not_see_each_other(worker: Worker) -> None:
    alone = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0),)))
    both = StepPlan(
        1,
        (SequenceChunk(1, PROMPT[::-1], 0, (2, 3), True), SequenceChunk(2, PROMPT, 0, (4, 5), True)),
        (start(1, PROMPT[::-1]), start(2)),
        releases=(0,),
    )
    assert worker.step(both).token_ids[1] == alone.token_ids[0]


def test_a_replayed_sequence_goes_on_with_its_own_random_numbers(worker: Worker) -> None:
    """After preemption a sequence starts again with what it had generated as part of its tokens."""
    seeded = SamplingParams(max_tokens=8, temperature=1.5, seed=11)
    first = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0, sampling=seeded),)))
    second = worker.step(StepPlan(1, (SequenceChunk(0, first.token_ids, 5, (), True),)))
    again = SequenceChunk(0, PROMPT + first.token_ids, 0, (4, 5), True)
    replayed = worker.step(StepPlan(2, (again,), (start(0, PROMPT + first.token_ids, seeded),), releases=(0,)))
    assert replayed.token_ids == second.token_ids


def test_a_missing_step_is_refused(worker: Worker) -> None:
    with pytest.raises(StepFailed, match="given step 3 but expected step 0"):
        worker.step(StepPlan(3, ()))


def test_the_token_sampled_last_needs_no_way_through_the_plan(worker: Worker) -> None:
    first = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0),)))
    ahead = worker.step(StepPlan(1, (SequenceChunk(0, (LAST_SAMPLED,), 5, (), True),)))
    whole = SequenceChunk(1, PROMPT + first.token_ids, 0, (2, 3), True)
    told = worker.step(StepPlan(2, (whole,), (start(1, PROMPT + first.token_ids),)))
    assert ahead.token_ids == told.token_ids


def test_a_stored_token_is_computed_but_not_written(worker: Worker) -> None:
    four = PROMPT[:4]
    first = worker.step(StepPlan(0, (SequenceChunk(0, four, 0, (0,), True),), (SequenceStart(0, four, 4, GREEDY),)))
    before = [memory.clone() for memory in worker._kv.layer(0)]
    again = SequenceChunk(1, four[3:], 3, (0,), True, num_stored=1)
    second = worker.step(StepPlan(1, (again,), (SequenceStart(1, four, 4, GREEDY),)))
    assert second.token_ids == first.token_ids
    page = slice(0, 4)
    assert all(torch.equal(a[page], b[page]) for a, b in zip(before, worker._kv.layer(0), strict=True))


def test_log_probabilities_of_a_prompt_in_chunks_are_those_of_the_whole(worker: Worker) -> None:
    judged = SamplingParams(max_tokens=4, temperature=0.0, seed=0, logprobs=2, prompt_logprobs=1)
    whole = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0, sampling=judged),)))
    assert [p.token_id for p in whole.prompt_logprobs[0]] == list(PROMPT[1:])
    assert all(len(p.top) == 1 and p.logprob <= p.top[0][1] for p in whole.prompt_logprobs[0])
    assert whole.logprobs[0].token_id == whole.token_ids[0] == whole.logprobs[0].top[0][0]
    assert whole.logprobs[0].rank == 1
    parts = []
    for step, (first, last) in enumerate([(0, 2), (2, 3), (3, 5)], 1):
        chunk = SequenceChunk(1, PROMPT[first:last], first, ((2, 3) if step == 1 else ()), last == 5)
        starts = (start(1, sampling=judged),) if step == 1 else ()
        parts += worker.step(StepPlan(step, (chunk,), starts)).prompt_logprobs[1]
    assert [p.token_id for p in parts] == list(PROMPT[1:])
    for part, one in zip(parts, whole.prompt_logprobs[0], strict=True):
        assert abs(part.logprob - one.logprob) < 1e-4
        assert part.rank == one.rank


@pytest.mark.parametrize(("pooling", "rows"), [("last", 1), ("mean", 1), ("all", 5)])
def test_pooling_does_not_depend_on_chunks(worker: Worker, pooling: Pooling, rows: int) -> None:
    text = SequenceStart(0, PROMPT, 5, pooling=pooling)
    whole = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (text,))).pooled[0]
    assert len(whole) == rows
    assert {len(row) for row in whole} == {CONFIG["hidden_size"]}
    first = SequenceChunk(1, PROMPT[:3], 0, (2,), False)
    assert worker.step(StepPlan(1, (first,), (replace(text, seq=1),))).pooled == {}
    parts = worker.step(StepPlan(2, (SequenceChunk(1, PROMPT[3:], 3, (3,), True),))).pooled[1]
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-4, atol=1e-4)

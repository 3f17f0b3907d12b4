from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import EngineConfig, KVConfig, ParallelConfig
from cluster.errors import StepFailed
from cluster.messages import (
    LAST_SAMPLED,
    Pooling,
    SamplingParams,
    SequenceChunk,
    SequenceStart,
    StepPlan,
    StepResult,
    StepTimes,
)
from cluster.placement import Placement, even_placement
from cluster.step_line import CALLERS, StepLine
from cluster.worker import Prepared, Worker
from model.batch import Batch
from model.comm import alone
from model.cpu_backend import CpuBackend
from model.graphs import PaddedSteps, Run
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


class Graphs:
    """Computes what it is to replay, and notes what it was asked for."""

    def __init__(self, steps: PaddedSteps, run: Run) -> None:
        self.asked: list[tuple[int, ...]] = []

    def capture(self, rows: int) -> None:
        self.asked.append((rows,))

    def replay(self, batch: Batch, rows: int, group_tokens: tuple[int, ...]) -> torch.Tensor:
        self.asked.append((rows, *group_tokens))
        return torch.zeros(len(batch.logits_rows), CONFIG["hidden_size"])


def test_graphs_are_captured_and_replayed_as_the_plan_says(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = SequenceChunk(0, PROMPT, 0, (0, 1), True)
    assert worker.step(StepPlan(0, (prompt,), (start(0),))).graph is None, "none was captured"
    monkeypatch.setattr(CpuBackend, "decode_graphs", lambda _, *parts: Graphs(*parts))
    for step, rows in enumerate((4, 2), 1):
        nothing = worker.step(StepPlan(step, (), capture=rows))
        assert nothing.seqs == ()
    decode = (SequenceChunk(0, (LAST_SAMPLED,), 5, (), True),)
    assert worker.step(StepPlan(3, decode)).graph is False
    assert worker.step(replace(StepPlan(4, decode), graph=2)).graph is True
    assert worker._graphs.asked == [(4,), (2,), (2, 1)]  # type: ignore[union-attr]
    worker.drop_graphs()
    assert worker.step(StepPlan(5, decode)).graph is None


def test_graphs_go_with_their_group(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "decode_graphs", lambda _, *parts: Graphs(*parts))
    worker.step(StepPlan(0, (), capture=4))
    worker.join(alone(), num_pages=8)
    assert worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0),))).graph is None


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


def test_the_load_of_every_slot_is_reported_when_asked_for(worker: Worker) -> None:
    first = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0),)))
    assert first.slot_rows == ()
    both = worker.step(StepPlan(1, (SequenceChunk(0, first.token_ids, 5, (), True),), report_load=True)).slot_rows
    assert [sum(rows) for rows in both] == [2 * (5 + 1), 2 * (1 + 1)]  # the last block: of sampled rows alone
    again = worker.step(StepPlan(2, (SequenceChunk(0, (LAST_SAMPLED,), 6, (), True),), report_load=True)).slot_rows
    assert [sum(rows) for rows in again] == [2, 2]


def test_who_asks_is_told_how_the_sampled_row_was_routed(worker: Worker) -> None:
    routed = replace(GREEDY, return_routing=True)
    sequences = (SequenceChunk(0, PROMPT, 0, (0, 1), True), SequenceChunk(1, PROMPT[::-1], 0, (2, 3), True))
    whole = worker.step(StepPlan(0, sequences, (start(0), start(1, PROMPT[::-1], routed)), report_load=True))
    assert whole.routing.keys() == {1}
    layers = whole.routing[1]
    assert [len(layer) for layer in layers] == [2, 2]
    for layer, rows in zip(layers, whole.slot_rows, strict=True):
        (best, more), (other, less) = layer
        assert best != other
        assert more >= less
        assert more + less == pytest.approx(1)
        assert rows[best] > 0 < rows[other]
    begun = SequenceChunk(2, PROMPT[::-1][:3], 0, (4, 5), False)
    assert worker.step(StepPlan(1, (begun,), (start(2, PROMPT[::-1], routed),))).routing == {}
    rest = worker.step(StepPlan(2, (SequenceChunk(2, PROMPT[::-1][3:], 3, (), True),))).routing[2]
    for ours, theirs in zip(rest, layers, strict=True):
        assert [expert for expert, _ in ours] == [expert for expert, _ in theirs]
        assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs])


@pytest.fixture
def half(tmp_path: Path) -> Worker:
    """The first of two ranks, which holds experts 0 and 1 of 4; its group is pretended to be alone."""
    directory = write_checkpoint(tmp_path / "tiny")
    made = Worker(0, EngineConfig(str(directory), parallel=ParallelConfig(data=2)), even_placement(2, 4, 2))
    made.load()
    made.join(alone(), num_pages=4)
    return made


def test_experts_move_when_a_plan_says_so(half: Worker) -> None:
    moved = Placement(2, 2, ((2, 1, 0, 3), (0, 1, 2, 3)), number=7)
    before = [block.experts for block in half._held.weights.blocks]
    half.fetch(moved)
    assert half._held.placement.number == 0, "not before"
    half.step(StepPlan(0, (), exchange="all_reduce", group_tokens=(0, 0), placement=7))
    after = [block.experts for block in half._held.weights.blocks]
    assert after[0][1] is before[0][1], "what stays is not read again"
    assert after[1] == before[1]
    answers = half._held.answers
    assert answers.keys() == {(0, 2), (0, 1), (1, 0), (1, 1)}
    # Back to where they were, through the checkpoint: the same expert, and it gives the same.
    half.fetch(even_placement(2, 4, 2))
    half.step(StepPlan(1, (), exchange="all_reduce", group_tokens=(0, 0), placement=0))
    again = half._held.weights.blocks[0].experts[0]
    assert again is not before[0][0]
    assert torch.equal(again.gate_up.weight_OI, before[0][0].gate_up.weight_OI)
    assert torch.equal(again.down.weight_OI, before[0][0].down.weight_OI)


def test_a_placement_that_was_not_fetched_is_refused(half: Worker) -> None:
    with pytest.raises(StepFailed, match="rank 0 was to use expert placement 3 but has not fetched it; it holds 0"):
        half.step(StepPlan(0, (), placement=3))
    half.join(alone(), num_pages=4)
    half.fetch(replace(even_placement(2, 4, 2), number=4))
    with pytest.raises(StepFailed, match="expert placement 3"):
        half.step(StepPlan(0, (), placement=3))


def test_fetching_what_is_held_takes_back_what_was_fetched(half: Worker) -> None:
    held = even_placement(2, 4, 2)
    half.fetch(replace(held, number=1))
    half.fetch(held)
    half.step(StepPlan(0, (), exchange="all_reduce", group_tokens=(0, 0)))
    with pytest.raises(StepFailed, match="expert placement 1"):
        half.step(StepPlan(1, (), placement=1))


def test_pages_outlive_the_group_they_were_filled_in(worker: Worker) -> None:
    first = worker.step(StepPlan(0, (SequenceChunk(0, PROMPT, 0, (0, 1), True),), (start(0),)))
    second = worker.step(StepPlan(1, (SequenceChunk(0, first.token_ids, 5, (), True),)))
    worker.join(alone(), num_pages=8)
    known = PROMPT + first.token_ids
    chunk = SequenceChunk(0, first.token_ids, 5, (0, 1), True)
    assert worker.step(StepPlan(0, (chunk,), (start(0, known),))).token_ids == second.token_ids


def life(seq: int, sampling: SamplingParams, pages: tuple[int, ...], first: int, last: int) -> dict[int, SequenceChunk]:
    """A sequence's chunks by step: its prompt in `first`, then a token a step until `last`, pages when needed."""
    chunks = {first: SequenceChunk(seq, PROMPT, 0, pages[:2], True)}
    for step in range(first + 1, last + 1):
        position = len(PROMPT) + step - first - 1
        new = pages[position // 4 : position // 4 + 1] if position % 4 == 0 else ()
        chunks[step] = SequenceChunk(seq, (LAST_SAMPLED,), position, new, True)
    return chunks


def overlapping_lives() -> list[StepPlan]:
    """Ten steps of sequences that come and go; who ends is let go by the plan after its last, as the scheduler does."""
    penalized = SamplingParams(max_tokens=8, temperature=0.7, seed=3, frequency_penalty=0.8, repetition_penalty=1.2)
    judged = SamplingParams(max_tokens=8, temperature=0.9, seed=4, logprobs=1, prompt_logprobs=1, return_routing=True)
    spans = [(GREEDY, 0, 4), (penalized, 0, 8), (judged, 2, 6), (penalized, 5, 9), (GREEDY, 7, 9)]
    places = [(0, 1, 2), (3, 4, 5, 6), (7, 8, 9), (0, 1, 2), (8, 7, 9)]  # the last two: pages of who is gone
    lives = [
        life(seq, *span[:1], pages, *span[1:]) for seq, (span, pages) in enumerate(zip(spans, places, strict=True))
    ]
    plans = []
    for step in range(10):
        starts = tuple(start(seq, sampling=span[0]) for seq, span in enumerate(spans) if span[1] == step)
        releases = tuple(seq for seq, span in enumerate(spans) if span[2] == step - 1)
        chunks = tuple(chunks[step] for chunks in lives if step in chunks)
        plans.append(StepPlan(step, chunks, starts, releases))
    return plans


def without_times(result: StepResult) -> StepResult:
    return replace(result, times=StepTimes())


def test_steps_prepared_one_ahead_give_what_they_give_one_by_one(worker: Worker) -> None:
    worker.join(alone(), num_pages=10)
    expected = [without_times(worker.step(plan)) for plan in overlapping_lives()]
    worker.join(alone(), num_pages=10)
    found = []
    ahead: Prepared | None = None
    for plan in overlapping_lives():
        computing, ahead = ahead, worker.prepare(plan)
        if computing is not None:
            found.append(without_times(worker.compute(computing).result()))
    assert ahead is not None
    found.append(without_times(worker.compute(ahead).result()))
    assert found == expected
    assert all(result.seqs for result in found)


def test_preparing_beside_computing_changes_nothing(worker: Worker) -> None:
    worker.join(alone(), num_pages=10)
    expected = [without_times(worker.step(plan)) for plan in overlapping_lives()]
    line = StepLine(worker)
    line.form(lambda leave: worker.join(alone(), num_pages=10), epoch=0)
    with ThreadPoolExecutor(CALLERS) as callers:
        found = [without_times(result) for result in callers.map(lambda p: line.step(p, 0), overlapping_lives())]
    line.stop()
    assert found == expected


def test_no_more_than_two_steps_are_under_way(worker: Worker) -> None:
    worker.prepare(StepPlan(0, ()))
    worker.prepare(StepPlan(1, ()))
    with pytest.raises(AssertionError, match="would be written over"):
        worker.prepare(StepPlan(2, ()))

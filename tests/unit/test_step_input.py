"""A step's numbers by arithmetic on all rows at once are those of a loop over its tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import LAST_SAMPLED, SequenceChunk
from cluster.step_input import Rows, StepMemory
from model.batch import page_runs

PAGE = 4
SCRATCH = 999
SEATS = 50


@st.composite
def chunks(draw: st.DrawFn) -> list[tuple[SequenceChunk, list[int], int]]:
    """Chunks with their sequences' pages, and how many rows are wanted of each."""
    found = []
    for seq in range(draw(st.integers(0, 6))):
        start, length = draw(st.integers(0, 30)), draw(st.integers(1, 9))
        token_ids = draw(st.lists(st.integers(0, 40), min_size=length, max_size=length))
        if draw(st.booleans()):
            token_ids[-1] = LAST_SAMPLED
        pages = draw(st.lists(st.integers(0, 90), min_size=12, max_size=12))
        stored, wanted = draw(st.integers(0, length)), draw(st.integers(0, length))
        found.append((SequenceChunk(seq, tuple(token_ids), start, (), wanted > 0, stored), pages, wanted))
    return found


@given(chunks())
def test_arithmetic_on_all_rows_gives_what_a_loop_gives(given: list[tuple[SequenceChunk, list[int], int]]) -> None:
    rows = Rows(PAGE)
    last_ids = torch.arange(100, 100 + SEATS)
    expected: dict[str, list[int]] = {name: [] for name in ("token", "position", "slot", "wanted")}
    for chunk, pages, wanted in given:
        seat = 7 * chunk.seq
        rows.add(chunk, seat, pages, page_runs(pages))
        rows.want(wanted)
        for offset, token in enumerate(chunk.token_ids):
            position = chunk.start + offset
            expected["token"].append(100 + seat if token == LAST_SAMPLED else token)
            expected["position"].append(position)
            slot = pages[position // PAGE] * PAGE + position % PAGE
            expected["slot"].append(SCRATCH if offset < chunk.num_stored else slot)
        expected["wanted"] += range(len(expected["token"]) - wanted, len(expected["token"]))
    sampled_rows, seats = list(range(len(given))), [7 * chunk.seq for chunk, _, _ in given]
    memory = StepMemory(max_tokens=6 * 9, scratch_slot=SCRATCH)
    numbers = memory.write(rows, sampled_rows, seats)
    assert numbers.tokens == len(expected["token"])
    tensors = numbers.send(last_ids)
    batch = tensors.batch
    for name, tensor in (
        ("token", batch.token_ids_T),
        ("position", batch.position_T),
        ("slot", batch.slot_T),
        ("wanted", batch.logits_rows),
    ):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == expected[name], name
    assert (tensors.sampled_row.tolist(), tensors.seat.tolist()) == (sampled_rows, seats)
    assert [(span.length, span.context) for span in batch.spans] == [
        (len(chunk.token_ids), chunk.start + len(chunk.token_ids)) for chunk, _, _ in given
    ]
    assert [span.row for span in batch.spans] == [
        sum(len(earlier.token_ids) for earlier, _, _ in given[:number]) for number in range(len(given))
    ]


def test_what_the_step_before_samples_is_read_when_the_step_is_sent() -> None:
    last_ids = torch.tensor([5, 6, 7])
    rows = Rows(PAGE)
    rows.add(SequenceChunk(0, (LAST_SAMPLED,), 3, (), True), 2, [0], ((0, 1),))
    numbers = StepMemory(8, SCRATCH).write(rows, [], [])
    last_ids[2] = 70  # by a step that was still computing
    assert numbers.send(last_ids).batch.token_ids_T.tolist() == [70]


def test_sending_a_step_asks_the_device_for_nothing() -> None:
    """Tensors on `meta` have no numbers: whoever wants one fails."""
    rows = Rows(PAGE)
    rows.add(SequenceChunk(0, (LAST_SAMPLED,), 3, (), True), 2, [0], ((0, 1),))
    rows.want(1)
    tensors = StepMemory(8, SCRATCH).write(rows, [0], [2]).send(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert tensors.batch.token_ids_T.shape == tensors.batch.logits_rows.shape == tensors.seat.shape == (1,)
    assert tensors.batch.token_ids_T.is_meta

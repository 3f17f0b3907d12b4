"""How a step's attention is planned for a device: page tables, which rows go together, where their keys lie.

That it gives what the CPU's attention does: test_triton_backend.py.
"""

from __future__ import annotations

import pytest
import torch

from model.attention_plan import slot_runs
from model.batch import SequenceSpan
from model.device_attention import DevicePlanner, key_slots, page_table

pytest.importorskip("triton", reason="plans name what kernels take")

CPU = torch.device("cpu")
PAGE = 4
DECODES = [SequenceSpan(0, 1, 9, ((7, 2), (3, 1))), SequenceSpan(1, 1, 1, ((5, 1),))]
CHUNKS = [SequenceSpan(2, 6, 6, ((20, 2),)), SequenceSpan(8, 3, 10, ((9, 1), (2, 2)))]


def test_pages_lie_one_sequence_after_another() -> None:
    pages, first_page, context = page_table(DECODES + CHUNKS)
    assert pages.tolist() == [7, 8, 3, 5, 20, 21, 9, 2, 3]
    assert first_page.tolist() == [0, 3, 4, 6]
    assert context.tolist() == [9, 1, 6, 10]
    assert {x.dtype for x in (pages, first_page, context)} == {torch.int32}


def test_no_sequences_have_no_pages() -> None:
    assert [x.tolist() for x in page_table([])] == [[], [], []]


def planner(window: int | None) -> DevicePlanner:
    return DevicePlanner(PAGE, window, kv_heads=2, processors=8, device=CPU)


@pytest.mark.parametrize("window", [None, 2, 5])
def test_keys_of_prompts_are_those_in_sight(window: int | None) -> None:
    prompts = planner(window).plan(CHUNKS).prompts
    assert prompts is not None
    expected = []
    for span, keys in zip(CHUNKS, prompts.chunks.keys, strict=True):
        first = 0 if window is None else max(0, span.context - span.length + 1 - window)
        assert keys == span.context - first
        expected += [slot for run in slot_runs(span, first, span.context, PAGE) for slot in range(run.start, run.stop)]
    assert key_slots(prompts, PAGE).tolist() == expected
    assert prompts.table.context_B.tolist() == [span.context for span in CHUNKS]
    assert prompts.chunks.rows == (6, 3)
    assert prompts.chunks.row_border.tolist() == [0, 6, 9]
    assert prompts.chunks.key_border.diff().tolist() == list(prompts.chunks.keys)


def test_decodes_are_the_single_rows_that_a_step_begins_with() -> None:
    late = SequenceSpan(11, 1, 4, ((30, 1),))
    for spans, decodes in ((DECODES, 2), (CHUNKS, 0), ([*DECODES, *CHUNKS, late], 2), ([], 0)):
        plan = planner(None).plan(spans)
        assert plan.num_decodes == len(plan.table.context_B) == decodes
        assert (plan.prompts.chunks.rows if plan.prompts else ()) == tuple(x.length for x in spans[decodes:])

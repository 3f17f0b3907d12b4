"""Paged attention against the definition, for any mix of sequences, page tables, windows and precisions."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.attention import MAX_RUNS, Part, attend, merge, paged_attention
from model.attention_plan import GROUP_BYTES, SHORT_BYTES, AttentionPlan, Planner, slot_runs
from model.batch import SequenceSpan, page_runs

PAGE = 4


def reference(query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, window: int | None) -> Tensor:
    """Softmax over the keys each row may see, in float64; the rows are the last L of the M tokens."""
    L, H, C = query_LHC.shape
    M, G, _ = key_MGC.shape
    key_HMC, value_HMC = (x.double().transpose(0, 1).repeat_interleave(H // G, dim=0) for x in (key_MGC, value_MGC))
    scores_HLM = query_LHC.double().transpose(0, 1) @ key_HMC.transpose(1, 2) / C**0.5
    distance_LM = torch.arange(M - L, M)[:, None] - torch.arange(M)
    hidden_LM = (distance_LM < 0) | (distance_LM >= (window or M))
    return (scores_HLM.masked_fill(hidden_LM, -torch.inf).softmax(-1) @ value_HMC).transpose(0, 1)


class Case:
    """Some sequences with their keys scattered over page memory, and a batch of each one's last rows."""

    def __init__(self, seed: int, dtype: torch.dtype, *, scattered: bool) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.G, self.C = rng.randint(1, 4), 2 * rng.randint(2, 20)
        self.H = self.G * rng.randint(1, 4)
        contexts = [rng.randint(1, 70) for _ in range(rng.randint(1, 5))]
        lengths = [rng.choice([1, 1, context, rng.randint(1, context)]) for context in contexts]
        free = list(range(sum(-(-context // PAGE) for context in contexts) + 3))
        if scattered:
            rng.shuffle(free)

        def tensor(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, self.C, generator=generator).to(dtype)

        self.query, self.keys, self.values = tensor(sum(lengths), self.H), [], []
        slots = len(free) * PAGE
        # What no sequence owns must not be read: it would show.
        self.memory = tuple(torch.full((slots, self.G, self.C), torch.nan, dtype=dtype) for _ in range(2))
        spans, row = [], 0
        for context, length in zip(contexts, lengths, strict=True):
            pages = [free.pop() if scattered else free.pop(0) for _ in range(-(-context // PAGE))]
            slot = torch.tensor([pages[position // PAGE] * PAGE + position % PAGE for position in range(context)])
            self.keys.append(tensor(context, self.G))
            self.values.append(tensor(context, self.G))
            self.memory[0][slot], self.memory[1][slot] = self.keys[-1], self.values[-1]
            spans.append(SequenceSpan(row, length, context, page_runs(pages)))
            row += length
        self.spans = tuple(spans)
        rows = [
            (x[-span.length :], y[-span.length :]) for x, y, span in zip(self.keys, self.values, spans, strict=True)
        ]
        self.new_keys, self.new_values = torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])

    def computed(self, window: int | None) -> Tensor:
        key, value = self.memory
        bytes_per_key = self.G * self.C * self.query.itemsize
        plan = Planner(PAGE, bytes_per_key, window, self.query.dtype, self.query.device).plan(self.spans)
        return paged_attention(self.query, self.new_keys, self.new_values, (key, value), plan)

    def expected(self, window: int | None) -> Tensor:
        queries = self.query.split([span.length for span in self.spans])
        parts = zip(queries, self.keys, self.values, strict=True)
        return torch.cat([reference(query, key, value, window) for query, key, value in parts])


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("scattered", [False, True])
def test_paged_attention_is_attention(seed: int, scattered: bool) -> None:
    case = Case(seed, torch.float32, scattered=scattered)
    window = random.Random(seed).choice([None, None, 1, 3, 20, 69, 200])
    torch.testing.assert_close(case.computed(window).double(), case.expected(window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_errs_by_its_own_rounding_alone(seed: int) -> None:
    case = Case(seed, torch.bfloat16, scattered=True)
    torch.testing.assert_close(case.computed(None).double(), case.expected(None), rtol=2e-2, atol=2e-2)


def test_nothing_outside_the_window_is_read() -> None:
    case = Case(3, torch.float32, scattered=True)
    window = 5
    expected = case.computed(window)
    for span in case.spans:
        outside = max(0, span.context - span.length + 1 - window)
        for run in slot_runs(span, 0, outside, PAGE):
            case.memory[0][run] = case.memory[1][run] = torch.nan
    assert torch.equal(case.computed(window), expected)


def test_slots_of_a_range_of_tokens() -> None:
    span = SequenceSpan(0, 1, 14, ((5, 2), (9, 1), (0, 1)))
    slots = [slot for page in (5, 6, 9, 0) for slot in range(page * PAGE, (page + 1) * PAGE)]
    for first in range(15):
        for last in range(first, 15):
            found = [slot for run in slot_runs(span, first, last, PAGE) for slot in range(run.start, run.stop)]
            assert found == slots[first:last]


@pytest.mark.parametrize("runs", [1, MAX_RUNS, MAX_RUNS + 1, 12])
def test_the_number_of_runs_changes_nothing(runs: int) -> None:
    generator = torch.Generator().manual_seed(runs)
    key, value = (torch.randn(200, 2, 8, generator=generator) for _ in range(2))
    query = torch.randn(1, 4, 8, generator=generator)
    pages = [2 * page for page in range(runs)]
    tokens = torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])
    span = SequenceSpan(0, 1, runs * PAGE, page_runs(pages))
    plan = Planner(PAGE, 64, None, query.dtype, query.device).plan([span])
    found = paged_attention(query, key[:1], value[:1], (key, value), plan)
    torch.testing.assert_close(found.double(), reference(query, key[tokens], value[tokens], None), rtol=1e-5, atol=1e-5)


def test_parts_merge_to_the_whole_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(30, 2, 8, generator=generator) for _ in range(2))
    key[10:20] *= 60  # one part outweighs the others by far more than float32 can hold without the logarithm
    query = torch.randn(3, 4, 8, generator=generator)
    parts: list[Part] = [attend(query, key[i : i + 10], value[i : i + 10]) for i in (0, 10, 20)]
    torch.testing.assert_close(merge(parts), attend(query, key, value)[0], rtol=1e-5, atol=1e-5)


def planned(contexts: list[int], bytes_per_key: int) -> AttentionPlan:
    spans = [SequenceSpan(row, 1, context, ((1000 * row, 1000),)) for row, context in enumerate(contexts)]
    return Planner(PAGE, bytes_per_key, None, torch.float32, torch.device("cpu")).plan(spans)


def test_sequences_go_together_with_their_like_while_short() -> None:
    longest = SHORT_BYTES // 1024
    plan = planned([40, longest + 1, 60, 5, 33, longest + 2, longest], 1024)
    assert [group.row_B.tolist() for group in plan.together] == [[0, 2, 4]]
    assert sorted(one.rows.start for one in plan.alone) == [1, 3, 5, 6]


def test_a_group_is_no_larger_than_a_cache_holds() -> None:
    plan = planned([100] * 100, 1024)
    rows = [row for group in plan.together for row in group.row_B.tolist()]
    rows += [one.rows.start for one in plan.alone]
    assert sorted(rows) == list(range(100))
    assert len(plan.together) > 1
    assert all(len(group.slots) * 1024 <= GROUP_BYTES for group in plan.together)

"""How each sequence of a step is best attended to. It depends on the batch alone, so it is planned once for all layers.

    alone      keys    [ run of pages ][ run of pages ] [ this step's rows ]
               rows     see all of it    see all of it    causal               parts merged by log-sum-exp

    together   short contexts of single tokens, copied into one padded tensor: one kernel for many sequences

Alone nothing is copied: a run is a view of page memory, this step's keys are still at hand. A single new token needs
no causal part; its own key is read back from its page. Two exceptions copy: a sequence scattered over many runs, and a
chunk whose rows see different keys through a sliding window, which is masked as well.

L: rows of one sequence.  M: keys in sight.  B: sequences together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model.batch import SequenceSpan

# A context whose keys take no more than this is copied: calling a kernel for it alone costs more (up to 15 times more
# for tiny models). The copies of one group must stay in the processor's cache, else they cost more than they save.
SHORT_BYTES = 128 << 10
GROUP_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Alone:
    rows: slice  # of the batch
    runs: tuple[slice, ...]  # slots of page memory that every row sees, unless masked
    causal: bool = False  # the rows' own keys follow, and are not in the runs
    mask_LM: Tensor | None = None  # added to the scores over the runs' keys


@dataclass(frozen=True, slots=True)
class Together:
    row_B: Tensor
    slots: Tensor  # where every sequence's keys in sight lie, each filled up to M keys, flattened
    mask_B11M: Tensor  # float32, hides the filling


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    alone: tuple[Alone, ...]
    together: tuple[Together, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    page_size: int
    bytes_per_key: int  # of all this rank's heads
    window: int | None  # keys a token sees, itself included; None: all
    dtype: torch.dtype  # of the queries: the kernel wants masks in the same
    device: torch.device

    def plan(self, spans: Sequence[SequenceSpan]) -> AttentionPlan:
        # Lengths within a factor of two go together: filling up costs at most as much again.
        short: defaultdict[int, list[SequenceSpan]] = defaultdict(list)
        alone: list[SequenceSpan] = []
        for span in spans:
            keys = span.context - self._oldest(span)
            if span.length == 1 and keys * self.bytes_per_key <= SHORT_BYTES:
                short[keys.bit_length()].append(span)
            else:
                alone.append(span)
        together: list[list[SequenceSpan]] = []
        for bits, group in short.items():
            size = GROUP_BYTES // ((1 << bits) * self.bytes_per_key)
            together += [group[first : first + size] for first in range(0, len(group), size)]
        alone += [group[0] for group in together if len(group) == 1]
        groups = [group for group in together if len(group) > 1]
        return AttentionPlan(tuple(map(self._alone, alone)), tuple(map(self._together, groups)))

    def _alone(self, span: SequenceSpan) -> Alone:
        rows = slice(span.row, span.row + span.length)
        if span.length == 1:
            return Alone(rows, self._in_sight(span))
        if self.window is not None and span.context > self.window:
            return Alone(rows, self._in_sight(span), mask_LM=self._window_mask(span))
        return Alone(rows, tuple(slot_runs(span, 0, span.context - span.length, self.page_size)), causal=True)

    def _together(self, spans: list[SequenceSpan]) -> Together:
        slots = [torch.cat([torch.arange(run.start, run.stop) for run in self._in_sight(span)]) for span in spans]
        slots_BM = pad_sequence(slots, batch_first=True)
        hidden_BM = torch.arange(slots_BM.shape[1]) >= torch.tensor([len(x) for x in slots])[:, None]
        # Filled with the sequence's own: what another one left in memory must not reach it, not even times zero.
        slots_BM = slots_BM.where(~hidden_BM, slots_BM[:, :1])
        row_B = torch.tensor([span.row for span in spans])
        mask_B11M = self._mask(hidden_BM, torch.float32)[:, None, None]
        return Together(row_B.to(self.device), slots_BM.flatten().to(self.device), mask_B11M)

    def _window_mask(self, span: SequenceSpan) -> Tensor:
        """Each row sees itself and window - 1 tokens before it."""
        assert self.window is not None
        first = self._oldest(span)
        position_L1 = torch.arange(span.context - span.length, span.context)[:, None]
        distance_LM = position_L1 - torch.arange(first, span.context)
        return self._mask((distance_LM < 0) | (distance_LM >= self.window), self.dtype)

    def _mask(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """What to add to scores."""
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(self.device)

    def _in_sight(self, span: SequenceSpan) -> tuple[slice, ...]:
        return in_sight(span, self.window, self.page_size)

    def _oldest(self, span: SequenceSpan) -> int:
        return oldest_in_sight(span, self.window)


def oldest_in_sight(span: SequenceSpan, window: int | None) -> int:
    """The first token that any row of the span sees."""
    return 0 if window is None else max(0, span.context - span.length + 1 - window)


def in_sight(span: SequenceSpan, window: int | None, page_size: int) -> tuple[slice, ...]:
    """Where the keys lie that any row of the span sees."""
    return tuple(slot_runs(span, oldest_in_sight(span, window), span.context, page_size))


def slot_runs(span: SequenceSpan, first: int, last: int, page_size: int) -> Iterator[slice]:
    """Where tokens first .. last - 1 of a sequence lie in page memory."""
    start = 0
    for first_page, pages in span.runs:
        low, high = max(first - start, 0), min(last - start, pages * page_size)
        if low < high:
            yield slice(first_page * page_size + low, first_page * page_size + high)
        start += pages * page_size

"""The numbers of one step, written into memory that stays and sent to the device in one piece.

    plan   chunk of A: 3 tokens, samples | chunk of B: 1 token, samples | text C: 2 tokens, ends
    T rows a a a                          b                              c c
    R rows     a                          b                                c        whose hidden states are wanted
    M rows     a                          b                                         of these, that are sampled from

    sent   [ token_ids T | position T | slot T | rows R | last_row L | last_seat L | sampled_row M | seat M ]

Tokens that the step before samples are not known yet when this is written: they lie on the device, in the seats of
their sequences, and are filled in there just before the step computes (L rows). So a step can be written while the one
before it computes; two sets of memory in turn are enough, for a third step is not begun.

C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cluster.messages import LAST_SAMPLED, SequenceChunk
from model.batch import Batch, SequenceSpan
from model.to_device import to_device

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]

COLUMNS = 8  # none is longer than the step has rows


@dataclass(slots=True)
class Rows:
    """What is noted of each chunk; the rest is arithmetic on all rows at once."""

    page_size: int
    token_ids: list[int] = field(default_factory=list)
    spans: list[SequenceSpan] = field(default_factory=list)
    seats: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # those that the chunks' own tokens lie in, one chunk after another
    first_page: list[int] = field(default_factory=list)  # of each chunk among them
    stored: list[slice] = field(default_factory=list)  # rows that are not written again
    wanted: list[int] = field(default_factory=list)  # the R rows

    def add(self, chunk: SequenceChunk, seat: int, pages: list[int], runs: tuple[tuple[int, int], ...]) -> None:
        """A chunk of a sequence with this page table."""
        row, length, size = len(self.token_ids), len(chunk.token_ids), self.page_size
        end = chunk.start + length
        assert end <= len(pages) * size, "a token without a page"
        self.token_ids += chunk.token_ids
        self.spans.append(SequenceSpan(row, length, end, runs))
        self.seats.append(seat)
        self.first_page.append(len(self.pages))
        self.pages += pages[chunk.start // size : (end - 1) // size + 1]
        if chunk.num_stored:
            self.stored.append(slice(row, row + chunk.num_stored))

    def want(self, count: int) -> None:
        """The last ones that were added."""
        end = len(self.token_ids)
        self.wanted += range(end - count, end)


class StepMemory:
    """For the numbers of one step of up to so many tokens. write() takes it, until the step has been computed."""

    def __init__(self, max_tokens: int, scratch_slot: int) -> None:
        self._scratch_slot = scratch_slot
        self._numbers: Numbers = np.empty(COLUMNS * max_tokens, np.int64)
        self._tensor = torch.from_numpy(self._numbers)

    def write(self, rows: Rows, sampled_rows: Sequence[int], sampled_seats: Sequence[int]) -> StepNumbers:
        """`sampled_rows`: the M rows, numbered among the R."""
        token_ids_T = np.array(rows.token_ids, np.int64)
        chunk_T = np.repeat(np.arange(len(rows.spans)), [span.length for span in rows.spans])
        position_T, slot_T = self._places(rows, chunk_T)
        last_row = np.flatnonzero(token_ids_T == LAST_SAMPLED)
        last_seat = np.array(rows.seats, np.int64)[chunk_T[last_row]]
        sizes, end = [], 0
        for column in (token_ids_T, position_T, slot_T, rows.wanted, last_row, last_seat, sampled_rows, sampled_seats):
            sizes.append(len(column))
            self._numbers[end : end + len(column)] = column
            end += len(column)
        return StepNumbers(self._tensor[:end], sizes, tuple(rows.spans))

    def _places(self, rows: Rows, chunk_T: Numbers) -> tuple[Numbers, Numbers]:
        """Each row's position in its sequence, and the slot its key and value are written to."""
        spans = rows.spans
        start_C = np.array([span.context - span.length for span in spans], np.int64)
        row_C = np.array([span.row for span in spans], np.int64)
        position_T = np.arange(len(chunk_T)) + (start_C - row_C)[chunk_T]
        page_C = np.array(rows.first_page, np.int64) - start_C // rows.page_size
        page_T = np.array(rows.pages, np.int64)[position_T // rows.page_size + page_C[chunk_T]]
        slot_T = page_T * rows.page_size + position_T % rows.page_size
        for stored in rows.stored:
            slot_T[stored] = self._scratch_slot
        return position_T, slot_T


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """On the host, in the order of the drawing above."""

    numbers: Tensor  # int64
    sizes: list[int]
    spans: tuple[SequenceSpan, ...]

    @property
    def tokens(self) -> int:
        return self.sizes[0]

    def send(self, last_ids: Tensor) -> StepTensors:
        """To where `last_ids`, the seats, are: what was sampled last is read there, in order with what computes."""
        here = to_device(self.numbers, last_ids.device)
        columns = here.split_with_sizes(self.sizes)
        token_ids_T, position_T, slot_T, rows_R, last_row, last_seat, sampled_row, seat = columns
        if len(last_row):
            token_ids_T.index_copy_(0, last_row, last_ids.index_select(0, last_seat))
        return StepTensors(Batch(token_ids_T, position_T, slot_T, self.spans, rows_R), sampled_row, seat)


@dataclass(frozen=True, slots=True)
class StepTensors:
    batch: Batch
    sampled_row: Tensor  # (M,), among the R rows
    seat: Tensor  # (M,): where what is sampled is kept for the next step

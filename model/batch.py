"""The input of one forward pass: flat tokens of many sequences, without padding.

    sequence     A A A  B  C C         chunk of a prompt, one decode, another chunk
    token_ids_T  5 9 2  7  3 3
    position_T   0 1 2  41 16 17
    slot_T       where each token's key and value are written: page * page_size + offset

The worker builds it from a plan; the model only reads it. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """One sequence's rows in the flat batch, and where its context lies."""

    row: int  # first row of the sequence in the batch
    length: int  # rows, that is new tokens
    context: int  # tokens in pages once this step has written: earlier ones + length
    runs: tuple[tuple[int, int], ...]  # (first page, pages): the page table as runs of consecutive pages, in order


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids_T: Tensor  # int64
    position_T: Tensor  # int64
    slot_T: Tensor  # int64, into the KV memory seen as one row of slots
    spans: tuple[SequenceSpan, ...]  # in row order; together they cover all rows
    logits_rows: Tensor  # int64: rows whose next-token logits are wanted


def page_runs(pages: list[int]) -> tuple[tuple[int, int], ...]:
    """Consecutive page numbers folded into runs: [4 5 6 9] -> ((4, 3), (9, 1))."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and page == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return tuple(runs)

"""One vector for a whole text out of its rows, or one for every token, however the text was cut into chunks.

A row is a token's final hidden state, or what the head makes of it. Knows nothing of requests.

L: rows of one chunk.  D: features of a row.  P: rows of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["last", "mean", "all"]


def wanted_rows(pooling: Pooling, chunk: range, *, ends_text: bool) -> range:
    """Which of a chunk's rows have to be computed to the end."""
    if pooling == "last":
        return chunk[-1:] if ends_text else chunk[:0]
    return chunk


@dataclass(frozen=True, slots=True)
class Pool:
    """What the chunks of one text have come to so far. It never changes: add() makes the next."""

    pooling: Pooling
    parts: tuple[Tensor, ...] = ()  # last, mean: one row at most; all: the rows of each chunk
    count: int = 0  # rows in the sum of a mean

    def add(self, rows_LD: Tensor) -> Pool:
        if not len(rows_LD):
            return self
        match self.pooling:
            case "last":
                return Pool("last", (rows_LD[-1:],))
            case "mean":
                # So wide that how the text was cut is lost in the result's rounding.
                sum_1D = rows_LD.double().sum(0, keepdim=True)
                return Pool("mean", (sum(self.parts, sum_1D),), self.count + len(rows_LD))
            case "all":
                return Pool("all", (*self.parts, rows_LD))

    def result(self) -> Tensor:
        """(P, D), float32: one row, or with "all" one for every token."""
        rows_PD = torch.cat(self.parts)
        return (rows_PD / self.count if self.pooling == "mean" else rows_PD).float()

"""What the model asks of the ranks beside it: five collectives, and their one-process form.

The model knows neither processes nor devices; whoever runs several ranks (cluster/transport/) implements
`Comm`. Rows are the first dimension. Uneven row counts are the caller's to state, never exchanged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # who only asks how rows are dealt does without torch
    from torch import Tensor


class Comm(Protocol):
    """A group of ranks that call the same methods in the same order with agreeing shapes."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on every rank. May write into x."""

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        """This rank's rows[rank] rows of the sum; the rows of all ranks lie one after another in x_TD."""

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        """Every rank's rows, one rank after another; rank r gives rows[r] of them."""

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """send[r] rows to rank r, in order; the receive[r] rows of each rank r come back in rank order."""

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The source's x on every rank. May write into x."""


class SoloComm:
    """A group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        return x_TD

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        return x_SD

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return x_ND

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class Groups:
    """The two groups a rank belongs to; the same object twice where there is one data group."""

    world: Comm  # all ranks: they exchange rows of experts
    tensor: Comm  # the ranks that share this rank's sequences: attention, vocabulary, sampled ids


def alone() -> Groups:
    """The groups of the only rank there is."""
    solo = SoloComm()
    return Groups(solo, solo)


def split_rows(total: int, parts: int) -> list[int]:
    """How `total` rows are dealt to `parts` ranks: evenly, the first ranks take the remainder."""
    base, extra = divmod(total, parts)
    return [base + (part < extra) for part in range(parts)]

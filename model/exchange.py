"""What a transformer block asks of the ranks around it in one step, and the form for one process.

    normed_TD ──attention──▶ partial_TD ──reduce──▶ + x_SD ──router──▶ dispatch ──experts──▶ combine ──▶ + x_SD
    next normed_TD ◀──gather── norm of x_SD

T: all tokens of the step.  S: this rank's share of them (all of them where the exchange does not share).
N: rows that arrived for this rank's slots.  K: experts per token.  D: model width.

Several ranks: cluster/all_to_all.py. The block is the same code either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows on their way through this rank's slots. dispatch() makes it, combine() consumes it.

    x_ND        rows of slot 0, then rows of slot 1, ...
    rows        how many rows each local slot has; sums to N
    order_N     where each row belongs in what combine() must restore (the exchange's own business)
    weight_SK   routing weights of this rank's share, in routing order
    route       what else the exchange that made it needs to send the rows back
    """

    x_ND: Tensor
    rows: list[int]
    order_N: Tensor
    weight_SK: Tensor
    route: object = None


class Exchange(Protocol):
    """How the tokens of one step move between ranks. Made anew for every step, from the plan."""

    def share(self, x_TD: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank holds whole."""

    def reduce(self, partial_TD: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks of their partial results."""

    def gather(self, x_SD: Tensor) -> Tensor:
        """All rows, from every rank's share."""

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        """Send each row of the share to the slots of its K experts; receive what is for ours."""

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        """Send the experts' outputs back and sum them per token, weighted, in routing order."""


class SlotLoad:
    """How many rows each of this rank's slots has computed, layer by layer."""

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self._num_slots = num_slots
        self._rows = [[0] * num_slots for _ in range(num_layers)]
        self._device_rows: Tensor | None = None

    def add(self, layer: int, rows: Sequence[int]) -> None:
        self._rows[layer] = [before + more for before, more in zip(self._rows[layer], rows, strict=True)]

    def on_device(self, device: torch.device) -> Tensor:
        """Where kernels add their counts: int64, (layers, slots + 1). take() alone waits for them.

        The last column is for rows that are not this rank's: nobody wants to know it.
        """
        if self._device_rows is None:
            self._device_rows = torch.zeros(len(self._rows), self._num_slots + 1, dtype=torch.int64, device=device)
        return self._device_rows

    @torch.inference_mode()
    def take(self) -> tuple[tuple[int, ...], ...]:
        """All there were since the last time."""
        if self._device_rows is not None:
            for layer, rows in enumerate(self._device_rows[:, :-1].tolist()):
                self.add(layer, rows)
            self._device_rows.zero_()
        rows, self._rows = self._rows, [[0] * self._num_slots for _ in self._rows]
        return tuple(map(tuple, rows))


def sort_by_expert(expert_SK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The stable order that groups token-expert pairs by expert, and how many pairs each expert has.

    expert_SK   [[2 0] [0 1]]  ->  pairs 0..3 have experts 2 0 0 1  ->  order [1 2 3 0], rows [2 1 1]
    """
    flat = expert_SK.reshape(-1)
    return torch.argsort(flat, stable=True), torch.bincount(flat, minlength=num_experts).tolist()


def weighted_sum(y_PD: Tensor, weight_SK: Tensor) -> Tensor:
    """The K expert outputs of each token, weighted and added in routing order k = 0, 1, ... (P = S*K pairs)."""
    S, K = weight_SK.shape
    y_SKD = y_PD.view(S, K, y_PD.shape[-1])
    out_SD = y_SKD[:, 0] * weight_SK[:, 0, None]
    for k in range(1, K):
        out_SD = out_SD + y_SKD[:, k] * weight_SK[:, k, None]
    return out_SD


@dataclass(frozen=True, slots=True)
class OneRank:
    """The exchange of a single process: nothing moves but rows into expert order and back.

    num_experts   of every layer, in slots of the same number
    load          where computed rows are counted
    """

    num_experts: int
    load: SlotLoad | None = None

    def share(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return partial_TD

    def gather(self, x_SD: Tensor) -> Tensor:
        return x_SD

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        order_P, rows = sort_by_expert(expert_SK, self.num_experts)
        token_P = order_P // expert_SK.shape[1]
        if self.load is not None:
            self.load.add(layer, rows)
        return Dispatched(x_SD.index_select(0, token_P), rows, order_P, weight_SK)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        y_PD = torch.empty_like(y_ND)
        y_PD.index_copy_(0, dispatched.order_N, y_ND)
        return weighted_sum(y_PD, dispatched.weight_SK)

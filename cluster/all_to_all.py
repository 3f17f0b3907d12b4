"""Dispatch and combine over several ranks, in the two ways DESIGN knows. On top of model/comm.py, no state between.

all_to_all   each rank takes its share of the tokens, routes them, and sends every (token, expert) pair to the
             expert's rank:

    pairs by token   t0e5 t0e1 t1e1 t1e7      order_P: the stable order by global slot
    pairs by slot    t0e1 t1e1 | t0e5 t1e7    | rank border: rows to rank 0, rows to rank 1
    rows by source   r0s0 r0s1 r1s0 r1s1      what arrives; order_N regroups it by local slot
    rows by slot     r0s0 r1s0 r0s1 r1s1      what the experts compute

all_reduce   every rank holds all tokens, computes the pairs of its own slots, and the partial sums are added.

T all tokens, S this rank's share, P = S*K pairs, N rows for this rank's slots, D model width, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.placement import Placement
from model.comm import Comm, split_rows
from model.exchange import Dispatched, sort_by_expert, weighted_sum


class SlotTables:
    """The placement as one rank uses it, as tensors. Made once per placement."""

    def __init__(self, placement: Placement, rank: int, device: torch.device) -> None:
        self.slots_per_rank = placement.slots_per_rank
        self.num_slots = placement.num_ranks * placement.slots_per_rank
        self.own = [torch.tensor(row, device=device) for row in placement.slot_for(rank)]
        # Where all ranks hold the same tokens they must agree which replica computes: rank 0's choice.
        self.agreed = [torch.tensor(row, device=device) for row in placement.slot_for(0)]


@dataclass(frozen=True, slots=True)
class _Route:
    """How rows came, so that combine() can send them back."""

    order_P: Tensor
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank


class AllToAll:
    """One step in `all_to_all` exchange over ranks that all hold the same T tokens after attention."""

    def __init__(self, comm: Comm, tables: SlotTables, num_tokens: int) -> None:
        self._comm = comm
        self._tables = tables
        self._rows = split_rows(num_tokens, comm.size)

    def share(self, x_TD: Tensor) -> Tensor:
        first = sum(self._rows[: self._comm.rank])
        return x_TD[first : first + self._rows[self._comm.rank]]

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return self._comm.reduce_scatter(partial_TD, self._rows)

    def gather(self, x_SD: Tensor) -> Tensor:
        return self._comm.all_gather(x_SD, self._rows)

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        ranks, slots = self._comm.size, self._tables.slots_per_rank
        slot_SK = self._tables.own[layer][expert_SK]
        order_P, rows = sort_by_expert(slot_SK, self._tables.num_slots)
        rows_RL = torch.tensor(rows, device=x_SD.device).view(ranks, slots)
        arriving_RL = self._comm.all_to_all(rows_RL, [1] * ranks, [1] * ranks)
        sent: list[int] = rows_RL.sum(1).tolist()
        received: list[int] = arriving_RL.sum(1).tolist()
        arrived_ND = self._comm.all_to_all(x_SD.index_select(0, order_P // expert_SK.shape[1]), sent, received)
        slot_N = torch.arange(slots, device=x_SD.device).repeat(ranks).repeat_interleave(arriving_RL.reshape(-1))
        order_N, rows_here = sort_by_expert(slot_N, slots)
        route = _Route(order_P, sent, received)
        return Dispatched(arrived_ND.index_select(0, order_N), rows_here, order_N, weight_SK, route)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        route = dispatched.route
        assert isinstance(route, _Route)
        back_ND = torch.empty_like(y_ND).index_copy_(0, dispatched.order_N, y_ND)
        sorted_PD = self._comm.all_to_all(back_ND, route.received, route.sent)
        y_PD = torch.empty_like(sorted_PD).index_copy_(0, route.order_P, sorted_PD)
        return weighted_sum(y_PD, dispatched.weight_SK)


class AllReduce:
    """One step in `all_reduce` exchange: nothing is shared out, sums are."""

    def __init__(self, comm: Comm, tables: SlotTables) -> None:
        self._comm = comm
        self._tables = tables

    def share(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return self._comm.all_reduce(partial_TD)

    def gather(self, x_SD: Tensor) -> Tensor:
        return x_SD

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        slots = self._tables.slots_per_rank
        first = self._comm.rank * slots
        order_P, rows = sort_by_expert(self._tables.agreed[layer][expert_SK], self._tables.num_slots)
        before, here = sum(rows[:first]), rows[first : first + slots]
        order_N = order_P[before : before + sum(here)]
        return Dispatched(x_SD.index_select(0, order_N // expert_SK.shape[1]), here, order_N, weight_SK)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        y_PD = y_ND.new_zeros(dispatched.weight_SK.numel(), y_ND.shape[-1])
        y_PD.index_copy_(0, dispatched.order_N, y_ND)
        return self._comm.all_reduce(weighted_sum(y_PD, dispatched.weight_SK))

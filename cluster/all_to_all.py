"""Dispatch and combine over several ranks, in the ways DESIGN knows. On top of model/comm.py, no state between.

all_to_all   each rank takes its share of its group's tokens, routes them, and sends every (token, expert) pair to the
             expert's ranks:

    pairs by token   t0e5 t0e1 t1e1 t1e7      order_P: the stable order by place
    pairs by place   t0e1 t1e1 | t0e5 t1e7    | rank border: rows to rank 0, rows to rank 1
    rows by source   r0s0 r0s1 r1s0 r1s1      what arrives; order_N regroups it by local slot
    rows by slot     r0s0 r1s0 r0s1 r1s1      what the experts compute

all_reduce   every rank holds all tokens, computes the pairs of its own slots, and the partial sums are added. Data
             groups first gather the shares of all ranks, and each rank gets the sums of its share alone.

A place is a slot on one rank, rank * slots_per_rank + local slot: a pair goes to one place, or where experts are sliced
to one on each rank that holds a slice.

T tokens of this rank's group or of all groups, S this rank's share, J slices, P = S*K*J pairs, N rows for this rank's
slots, D model width, E experts, K experts per token, C turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cluster.messages import Exchange as Mode
from cluster.placement import Placement
from model.comm import Comm, Groups, split_rows
from model.exchange import Dispatched, Exchange, OneRank, SlotLoad, sort_by_expert, weighted_sum

TURNS = 120  # replicas take turns: evenly where there are 1, 2, 3, 4, 5, 6, 8 or 10 of an expert


class SlotTables:
    """The placement as tensors: where each expert's rows go. Made once per placement."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.slots_per_rank = placement.slots_per_rank
        self.slices = placement.slices
        self.num_experts = len(placement.replicas(0))
        self.num_places = placement.num_ranks * placement.slots_per_rank
        self._place_ECJ = [
            torch.tensor(_places(placement, layer), device=device) for layer in range(len(placement.expert_of))
        ]

    def places(self, layer: int, expert_SK: Tensor, turn_S1: Tensor) -> Tensor:
        """(S, K, J): for each pair one place per slice of the expert."""
        return self._place_ECJ[layer][expert_SK, turn_S1]

    def own_slots(self, rank: int) -> list[Tensor]:
        """Per layer, (E, C + 1): which slot of the rank has the pair of an expert in a turn; slots_per_rank: none.

        The last turn is for tokens that are not there: no rank has their experts.
        """
        layers = []
        for place_ECJ in self._place_ECJ:
            slot_EC = place_ECJ[..., rank % self.slices] - rank * self.slots_per_rank
            here_EC = (slot_EC >= 0) & (slot_EC < self.slots_per_rank)
            slot_EC = slot_EC.where(here_EC, self.slots_per_rank)
            layers.append(functional.pad(slot_EC, (0, 1), value=self.slots_per_rank))
        return layers

    def turns(self, first: int, tokens: int) -> Tensor:
        """Whose turn it is among the replicas of an expert, for tokens first, first + 1, ... of a step. (S, 1)."""
        device = self._place_ECJ[0].device
        return (torch.arange(first, first + tokens, device=device) % TURNS)[:, None]


def _places(placement: Placement, layer: int) -> list[list[list[int]]]:
    def places(slot: int) -> list[int]:
        local = slot % placement.slots_per_rank
        return [rank * placement.slots_per_rank + local for rank in placement.holders(slot)]

    return [[places(slots[turn % len(slots)]) for turn in range(TURNS)] for slots in placement.replicas(layer)]


class Share:
    """The tokens of one step that this rank has for itself between attention and the next block."""

    def __init__(self, tensor: Comm, group: int, group_tokens: Sequence[int]) -> None:
        self._tensor = tensor
        self._rows = split_rows(group_tokens[group], tensor.size)
        self._first = sum(self._rows[: tensor.rank])
        self.first = sum(group_tokens[:group]) + self._first  # among the tokens of all groups
        self.size = self._rows[tensor.rank]

    def share(self, x_TD: Tensor) -> Tensor:
        return x_TD[self._first : self._first + self.size]

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return self._tensor.reduce_scatter(partial_TD, self._rows)

    def gather(self, x_SD: Tensor) -> Tensor:
        return self._tensor.all_gather(x_SD, self._rows)


@dataclass(frozen=True, slots=True)
class _Route:
    """How rows came, so that combine() can send them back."""

    order_P: Tensor
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank


class AllToAll(Share):
    """One step in `all_to_all` exchange."""

    def __init__(
        self, groups: Groups, tables: SlotTables, group_tokens: Sequence[int], load: SlotLoad | None = None
    ) -> None:
        super().__init__(groups.tensor, groups.world.rank // groups.tensor.size, group_tokens)
        self._world = groups.world
        self._tables = tables
        self._turn_S1 = tables.turns(self.first, self.size)
        self._load = load

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        ranks, slots = self._world.size, self._tables.slots_per_rank
        place_SKJ = self._tables.places(layer, expert_SK, self._turn_S1)
        order_P, rows = sort_by_expert(place_SKJ, self._tables.num_places)
        rows_RL = torch.tensor(rows, device=x_SD.device).view(ranks, slots)
        arriving_RL = self._world.all_to_all(rows_RL, [1] * ranks, [1] * ranks)
        arriving: list[list[int]] = arriving_RL.tolist()
        sent = [sum(rows[first : first + slots]) for first in range(0, len(rows), slots)]
        received = [sum(from_one) for from_one in arriving]
        pairs_per_token = expert_SK.shape[1] * self._tables.slices
        arrived_ND = self._world.all_to_all(x_SD.index_select(0, order_P // pairs_per_token), sent, received)
        slot_N = torch.arange(slots, device=x_SD.device).repeat(ranks).repeat_interleave(arriving_RL.reshape(-1))
        order_N = torch.argsort(slot_N, stable=True)
        rows_here = [sum(for_one) for for_one in zip(*arriving, strict=True)]
        if self._load is not None:
            self._load.add(layer, rows_here)
        route = _Route(order_P, sent, received)
        return Dispatched(arrived_ND.index_select(0, order_N), rows_here, order_N, weight_SK, route)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        route = dispatched.route
        assert isinstance(route, _Route)
        back_ND = torch.empty_like(y_ND).index_copy_(0, dispatched.order_N, y_ND)
        sorted_PD = self._world.all_to_all(back_ND, route.received, route.sent)
        y_PD = torch.empty_like(sorted_PD).index_copy_(0, route.order_P, sorted_PD)
        if self._tables.slices > 1:
            # The parts of one expert's output first, in slice order; then the experts, in routing order.
            y_PD = y_PD.view(-1, self._tables.slices, y_PD.shape[1]).sum(1, dtype=torch.float32)
        return weighted_sum(y_PD, dispatched.weight_SK)


class OwnPairs(Protocol):
    """Of all pairs, those of this rank's slots: as rows that move, below, or listed, in padded_exchange.py."""

    def take(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Dispatched: ...

    def sum(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        """This rank's part of every token's output."""


class AllReduce:
    """One step in `all_reduce` exchange of one data group: nothing is shared out, sums are."""

    def __init__(self, world: Comm, own: OwnPairs) -> None:
        self._world = world
        self._own = own

    def share(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return self._world.all_reduce(partial_TD)

    def gather(self, x_SD: Tensor) -> Tensor:
        return x_SD

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        return self._own.take(layer, x_SD, expert_SK, weight_SK)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        return self._world.all_reduce(self._own.sum(dispatched, y_ND))


class GroupedAllReduce(Share):
    """One step in `all_reduce` exchange of several data groups: every rank has all tokens for the experts alone."""

    def __init__(self, groups: Groups, group_tokens: Sequence[int], own: OwnPairs) -> None:
        super().__init__(groups.tensor, groups.world.rank // groups.tensor.size, group_tokens)
        self._world = groups.world
        self._shares = [rows for tokens in group_tokens for rows in split_rows(tokens, groups.tensor.size)]
        self._own = own

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Dispatched:
        # A row and its routing travel together, as bytes: one collective instead of three.
        parts = (x_SD, expert_SK.to(torch.int32), weight_SK)
        packed = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        gathered = self._world.all_gather(packed, self._shares)
        widths = [part.shape[1] * part.element_size() for part in parts]
        columns = torch.split(gathered, widths, 1)
        # Cloned, for a piece of one row would otherwise keep its place in the row, where no number may begin.
        x_TD, expert_TK, weight_TK = (
            column.clone(memory_format=torch.contiguous_format).view(part.dtype)
            for column, part in zip(columns, parts, strict=True)
        )
        return self._own.take(layer, x_TD, expert_TK, weight_TK)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        return self._world.reduce_scatter(self._own.sum(dispatched, y_ND), self._shares)


def exchange_for(
    mode: Mode, groups: Groups, tables: SlotTables, group_tokens: Sequence[int], load: SlotLoad | None = None
) -> Exchange:
    match mode:
        case "none":
            return OneRank(tables.num_experts, load)
        case "all_to_all":
            return AllToAll(groups, tables, group_tokens, load)
        case "all_reduce":
            own = MovedPairs(groups.world.rank, tables, sum(group_tokens), load)
            if len(group_tokens) == 1:
                return AllReduce(groups.world, own)
            return GroupedAllReduce(groups, group_tokens, own)


class MovedPairs:
    """The rows of this rank's slots, copied out of those of all tokens."""

    def __init__(self, rank: int, tables: SlotTables, num_tokens: int, load: SlotLoad | None) -> None:
        self._tables = tables
        self._rank = rank
        self._turn_T1 = tables.turns(0, num_tokens)
        self._load = load

    def take(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Dispatched:
        slots = self._tables.slots_per_rank
        first = self._rank * slots
        place_TK = self._tables.places(layer, expert_TK, self._turn_T1)[..., self._rank % self._tables.slices]
        order_P, rows = sort_by_expert(place_TK, self._tables.num_places)
        before, here = sum(rows[:first]), rows[first : first + slots]
        if self._load is not None:
            self._load.add(layer, here)
        order_N = order_P[before : before + sum(here)]
        return Dispatched(x_TD.index_select(0, order_N // expert_TK.shape[1]), here, order_N, weight_TK)

    def sum(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        y_PD = y_ND.new_zeros(dispatched.weight_SK.numel(), y_ND.shape[-1])
        y_PD.index_copy_(0, dispatched.order_N, y_ND)
        return weighted_sum(y_PD, dispatched.weight_SK)

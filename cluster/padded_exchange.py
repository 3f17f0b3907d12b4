"""The exchange of decode steps that are captured: shapes are the same in every replay, and nobody asks the device.

    group 0      group 1        each data group padded to as many rows
    t t t x      t x x x        x: no rank has its expert, no rank counts it

    pairs of all rows   r0e5 r0e1 r1e1 r1e7 ...   sorted by this rank's slots; whatever is another rank's comes last

How many rows of each group are there lies on the device, and is read in every replay.

T rows of all groups, E experts, K experts per token, C turns, L this rank's slots, G data groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.all_to_all import TURNS, AllReduce, GroupedAllReduce, SlotTables
from model.comm import Groups
from model.device_exchange import Listed, padded_alone
from model.exchange import Dispatched, Exchange, OneRank, SlotLoad


class PaddedExchange:
    """Of one placement in one group of ranks."""

    def __init__(self, groups: Groups, tables: SlotTables, load: SlotLoad) -> None:
        self._groups = groups
        self._tables = tables
        self._load = load
        self._slot_layers = tables.own_slots(groups.world.rank)
        self._share = tables.slices / groups.world.size

    def __call__(self, rows: int, tokens_G: Tensor) -> Exchange:
        """Of a step of so many rows in every group, tokens_G of which are there."""
        if self._groups.world.size == 1:
            return padded_alone(OneRank(self._tables.num_experts, self._load))(rows, tokens_G)
        own = ListedPairs(self._slot_layers, self._tables, self._share, rows, tokens_G, self._load)
        if len(tokens_G) == 1:
            return AllReduce(self._groups.world, own)
        return GroupedAllReduce(self._groups, [rows] * len(tokens_G), own)


class ListedPairs:
    """Of the pairs of all rows, those of this rank's slots, listed: kernels find the rows where they lie."""

    def __init__(
        self,
        slot_layers: list[Tensor],
        tables: SlotTables,
        share: float,
        rows: int,
        tokens_G: Tensor,
        load: SlotLoad,
    ) -> None:
        """`slot_layers`: tables.own_slots() of this rank. `share`: of all pairs, those it is likely to have."""
        self._slot_layers = slot_layers
        self._num_slots = tables.slots_per_rank
        self._share = share
        self._load = load
        row_T = torch.arange(len(tokens_G) * rows, device=tokens_G.device)
        there_GR = torch.arange(rows, device=tokens_G.device) < tokens_G[:, None]
        self._turn_T1 = torch.where(there_GR.flatten(), row_T % TURNS, TURNS)[:, None]

    def take(self, layer: int, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Listed:
        from model.kernels.routing import sort_pairs

        slot_TK = self._slot_layers[layer][expert_TK, self._turn_T1]
        counts = self._load.on_device(x_TD.device)[layer]
        order_P, first = sort_pairs(slot_TK, self._num_slots + 1, counts)  # others' pairs are those of one slot more
        return Listed(x_TD, [], order_P, weight_TK, first_L=first[: self._num_slots + 1], share=self._share)

    def sum(self, dispatched: Dispatched, y_TKD: Tensor) -> Tensor:
        """This rank's part of every row's output. Experts have weighed it."""
        return y_TKD.sum(1)

"""Do all experts and collectives still give what they gave? Made-up rows, one for each slot, from every rank.

    known row ──reduce──▶ dispatch to the slot ──its expert──▶ combine ──gather──▶ compared with its answer at loading

A step with tokens proves only the slots that were chosen. Ranks that find something wrong say so after the last
collective, so that nobody waits for them.

S: this rank's rows.  T: those of its tensor group.  D: model width.  L: layers.  Q: slots of one layer.  R: ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.all_to_all import SlotTables
from cluster.held_experts import HeldExperts, known_row
from cluster.placement import Placement
from model.comm import Groups
from model.exchange import Exchange
from model.mixtral import Mixtral

# Of an answer's largest value: for another number of rows a kernel may add in another order, and no more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def slots_as_experts(placement: Placement) -> Placement:
    """The same slots, each with an expert of its own, so that every replica can be asked for."""
    layers = len(placement.expert_of)
    slots = tuple(range(placement.num_slots))
    return Placement(placement.num_ranks, placement.slots_per_rank, (slots,) * layers, placement.slices)


def tokens_of_groups(placement: Placement, groups: Groups) -> tuple[int, ...]:
    """So many that each rank's share has one row for every slot."""
    return (placement.num_slots * groups.tensor.size,) * (groups.world.size // groups.tensor.size)


class Canary:
    """Of one placement in one group of ranks. Constructing it is a collective: every rank learns all answers."""

    def __init__(self, held: HeldExperts, rank: int, groups: Groups) -> None:
        self._placement = held.placement
        self.tables = SlotTables(slots_as_experts(held.placement), held.weights.norm_D.device)
        self._groups = groups
        norm_D = held.weights.norm_D
        self._row_1D = known_row(len(norm_D), norm_D.dtype, norm_D.device)
        layers = enumerate(held.placement.slots_of(rank))
        own = torch.stack([held.answers[layer, expert] for layer, experts in layers for expert in experts])
        everybody = groups.world.all_gather(own, [len(own)] * groups.world.size)
        # (R, L, slots of a rank, D): slices of one slot are neighbours and add up, ranks follow one another in a layer.
        layers_first = everybody.view(
            -1, held.placement.slices, len(held.placement.expert_of), held.placement.slots_per_rank, len(norm_D)
        ).sum(1)
        self._answer_LQD = layers_first.transpose(0, 1).flatten(1, 2)

    def fault(self, model: Mixtral, exchange: Exchange) -> str | None:
        """One pass through all layers; what is wrong, if something is. `exchange` knows slots as experts."""
        tensor = self._groups.tensor
        num_tokens = tokens_of_groups(self._placement, self._groups)[0]
        x_TD = self._row_1D.expand(num_tokens, -1)
        wrong_LT = []
        for layer, answer_QD in enumerate(self._answer_LQD):
            # Only one rank has the row: the others add nothing, and get it back.
            x_SD = exchange.reduce((x_TD if tensor.rank == 0 else torch.zeros_like(x_TD)).clone())
            slot_S1 = (torch.arange(len(x_SD), device=x_SD.device) % len(answer_QD))[:, None]
            weight_S1 = torch.ones_like(slot_S1, dtype=torch.float32)
            y_SD = model.probe(layer, x_SD, slot_S1, weight_S1, exchange)
            y_TD = exchange.gather(y_SD.to(x_SD.dtype)).float()
            wrong_LT.append(self._differs(y_TD, answer_QD.repeat(len(y_TD) // len(answer_QD), 1)))
        found = torch.stack(wrong_LT).view(len(wrong_LT), -1, self._placement.num_slots).any(1).nonzero().tolist()
        return self._sentence(found) if found else None

    def _differs(self, y_TD: Tensor, answer_TD: Tensor) -> Tensor:
        """Which rows do. NaN does, for it is not within anything."""
        within_T = answer_TD.abs().amax(1) * TOLERANCE[self._row_1D.dtype]
        return ~((y_TD - answer_TD).abs().amax(1) <= within_T)

    def _sentence(self, found: list[tuple[int, int]]) -> str:
        """Names the first layer where something is wrong, for what comes after may follow from it."""
        first = found[0][0]
        layer, holders = self._placement.expert_of[first], self._placement.holders
        slots = [slot for number, slot in found if number == first]
        named = ", ".join(f"expert {layer[slot]} (rank {'+'.join(map(str, holders(slot)))})" for slot in slots)
        return f"in layer {first} not what was given when they were loaded: {named}"

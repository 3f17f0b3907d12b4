"""Which expert sits in which slot of which rank. Pure: knows no tensors and moves nothing.

    8 experts on 2 ranks, one layer          3 experts on 2 ranks: a slot is left over, so one expert has a replica
    rank 0: [0 1 2 3]  rank 1: [4 5 6 7]     rank 0: [0 1]  rank 1: [2 0]

Global slots are numbered rank by rank: slot = rank * slots_per_rank + local slot.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    num_ranks: int
    slots_per_rank: int
    expert_of: tuple[tuple[int, ...], ...]  # per layer, the expert in each global slot

    def slots_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts in one rank's slots."""
        first = rank * self.slots_per_rank
        return tuple(layer[first : first + self.slots_per_rank] for layer in self.expert_of)

    def slot_for(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Per layer, the global slot to which a rank sends each expert's rows: ranks spread over replicas."""
        tables = []
        for layer in self.expert_of:
            slots: list[list[int]] = [[] for _ in range(max(layer) + 1)]
            for slot, expert in enumerate(layer):
                slots[expert].append(slot)
            tables.append(tuple(replicas[rank % len(replicas)] for replicas in slots))
        return tuple(tables)


def even_placement(num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """Experts in order, the same in every layer; slots left over repeat the first experts."""
    slots_per_rank = -(-num_experts // num_ranks)
    layer = tuple(slot % num_experts for slot in range(num_ranks * slots_per_rank))
    return Placement(num_ranks, slots_per_rank, (layer,) * num_layers)

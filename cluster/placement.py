"""Which expert sits in which slot of which ranks. Pure: knows no tensors and moves nothing.

    8 experts on 2 ranks        the same with a spare slot      3 experts on 4 ranks
    rank 0: [0 1 2 3]           rank 0: [0 1 2 3 4]             rank 0: [0]  rank 1: [0]
    rank 1: [4 5 6 7]           rank 1: [4 5 6 7 0]             rank 2: [1]  rank 3: [2]

A slot belongs to one rank, or where experts are sliced to `slices` neighbouring ranks, each with a part of its expert:

    8 experts on 4 ranks in 2 slices    ranks 0 and 1: [0 1 2 3]    ranks 2 and 3: [4 5 6 7]

Slots are numbered over all ranks: slot = rank // slices * slots_per_rank + place.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    num_ranks: int
    slots_per_rank: int
    expert_of: tuple[tuple[int, ...], ...]  # per layer, the expert in each slot
    slices: int = 1  # parts each expert is cut into
    number: int = 0  # which placement of this engine's life it is; plans name it

    @property
    def num_slots(self) -> int:
        """In one layer."""
        return self.num_ranks // self.slices * self.slots_per_rank

    def slots_of(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Per layer, the experts in one rank's slots."""
        first = rank // self.slices * self.slots_per_rank
        return tuple(layer[first : first + self.slots_per_rank] for layer in self.expert_of)

    def holders(self, slot: int) -> range:
        """The ranks that hold the expert in a slot, slice by slice."""
        first = slot // self.slots_per_rank * self.slices
        return range(first, first + self.slices)

    def replicas(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """For every expert the slots it sits in."""
        slots: list[list[int]] = [[] for _ in range(max(self.expert_of[layer]) + 1)]
        for slot, expert in enumerate(self.expert_of[layer]):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))


def even_placement(
    num_layers: int, num_experts: int, num_ranks: int, slices: int = 1, spare_slots: int = 0
) -> Placement:
    """The same in every layer: each rank holds a window of the experts in a ring, and overlaps are replicas.

    Windows begin at even distances, so every rank has as much to do where every expert has.
    """
    holders = num_ranks // slices
    slots_per_rank = -(-num_experts // holders) + spare_slots
    starts = [holder * num_experts // holders for holder in range(holders)]
    layer = tuple((start + place) % num_experts for start in starts for place in range(slots_per_rank))
    return Placement(num_ranks, slots_per_rank, (layer,) * num_layers, slices)

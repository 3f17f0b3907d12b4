"""Which part of a checkpoint one rank holds. Said from outside; the model only follows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor-parallel slice of attention and vocabulary, and the experts in this rank's slots.

    The default is the whole model in one process.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    slots: tuple[tuple[int, ...], ...] | None = None  # per layer, the expert in each local slot; None: all, in order

    def experts(self, layer: int, num_experts: int) -> tuple[int, ...]:
        return tuple(range(num_experts)) if self.slots is None else self.slots[layer]

"""Which part of a checkpoint one rank holds. Said from outside; the model only follows it.

F: ffn width.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.comm import split_rows
from model.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shard:
    """A tensor-parallel slice of attention and vocabulary, and the experts in this rank's slots, whole or sliced.

    The default is the whole model in one process.
    """

    tensor_rank: int = 0
    tensor_size: int = 1
    slots: tuple[tuple[int, ...], ...] | None = None  # per layer, the expert in each local slot; None: all, in order
    # Which slice of every expert in these slots, and of how many. Outputs of all slices add up to the expert's.
    expert_slice: int = 0
    expert_slices: int = 1

    def experts(self, layer: int, num_experts: int) -> tuple[int, ...]:
        return tuple(range(num_experts)) if self.slots is None else self.slots[layer]

    def ffn_rows(self, intermediate_size: int) -> range:
        """The rows of an expert's gate and up that this rank holds; of down they are the columns.

        F = 7 in 2 slices:   gate, up  0 1 2 3 | 4 5 6     down  0 1 2 3 | 4 5 6
        """
        if self.expert_slices > intermediate_size:
            raise ConfigError(
                f"{self.expert_slices} slices of each expert do not fit intermediate_size {intermediate_size}: "
                "spread whole experts over more ranks"
            )
        rows = split_rows(intermediate_size, self.expert_slices)
        first = sum(rows[: self.expert_slice])
        return range(first, first + rows[self.expert_slice])

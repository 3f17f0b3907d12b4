"""The exchange of a single process on a device that nobody waits for: how many rows each expert has stays there.

    Dispatched   rows have moved into slot order, and the host knows how many each slot has
    Listed       nothing has moved: pairs are listed by slot, and kernels read and write rows where they lie

S: tokens.  P: token-expert pairs, S * K.  L: slots.  D: model width.  K: experts per token.  G: data groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from model.exchange import Dispatched, OneRank

# Experts of pairs, number of experts, counts to be added to -> the pairs' order, where each expert's begin in it
SortPairs = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed(Dispatched):
    """Here x_ND is the share itself, (S, D), and order_N all its pairs, int32, slot after slot; rows is empty.

    first_L   where each slot's pairs begin in order_N, and where the last one's end: int32, one more than slots
    share     of all pairs, those that are likely to have their slot here; 1: every pair has
    """

    first_L: Tensor
    share: float = 1.0


class OneDevice:
    """The exchange that OneRank is, for experts that find their rows themselves."""

    def __init__(self, alone: OneRank, sort_pairs: SortPairs) -> None:
        self._num_experts = alone.num_experts
        self._load = alone.load
        self._sort_pairs = sort_pairs

    def share(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def reduce(self, partial_TD: Tensor) -> Tensor:
        return partial_TD

    def gather(self, x_SD: Tensor) -> Tensor:
        return x_SD

    def dispatch(self, layer: int, x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor) -> Listed:
        counts_E = None if self._load is None else self._load.on_device(x_SD.device)[layer, : self._num_experts]
        order_P, first_L = self._sort_pairs(expert_SK, self._num_experts, counts_E)
        return Listed(x_SD, [], order_P, weight_SK, first_L=first_L)

    def combine(self, dispatched: Dispatched, y_ND: Tensor) -> Tensor:
        """What experts make of a Listed is weighted and in its tokens' places, (S, K, D); the next norm adds it up."""
        return y_ND


def padded_alone(alone: OneRank) -> Callable[[int, Tensor], OneDevice]:
    """The exchange of steps with padding: only so many tokens, one number on the device, are to be computed."""
    from model.kernels.routing import sort_pairs

    return lambda rows, tokens_G: OneDevice(alone, partial(sort_pairs, tokens=tokens_G))

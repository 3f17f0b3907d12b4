"""How much each expert is used lately. Pure: rows counted by the ranks come in, with the time; shares go out.

    rows of every slot ──add──▶ kept per slot, halved every HALF_LIFE_S ──status──▶ share of each expert, imbalance

One thread adds, any may read: what is kept is replaced whole, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.messages import ExpertsStatus
from cluster.placement import Placement

HALF_LIFE_S = 30.0

Rows = tuple[tuple[float, ...], ...]  # per layer and slot


@dataclass(frozen=True, slots=True)
class _Kept:
    placement: Placement
    rows: Rows
    at: float  # when rows came last


class ExpertLoad:
    def __init__(self, placement: Placement, now: float) -> None:
        self._kept = _Kept(placement, tuple((0.0,) * len(layer) for layer in placement.expert_of), now)

    @property
    def placement(self) -> Placement:
        return self._kept.placement

    def add(self, slot_rows: Sequence[Sequence[int]], now: float) -> None:
        """So many rows have been computed in every slot since the last time, under the present placement."""
        kept = self._kept
        left = 0.5 ** ((now - kept.at) / HALF_LIFE_S)
        rows = tuple(
            tuple(old * left + new for old, new in zip(*layer, strict=True))
            for layer in zip(kept.rows, slot_rows, strict=True)
        )
        self._kept = replace(kept, rows=rows, at=now)

    def move(self, placement: Placement) -> None:
        """Experts sit elsewhere from now on; what is known of each goes with it, in even parts to its replicas."""
        rows = []
        for layer, loads in enumerate(self.rows()):
            slots = placement.replicas(layer)
            rows.append(tuple(loads[expert] / len(slots[expert]) for expert in placement.expert_of[layer]))
        self._kept = replace(self._kept, placement=placement, rows=tuple(rows))

    def rows(self) -> Rows:
        """Per layer and expert, what is left of the rows it has had."""
        return _by_expert(self._kept)

    def status(self) -> ExpertsStatus:
        kept = self._kept
        placement = kept.placement
        return ExpertsStatus(
            placement.number,
            placement.slices,
            ranks=tuple(_ranks_of(placement, layer) for layer in range(len(placement.expert_of))),
            load=tuple(_shares(loads) for loads in _by_expert(kept)),
            imbalance=tuple(_imbalance(loads, placement.slots_per_rank) for loads in kept.rows),
        )


def _by_expert(kept: _Kept) -> Rows:
    return tuple(
        tuple(sum(loads[slot] for slot in slots) for slots in kept.placement.replicas(layer))
        for layer, loads in enumerate(kept.rows)
    )


def _ranks_of(placement: Placement, layer: int) -> tuple[tuple[int, ...], ...]:
    """For every expert the ranks that hold it, or a slice of it."""
    return tuple(
        tuple(sorted({rank for slot in slots for rank in placement.holders(slot)}))
        for slots in placement.replicas(layer)
    )


def _shares(loads: Sequence[float]) -> tuple[float, ...]:
    total = sum(loads)
    return tuple(load / total if total else 0.0 for load in loads)


def _imbalance(loads: Sequence[float], slots_per_rank: int) -> float:
    """Rows of the busiest rank over the mean of all. The slices of a slot all compute its rows: they are no busier."""
    ranks = [sum(loads[first : first + slots_per_rank]) for first in range(0, len(loads), slots_per_rank)]
    return max(ranks) * len(ranks) / sum(ranks) if any(ranks) else 1.0

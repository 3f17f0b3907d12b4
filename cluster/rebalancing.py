"""Where experts should sit, given how much each is used. Pure: from one placement and the load to another placement.

    load  e0 60  e1 20  e2 10  e3 10, two ranks of three slots
    1. every expert has one slot; each slot left over goes to the expert with the most rows per slot: e0 gets two more
    2. the heaviest first, each to the rank with the fewest rows so far that has room and does not have it yet:
       rank 0: e0 (30) e1 (20)      rank 1: e0 (30) e2 (10) e3 (10)

Ranks that hold an expert already are preferred where that costs little, so that few weights move; and a layer that
would not become more even stays as it is. Layers are independent of each other.

"Rank" here is one or, where experts are sliced, the ranks that share the slices of a slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.placement import Placement

PREFERENCE = 0.02  # of the mean load of a rank: what not moving an expert may cost
WORTH_MOVING = 0.01  # of the imbalance: for less, a layer is left alone


@dataclass(frozen=True, slots=True)
class Rebalancing:
    """What moving experts would do, or has done."""

    placement: Placement
    moves: int  # slots that hold another expert than before
    before: tuple[float, ...]  # per layer, the load of the busiest rank over the mean
    after: tuple[float, ...]  # by the load that was seen


def rebalance(placement: Placement, load: Sequence[Sequence[float]]) -> Rebalancing:
    """`load`: per layer and expert."""
    layers, before, after = [], [], []
    for experts, loads in zip(placement.expert_of, load, strict=True):
        now = imbalance(experts, loads, placement.slots_per_rank)
        moved = _spread(experts, loads, placement.slots_per_rank)
        then = imbalance(moved, loads, placement.slots_per_rank)
        if then > now * (1 - WORTH_MOVING):
            moved, then = experts, now
        layers.append(moved)
        before.append(now)
        after.append(then)
    pairs = zip(placement.expert_of, layers, strict=True)
    moves = sum(one != other for old, new in pairs for one, other in zip(old, new, strict=True))
    wanted = replace(placement, expert_of=tuple(layers), number=placement.number + 1)
    return Rebalancing(wanted if moves else placement, moves, tuple(before), tuple(after))


def imbalance(experts: Sequence[int], loads: Sequence[float], slots_per_rank: int) -> float:
    """Rows of the busiest rank over the mean, if the rows of an expert are spread evenly over its slots."""
    slots = [experts.count(expert) for expert in range(len(loads))]
    rows = [loads[expert] / slots[expert] for expert in experts]
    ranks = [sum(rows[first : first + slots_per_rank]) for first in range(0, len(rows), slots_per_rank)]
    return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0


def _spread(experts: Sequence[int], loads: Sequence[float], slots_per_rank: int) -> tuple[int, ...]:
    """One layer anew."""
    num_ranks = len(experts) // slots_per_rank
    held = [experts[first : first + slots_per_rank] for first in range(0, len(experts), slots_per_rank)]
    slots = _slots_of_experts(loads, len(experts), num_ranks)
    heaviest = sorted(range(len(loads)), key=lambda expert: (-loads[expert] / slots[expert], expert))
    tolerance = PREFERENCE * sum(loads) / num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    rows = [0.0] * num_ranks
    for expert in (e for e in heaviest for _ in range(slots[e])):
        room = [r for r in range(num_ranks) if len(ranks[r]) < slots_per_rank]
        fresh = [r for r in room if expert not in ranks[r]] or room
        least = min(rows[r] for r in fresh)
        near = [r for r in fresh if rows[r] <= least + tolerance]
        rank = min(near, key=lambda r: (held[r].count(expert) <= ranks[r].count(expert), rows[r], r))
        ranks[rank].append(expert)
        rows[rank] += loads[expert] / slots[expert]
    return tuple(expert for old, new in zip(held, ranks, strict=True) for expert in _in_place(old, new))


def _slots_of_experts(loads: Sequence[float], num_slots: int, num_ranks: int) -> list[int]:
    """How many slots each expert gets: more than one on a rank would be of no use."""
    slots = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        useful = [e for e in range(len(loads)) if slots[e] < num_ranks] or list(range(len(loads)))
        slots[max(useful, key=lambda expert: (loads[expert] / slots[expert], -expert))] += 1
    return slots


def _in_place(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """The same experts as `new`, those that stay in their slots."""
    coming = list(new)
    placed: list[int | None] = []
    for expert in old:
        stays = expert in coming
        placed.append(expert if stays else None)
        if stays:
            coming.remove(expert)
    return [coming.pop() if expert is None else expert for expert in placed]

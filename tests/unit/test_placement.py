from __future__ import annotations

from collections import Counter

import pytest

from cluster.placement import even_placement


def test_experts_are_dealt_in_order() -> None:
    placement = even_placement(num_layers=2, num_experts=8, num_ranks=2)
    assert placement.slots_of(0) == ((0, 1, 2, 3),) * 2
    assert placement.slots_of(1) == ((4, 5, 6, 7),) * 2
    assert placement.replicas(1) == tuple((expert,) for expert in range(8))
    assert placement.num_slots == 8


def test_slots_left_over_hold_replicas() -> None:
    placement = even_placement(num_layers=1, num_experts=2, num_ranks=4)
    assert placement.expert_of == ((0, 0, 1, 1),)
    assert placement.replicas(0) == ((0, 1), (2, 3))
    assert Counter(even_placement(1, 8, 16).expert_of[0]) == dict.fromkeys(range(8), 2)


def test_all_slices_of_an_expert_are_neighbours() -> None:
    placement = even_placement(num_layers=1, num_experts=8, num_ranks=4, slices=2)
    assert placement.num_slots == 8
    assert placement.slots_of(0) == placement.slots_of(1) == ((0, 1, 2, 3),)
    assert placement.slots_of(2) == placement.slots_of(3) == ((4, 5, 6, 7),)
    assert [list(placement.holders(slot)) for slot in (0, 3, 4)] == [[0, 1], [0, 1], [2, 3]]


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("experts", range(1, 17))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_expert_is_somewhere_and_ranks_are_even(experts: int, ranks: int, spare: int) -> None:
    placement = even_placement(1, experts, ranks, spare_slots=spare)
    assert placement.slots_per_rank == -(-experts // ranks) + spare
    assert placement.num_slots == len(placement.expert_of[0])
    replicas = placement.replicas(0)
    assert len(replicas) == experts
    assert all(placement.expert_of[0][slot] == expert for expert, slots in enumerate(replicas) for slot in slots)
    # Where a rank has no room for all, none holds an expert twice. Where experts divide, all have as much to do.
    if placement.slots_per_rank <= experts:
        assert all(len(set(placement.slots_of(rank)[0])) == placement.slots_per_rank for rank in range(ranks))
    if experts % ranks == 0:
        work = [sum(1 / len(replicas[expert]) for expert in placement.slots_of(rank)[0]) for rank in range(ranks)]
        assert work == pytest.approx([experts / ranks] * ranks)

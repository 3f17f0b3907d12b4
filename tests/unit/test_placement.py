from __future__ import annotations

import pytest

from cluster.placement import even_placement


def test_experts_are_dealt_in_order() -> None:
    placement = even_placement(num_layers=2, num_experts=8, num_ranks=2)
    assert placement.slots_of(0) == ((0, 1, 2, 3),) * 2
    assert placement.slots_of(1) == ((4, 5, 6, 7),) * 2
    assert placement.slot_for(0) == placement.slot_for(1) == (tuple(range(8)),) * 2


def test_left_over_slots_hold_replicas_and_ranks_spread_over_them() -> None:
    placement = even_placement(num_layers=1, num_experts=2, num_ranks=4)
    assert placement.expert_of == ((0, 1, 0, 1),)
    assert [placement.slot_for(rank)[0] for rank in range(4)] == [(0, 1), (2, 3), (0, 1), (2, 3)]


@pytest.mark.parametrize("experts", range(1, 17))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_rank_reaches_every_expert(experts: int, ranks: int) -> None:
    placement = even_placement(1, experts, ranks)
    for rank in range(ranks):
        slots = placement.slot_for(rank)[0]
        assert [placement.expert_of[0][slot] for slot in slots] == list(range(experts))

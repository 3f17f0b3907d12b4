"""Placements from load: always complete, never worse, close to even where that is possible, and still when it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement, even_placement
from cluster.rebalancing import imbalance, rebalance


@st.composite
def loaded(draw: st.DrawFn) -> tuple[Placement, list[list[float]]]:
    """Any number of experts, ranks, slices and spare slots, and any load."""
    num_experts, holders = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    slices, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    spare = draw(st.integers(0, 3))
    loads = st.lists(st.floats(0, 1e6), min_size=num_experts, max_size=num_experts)
    placement = even_placement(layers, num_experts, holders * slices, slices=slices, spare_slots=spare)
    return placement, [draw(loads) for _ in range(layers)]


@given(loaded())
def test_every_expert_has_a_slot_and_every_slot_an_expert(case: tuple[Placement, list[list[float]]]) -> None:
    placement, load = case
    moved = rebalance(placement, load)
    assert (moved.placement.num_slots, moved.placement.slices) == (placement.num_slots, placement.slices)
    for experts, loads in zip(moved.placement.expert_of, load, strict=True):
        assert len(experts) == placement.num_slots
        assert set(experts) == set(range(len(loads)))


@given(loaded())
def test_no_layer_becomes_less_even_and_what_is_promised_is_so(case: tuple[Placement, list[list[float]]]) -> None:
    placement, load = case
    moved = rebalance(placement, load)
    for layer, loads in enumerate(load):
        assert moved.after[layer] <= moved.before[layer]
        then = imbalance(moved.placement.expert_of[layer], loads, placement.slots_per_rank)
        assert then == pytest.approx(moved.after[layer])


@given(loaded())
def test_moves_are_counted_and_no_move_is_no_new_placement(case: tuple[Placement, list[list[float]]]) -> None:
    placement, load = case
    moved = rebalance(placement, load)
    pairs = zip(placement.expert_of, moved.placement.expert_of, strict=True)
    assert moved.moves == sum(a != b for old, new in pairs for a, b in zip(old, new, strict=True))
    assert moved.placement.number == placement.number + bool(moved.moves)


@given(loaded())
def test_experts_come_to_rest(case: tuple[Placement, list[list[float]]]) -> None:
    placement, load = case
    for _ in range(10):
        moved = rebalance(placement, load)
        placement = moved.placement
    assert moved.moves == 0


@given(loaded())
def test_a_spare_slot_for_a_second_home_is_used_on_another_rank(case: tuple[Placement, list[list[float]]]) -> None:
    placement, load = case
    size, ranks = placement.slots_per_rank, placement.num_slots // placement.slots_per_rank
    moved = rebalance(placement, load).placement
    for old, experts in zip(placement.expert_of, moved.expert_of, strict=True):
        if experts is not old and placement.num_slots <= ranks * (max(old) + 1):
            for first in range(0, len(experts), size):
                assert len(set(experts[first : first + size])) == size


def test_one_hot_expert_gets_the_spare_slots() -> None:
    placement = even_placement(1, 4, 2, spare_slots=1)
    moved = rebalance(placement, [[60.0, 20.0, 10.0, 10.0]])
    assert moved.placement.expert_of[0].count(0) == 2
    assert moved.after[0] == pytest.approx(1.0)


def test_without_spare_slots_hot_experts_are_kept_apart() -> None:
    placement = even_placement(1, 8, 2)
    moved = rebalance(placement, [[30.0, 30.0, 5.0, 5.0, 10.0, 10.0, 5.0, 5.0]])
    assert moved.before[0] == pytest.approx(1.4)
    assert moved.after[0] == pytest.approx(1.0)
    assert moved.moves <= 4


def test_no_load_moves_nothing() -> None:
    placement = even_placement(2, 8, 2)
    moved = rebalance(placement, [[0.0] * 8] * 2)
    assert moved.moves == 0
    assert moved.placement is placement
    assert moved.before == (1.0, 1.0)

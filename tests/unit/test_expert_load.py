from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.expert_load import HALF_LIFE_S, ExpertLoad
from cluster.placement import Placement

PLAIN = Placement(2, 2, ((0, 1, 2, 3), (0, 1, 2, 3)))
REPLICAS = Placement(2, 3, ((0, 1, 2, 3, 0, 1), (0, 1, 2, 3, 3, 2)), number=1)


def test_before_the_first_rows_nothing_is_busy() -> None:
    status = ExpertLoad(PLAIN, 0.0).status()
    assert status.load == ((0.0,) * 4,) * 2
    assert status.imbalance == (1.0, 1.0)
    assert status.placement == 0
    assert status.ranks[0] == ((0,), (0,), (1,), (1,))


def test_shares_are_of_each_layer() -> None:
    load = ExpertLoad(PLAIN, 0.0)
    load.add([[6, 2, 0, 0], [1, 1, 1, 1]], 1.0)
    status = load.status()
    assert status.load == ((0.75, 0.25, 0.0, 0.0), (0.25,) * 4)
    assert status.imbalance == (2.0, 1.0)


def test_what_was_long_ago_counts_less() -> None:
    load = ExpertLoad(PLAIN, 0.0)
    load.add([[8, 0, 0, 0]] * 2, 1.0)
    load.add([[0, 4, 0, 0]] * 2, 1.0 + HALF_LIFE_S)
    assert load.rows()[0] == (4.0, 4.0, 0.0, 0.0)
    assert load.status().load[0] == (0.5, 0.5, 0.0, 0.0)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=20))
def test_a_steady_load_looks_the_same_however_often_it_is_reported(pauses: list[float]) -> None:
    load, now = ExpertLoad(PLAIN, 0.0), 0.0
    for pause in pauses:
        now += pause
        load.add([[3, 1, 0, 4], [2, 2, 2, 2]], now)
    assert load.status().load == (pytest.approx((0.375, 0.125, 0.0, 0.5)), pytest.approx((0.25,) * 4))


def test_replicas_are_one_expert_on_several_ranks() -> None:
    load = ExpertLoad(REPLICAS, 0.0)
    load.add([[1, 2, 3, 4, 5, 5], [1] * 6], 1.0)
    status = load.status()
    assert status.ranks[0] == ((0, 1), (0, 1), (0,), (1,))
    assert status.load[0] == (0.3, 0.35, 0.15, 0.2)
    assert status.imbalance[0] == pytest.approx(14 / 10)


def test_slices_of_an_expert_are_on_neighbouring_ranks() -> None:
    load = ExpertLoad(Placement(4, 2, ((0, 1, 2, 3),), slices=2), 0.0)
    load.add([[1, 1, 3, 3]], 1.0)
    status = load.status()
    assert status.slices == 2
    assert status.ranks == (((0, 1), (0, 1), (2, 3), (2, 3)),)
    assert status.imbalance == (1.5,)


def test_experts_take_their_load_with_them() -> None:
    load = ExpertLoad(PLAIN, 0.0)
    load.add([[6, 2, 0, 0], [1, 2, 3, 4]], 1.0)
    before = load.rows()
    load.move(REPLICAS)
    assert load.rows() == before
    assert load.placement is REPLICAS
    status = load.status()
    assert status.placement == 1
    assert status.imbalance[0] == 1.0, "both busy experts are on both ranks"

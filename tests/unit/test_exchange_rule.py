from __future__ import annotations

from cluster.config import ParallelConfig
from cluster.exchange_rule import ALL_TO_ALL_FROM, choose_exchange


def test_one_rank_exchanges_nothing() -> None:
    assert choose_exchange(ParallelConfig(tensor=1, exchange="all_to_all"), 1000) == "none"


def test_data_groups_exchange_even_where_attention_is_not_sliced() -> None:
    assert choose_exchange(ParallelConfig(data=2), 1) == "all_reduce"
    assert choose_exchange(ParallelConfig(data=2), ALL_TO_ALL_FROM) == "all_to_all"


def test_the_operator_decides() -> None:
    assert choose_exchange(ParallelConfig(tensor=2, exchange="all_to_all"), 1) == "all_to_all"
    assert choose_exchange(ParallelConfig(tensor=2, exchange="all_reduce"), 1000) == "all_reduce"


def test_auto_goes_by_the_size_of_the_step() -> None:
    auto = ParallelConfig(tensor=2)
    assert choose_exchange(auto, ALL_TO_ALL_FROM - 1) == "all_reduce"
    assert choose_exchange(auto, ALL_TO_ALL_FROM) == "all_to_all"

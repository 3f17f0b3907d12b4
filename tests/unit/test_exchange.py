"""Rows into expert order and back, in one process."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.exchange import OneRank, sort_by_expert, weighted_sum


def test_the_example_of_the_docstring() -> None:
    order_P, rows = sort_by_expert(torch.tensor([[2, 0], [0, 1]]), 3)
    assert order_P.tolist() == [1, 2, 3, 0]
    assert rows == [2, 1, 1]


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 12))
def test_dispatch_groups_rows_by_expert_and_combine_restores_them(
    data: st.DataObject, num_experts: int, tokens: int
) -> None:
    K = data.draw(st.integers(1, num_experts))
    chosen = [data.draw(st.permutations(range(num_experts)))[:K] for _ in range(tokens)]
    expert_SK = torch.tensor(chosen, dtype=torch.int64).view(tokens, K)
    x_SD = torch.arange(1.0, tokens + 1).view(tokens, 1)
    weight_SK = torch.rand(tokens, K, generator=torch.Generator().manual_seed(tokens))
    exchange = OneRank(num_experts)
    dispatched = exchange.dispatch(0, x_SD, expert_SK, weight_SK)
    assert dispatched.rows == [(expert_SK == expert).sum().item() for expert in range(num_experts)]
    # Within an expert, tokens keep their order; so each expert's rows are its tokens, ascending.
    expected = [token + 1 for expert in range(num_experts) for token in range(tokens) if expert in chosen[token]]
    assert dispatched.x_ND.flatten().tolist() == expected
    # Expert e multiplies by 10 ** e: what comes back says which experts a token saw, and with what weight.
    scale_N1 = torch.cat([torch.full((rows, 1), 10.0**e) for e, rows in enumerate(dispatched.rows)])
    found = exchange.combine(dispatched, dispatched.x_ND * scale_N1)
    torch.testing.assert_close(found, x_SD * (weight_SK * 10.0**expert_SK).sum(1, keepdim=True))


def test_outputs_add_up_in_routing_order() -> None:
    # (1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1: the order can be told from the sum.
    ones = torch.ones(1, 3)
    assert weighted_sum(torch.tensor([[1e8], [1.0], [-1e8]]), ones).item() == 0.0
    assert weighted_sum(torch.tensor([[1e8], [-1e8], [1.0]]), ones).item() == 1.0


def test_nothing_moves_between_ranks_that_are_not_there() -> None:
    x_TD, exchange = torch.zeros(3, 2), OneRank(4)
    assert exchange.share(x_TD) is exchange.reduce(x_TD) is exchange.gather(x_TD) is x_TD

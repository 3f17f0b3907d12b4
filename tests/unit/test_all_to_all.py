"""Dispatch and combine on several ranks against the loop over experts in one place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.all_to_all import AllReduce, AllToAll, SlotTables
from cluster.placement import even_placement
from cluster.transport.shared_memory import supported
from model.comm import Comm
from model.exchange import OneRank
from tests.threaded_ranks import on_ranks

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory transport is for x86-64 Linux")

D = 6


def routed(T: int, E: int, K: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, K different experts for each, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(T, D, generator=generator)
    expert_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.empty(0, K)
    weight_TK = torch.rand(T, K, generator=generator)
    return x_TD, expert_TK.long(), weight_TK


def expert(number: int, x_nD: Tensor) -> Tensor:
    """Something that neither commutes with the sum nor is the same for two experts."""
    return torch.sin(x_nD * (number + 1)) + number


def definition(x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    rows = [
        sum(weight_TK[t, k] * expert(int(expert_TK[t, k]), x_TD[t]) for k in range(expert_TK.shape[1]))
        for t in range(len(x_TD))
    ]
    return torch.stack(rows) if rows else x_TD  # type: ignore[arg-type]


def compute(x_ND: Tensor, rows: list[int], experts: tuple[int, ...]) -> Tensor:
    assert sum(rows) == len(x_ND)
    return torch.cat([expert(e, part) for e, part in zip(experts, torch.split(x_ND, rows), strict=True)])


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("T", [0, 1, 13])
def test_one_rank(T: int, K: int) -> None:
    x_TD, expert_TK, weight_TK = routed(T, 5, K, seed=T)
    exchange = OneRank(5)
    sent = exchange.dispatch(0, x_TD, expert_TK, weight_TK)
    got = exchange.combine(sent, compute(sent.x_ND, sent.rows, tuple(range(5))))
    torch.testing.assert_close(got, definition(x_TD, expert_TK, weight_TK))


@pytest.mark.parametrize(("ranks", "experts"), [(2, 8), (2, 5), (3, 4), (4, 3)])
@pytest.mark.parametrize("T", [1, 13])
def test_all_to_all(ranks: int, experts: int, T: int) -> None:
    x_TD, expert_TK, weight_TK = routed(T, experts, 2, seed=T)
    placement = even_placement(2, experts, ranks)

    def rank_main(comm: Comm) -> Tensor:
        exchange = AllToAll(comm, SlotTables(placement, comm.rank, x_TD.device), T)
        x_SD, expert_SK, weight_SK = (exchange.share(x) for x in (x_TD, expert_TK, weight_TK))
        sent = exchange.dispatch(1, x_SD, expert_SK, weight_SK)
        y_SD = exchange.combine(sent, compute(sent.x_ND, sent.rows, placement.slots_of(comm.rank)[1]))
        return exchange.gather(y_SD)

    for got in on_ranks(ranks, rank_main):
        torch.testing.assert_close(got, definition(x_TD, expert_TK, weight_TK))


@pytest.mark.parametrize(("ranks", "experts"), [(2, 8), (2, 5), (3, 4), (4, 3)])
@pytest.mark.parametrize("T", [1, 13])
def test_all_reduce(ranks: int, experts: int, T: int) -> None:
    x_TD, expert_TK, weight_TK = routed(T, experts, 2, seed=T)
    placement = even_placement(2, experts, ranks)

    def rank_main(comm: Comm) -> tuple[Tensor, int]:
        exchange = AllReduce(comm, SlotTables(placement, comm.rank, x_TD.device))
        sent = exchange.dispatch(1, exchange.share(x_TD), expert_TK, weight_TK)
        y_TD = exchange.combine(sent, compute(sent.x_ND, sent.rows, placement.slots_of(comm.rank)[1]))
        return exchange.gather(y_TD), len(sent.x_ND)

    results = on_ranks(ranks, rank_main)
    for got, _ in results:
        torch.testing.assert_close(got, definition(x_TD, expert_TK, weight_TK))
        assert torch.equal(got, results[0][0])
    assert sum(rows for _, rows in results) == 2 * T, "every pair is computed once, replicas or not"


def test_the_share_of_the_sum() -> None:
    partial = torch.arange(14.0).view(7, 2)

    def rank_main(comm: Comm) -> tuple[Tensor, Tensor]:
        exchange = AllToAll(comm, SlotTables(even_placement(1, 2, 2), comm.rank, partial.device), 7)
        return exchange.share(partial), exchange.reduce(partial * (comm.rank + 1))

    for share, reduced in on_ranks(2, rank_main):
        assert torch.equal(reduced, share * 3)

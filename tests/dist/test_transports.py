"""Every collective of every transport against what one process computes from all ranks' inputs."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from cluster.rendezvous import Transport, has_shared_memory
from model.comm import Comm, Groups, split_rows
from tests.dist.ranks import run_ranks

D = 5
TRANSPORTS: list[Transport] = ["gloo", *(["shared_memory"] if has_shared_memory() else [])]  # type: ignore[list-item]


def rank_rows(rank: int, rows: int) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(rank))


def every_collective(groups: Groups, total: int) -> dict[str, Tensor]:
    return collectives(groups.world, total)


def collectives(comm: Comm, total: int) -> dict[str, Tensor]:
    rows = split_rows(total, comm.size)
    whole = rank_rows(comm.rank, total)
    send = [(comm.rank + other) % 3 for other in range(comm.size)]
    receive = send  # (source + rank) % 3 is symmetric
    return {
        "all_reduce": comm.all_reduce(whole.clone()),
        "reduce_scatter": comm.reduce_scatter(whole, rows),
        "all_gather": comm.all_gather(whole[: rows[comm.rank]], rows),
        "all_to_all": comm.all_to_all(rank_rows(comm.rank, sum(send)), send, receive),
        "broadcast": comm.broadcast(whole.clone(), comm.size - 1),
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("total", [0, 1, 7])  # one row: some ranks have none
def test_collectives(transport: Transport, size: int, total: int) -> None:
    results = run_ranks(size, every_collective, total, transport=transport)
    rows = split_rows(total, size)
    wholes = [rank_rows(rank, total) for rank in range(size)]
    summed = torch.stack(wholes).sum(0)
    for rank, result in enumerate(results):
        first = sum(rows[:rank])
        torch.testing.assert_close(result["all_reduce"], summed)
        assert torch.equal(result["all_reduce"], results[0]["all_reduce"])
        torch.testing.assert_close(result["reduce_scatter"], summed[first : first + rows[rank]])
        assert torch.equal(result["all_gather"], torch.cat([w[:n] for w, n in zip(wholes, rows, strict=True)]))
        assert torch.equal(result["broadcast"], wholes[-1])
        expected = []
        for source in range(size):
            counts = [(source + other) % 3 for other in range(size)]
            before = sum(counts[:rank])
            expected.append(rank_rows(source, sum(counts))[before : before + counts[rank]])
        assert torch.equal(result["all_to_all"], torch.cat(expected))


def both_groups(groups: Groups) -> tuple[float, float, bool]:
    """Collectives of the tensor group between those of the world; group 1 has one more of them."""
    mine = torch.full((1, 1), float(groups.world.rank))
    in_group = sum(float(groups.tensor.all_reduce(mine.clone())) for _ in range(1 + groups.world.rank // 2))
    return in_group, float(groups.world.all_reduce(mine.clone())), groups.tensor is groups.world


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tensor_groups_are_groups_of_their_own(transport: Transport) -> None:
    assert run_ranks(4, both_groups, tensor=2, transport=transport) == [(1, 6, False)] * 2 + [(10, 6, False)] * 2
    assert run_ranks(2, both_groups, tensor=1, transport=transport) == [(0, 1, False), (1, 1, False)]
    assert run_ranks(2, both_groups, transport=transport) == [(1, 1, True)] * 2


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_disagreeing_counts_are_our_mistake(transport: Transport) -> None:
    with pytest.raises(AssertionError, match="3 rows to send"):
        run_ranks(2, lambda groups: groups.world.all_to_all(torch.zeros(3, D), [1, 1], [1, 1]), transport=transport)


def lose_a_peer(groups: Groups) -> str:
    comm = groups.world
    if comm.rank == 1:
        os._exit(1)
    try:
        comm.all_reduce(torch.zeros(1, D))
    except (RuntimeError, ConnectionError) as error:
        return f"{error}"
    return "nothing"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dead_peer_raises(transport: Transport) -> None:
    (error,) = run_ranks(2, lose_a_peer, transport=transport, survivors={0}, timeout_s=10)
    assert any(word in error for word in ("died", "closed", "reset")), error

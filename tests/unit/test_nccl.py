"""The NCCL transport over a fake of NCCL: what it asks for, how pieces become rows, how a rank is called out."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cluster.collectives_check import MODES, _RankChecks
from cluster.process_group import Membership
from cluster.transport.nccl import NcclComm
from cluster.transport.nccl_library import NcclError, NcclLibrary
from cluster.transport.shared_memory import PeerLost
from model.comm import Groups, split_rows
from tests.nccl_ranks import STREAM, can_compile, fake_nccl, on_nccl_ranks
from tests.recomputed import Recomputed

pytestmark = pytest.mark.skipif(not can_compile(), reason="the fake NCCL is C: needs gcc")

D = 3


@pytest.fixture(scope="module")
def fake() -> Iterator[ctypes.CDLL]:
    with fake_nccl() as library:
        yield library


@pytest.fixture(scope="module")
def library(fake: ctypes.CDLL) -> NcclLibrary:
    return NcclLibrary(fake)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("total", [0, 1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_arrive_as_they_were(library: NcclLibrary, size: int, total: int, dtype: torch.dtype) -> None:
    rows = split_rows(total, size)
    wholes = [torch.arange(total * D).view(total, D).to(dtype) * (rank + 1) for rank in range(size)]
    summed = torch.stack(wholes).sum(0)
    sent = [[(source + target) % 3 for target in range(size)] for source in range(size)]

    def rank_main(comm: NcclComm) -> list[Tensor]:
        mine = wholes[comm.rank]
        outgoing = torch.cat([torch.full((n, 2), 10 * comm.rank + to) for to, n in enumerate(sent[comm.rank])])
        return [
            comm.all_reduce(mine.clone()),
            comm.reduce_scatter(mine, rows),
            comm.all_gather(mine[: rows[comm.rank]], rows),
            comm.all_gather(mine.T.contiguous().T[: rows[comm.rank]], rows),
            comm.broadcast(mine.clone(), size - 1),
            comm.all_to_all(outgoing, sent[comm.rank], [counts[comm.rank] for counts in sent]),
        ]

    for rank, (reduced, share, gathered, strided, told, swapped) in enumerate(on_nccl_ranks(library, size, rank_main)):
        assert torch.equal(reduced, summed)
        assert torch.equal(share, summed[sum(rows[:rank]) :][: rows[rank]])
        assert torch.equal(gathered, torch.cat([whole[:n] for whole, n in zip(wholes, rows, strict=True)]))
        assert torch.equal(strided, gathered)
        assert torch.equal(told, wholes[-1])
        expected = [10 * source + rank for source, counts in enumerate(sent) for _ in range(counts[rank])]
        assert swapped.tolist() == [[value] * 2 for value in expected]


def test_exchanges_over_it_give_what_they_must(library: NcclLibrary) -> None:
    """What `doctor --collectives` tries."""

    def rank_main(comm: NcclComm) -> None:
        checks = _RankChecks(comm.rank, torch.device("cpu"))
        checks._membership = Membership(Groups(comm, comm), (comm,))
        checks.compare_collectives()
        for mode in MODES:
            checks.compare_exchange(mode)
        checks.compare_captured(Recomputed)

    on_nccl_ranks(library, 3, rank_main)


def test_work_goes_to_the_current_stream(library: NcclLibrary, fake: ctypes.CDLL) -> None:
    def rank_main(comm: NcclComm) -> None:
        comm.all_to_all(torch.zeros(2, 1), [1, 1], [1, 1])

    for size, function in ((1, lambda comm: comm.all_reduce(torch.zeros(1))), (2, rank_main)):
        on_nccl_ranks(library, size, function)
        assert fake.fake_stream() == STREAM


def test_counts_are_checked_before_anybody_hangs(library: NcclLibrary) -> None:
    def rank_main(comm: NcclComm) -> None:
        with pytest.raises(AssertionError, match="3 rows to reduce"):
            comm.reduce_scatter(torch.zeros(3, 1), [1, 1])
        with pytest.raises(AssertionError, match="3 rows to gather, 1 announced"):
            comm.all_gather(torch.zeros(3, 1), [1, 1])
        with pytest.raises(AssertionError, match="3 rows to send"):
            comm.all_to_all(torch.zeros(3, 1), [1, 1], [1, 1])

    on_nccl_ranks(library, 2, rank_main)


def test_what_nccl_refuses_is_one_sentence(library: NcclLibrary) -> None:
    told = "NCCL 2.29.7, ncclCommInitRank: invalid argument: said by the fake"
    with pytest.raises(NcclError, match=f"^{told}$"):
        library.connect(library.unique_id(), 2, 2)

    def rank_main(comm: NcclComm) -> str:
        with pytest.raises(NcclError) as error:
            comm.all_reduce(torch.zeros(1 + comm.rank, 1))
        comm.all_reduce(torch.zeros(1))  # and the next call is a call like any other
        return str(error.value)

    assert all("ncclAllReduce: invalid argument" in error for error in on_nccl_ranks(library, 2, rank_main))


def test_a_refusal_among_calls_together_leaves_no_group_open(library: NcclLibrary) -> None:
    def rank_main(comm: NcclComm) -> None:
        with pytest.raises(NcclError, match="ncclSend: invalid usage"), library.together():
            library.send(0, 1, 1, 99, comm._communicator, 0)
        assert comm.all_to_all(torch.ones(1, 1), [1], [1]).tolist() == [[1]]

    on_nccl_ranks(library, 1, rank_main)


def test_an_abort_calls_out_who_waits_and_refuses_whoever_comes(library: NcclLibrary, fake: ctypes.CDLL) -> None:
    alive = fake.fake_alive()

    def rank_main(comm: NcclComm) -> None:
        if comm.rank == 1:
            return  # never comes
        timer = threading.Timer(0.05, comm.abort)
        timer.start()
        with pytest.raises(NcclError, match="remote process exited"):
            comm.all_reduce(torch.zeros(1))
        comm.abort()  # once is enough
        for call in (lambda: comm.broadcast(torch.zeros(1), 0), lambda: comm.all_gather(torch.zeros(1, 1), [1, 1])):
            with pytest.raises(PeerLost, match="aborted"):
                call()

    on_nccl_ranks(library, 2, rank_main)
    deadline = time.monotonic() + 30
    while fake.fake_alive() > alive + 1 and time.monotonic() < deadline:  # rank 1's is still there
        time.sleep(0.01)
    assert fake.fake_alive() == alive + 1


def test_abort_does_not_wait_for_nccl(library: NcclLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL itself waits until the graphs are gone, which only whoever aborts can drop."""
    graphs_gone, left = threading.Event(), threading.Event()

    def abort(communicator: int) -> None:
        graphs_gone.wait(timeout=30)
        left.set()

    def rank_main(comm: NcclComm) -> None:
        monkeypatch.setattr(library, "abort", abort)
        comm.abort()
        with pytest.raises(PeerLost):
            comm.all_reduce(torch.zeros(1))
        assert not left.is_set()
        graphs_gone.set()
        assert left.wait(timeout=30)

    on_nccl_ranks(library, 1, rank_main)

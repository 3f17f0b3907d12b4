"""What the NCCL transport adds to NCCL: uneven rows. Its backend is pretended to, over shared memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.transport.nccl import NcclComm
from cluster.transport.shared_memory import SharedMemoryComm, supported
from model.comm import split_rows
from tests.threaded_ranks import on_ranks

pytestmark = pytest.mark.skipif(not supported(), reason="shared memory transport is for x86-64 Linux")


class Done:
    def wait(self) -> bool:
        return True


class EvenOnly:
    """A backend that knows even pieces alone, as NCCL does, and checks that it is given them."""

    def __init__(self, comm: SharedMemoryComm) -> None:
        self._comm = comm
        self.calls = 0

    def rank(self) -> int:
        return self._comm.rank

    def size(self) -> int:
        return self._comm.size

    def abort(self) -> None:
        self._comm.abort()

    def allreduce(self, tensors: list[Tensor]) -> Done:
        tensors[0].copy_(self._comm.all_reduce(tensors[0].clone()))
        return self._done(tensors[0])

    def broadcast(self, tensors: list[Tensor], options: Any) -> Done:
        tensors[0].copy_(self._comm.broadcast(tensors[0].clone(), options.rootRank))
        return self._done(tensors[0])

    def alltoall_base(self, output: Tensor, input: Tensor, receive: list[int], send: list[int]) -> Done:
        output.copy_(self._comm.all_to_all(input, send, receive))
        return self._done(output, input)

    def _allgather_base(self, output: Tensor, input: Tensor) -> Done:
        assert len(output) == self.size() * len(input)
        output.copy_(self._comm.all_gather(input, [len(input)] * self.size()))
        return self._done(output, input)

    def _reduce_scatter_base(self, output: Tensor, input: Tensor) -> Done:
        assert len(input) == self.size() * len(output)
        output.copy_(self._comm.reduce_scatter(input, [len(output)] * self.size()))
        return self._done(output, input)

    def _done(self, *tensors: Tensor) -> Done:
        assert all(tensor.is_contiguous() and tensor.numel() for tensor in tensors), "NCCL wants whole tensors"
        self.calls += 1
        return Done()


@pytest.mark.parametrize("total", [0, 1, 4, 7])
def test_uneven_rows_arrive_as_they_were(total: int) -> None:
    rows = split_rows(total, 2)
    wholes = [torch.arange(total * 3.0).view(total, 3) * (rank + 1) for rank in range(2)]

    def rank_main(comm: SharedMemoryComm) -> list[Tensor]:
        nccl, mine = NcclComm(EvenOnly(comm)), wholes[comm.rank]
        return [
            nccl.all_reduce(mine.clone()),
            nccl.reduce_scatter(mine, rows),
            nccl.all_gather(mine[: rows[comm.rank]], rows),
            nccl.all_gather(mine.T.contiguous().T[: rows[comm.rank]], rows),
            nccl.broadcast(torch.full((2,), comm.rank), 1),
            nccl.all_to_all(torch.full((3, 1), comm.rank), [1, 2], [1 + comm.rank] * 2),
        ]

    for rank, (summed, share, gathered, strided, told, swapped) in enumerate(on_ranks(2, rank_main)):
        assert torch.equal(summed, wholes[0] * 3)
        assert torch.equal(share, (wholes[0] * 3)[sum(rows[:rank]) :][: rows[rank]])
        assert torch.equal(gathered, torch.cat([whole[:n] for whole, n in zip(wholes, rows, strict=True)]))
        assert torch.equal(strided, gathered)
        assert told.tolist() == [1, 1]
        assert swapped.flatten().tolist() == [0] * (1 + rank) + [1] * (1 + rank)


def test_nothing_to_do_is_not_asked_for() -> None:
    def rank_main(comm: SharedMemoryComm) -> int:
        backend = EvenOnly(comm)
        nccl, nothing = NcclComm(backend), torch.empty(0, 3)
        for found in (nccl.all_reduce(nothing), nccl.reduce_scatter(nothing, [0, 0]), nccl.all_gather(nothing, [0, 0])):
            assert found.shape == (0, 3)
        return backend.calls

    assert on_ranks(2, rank_main) == [0, 0]


def test_counts_are_checked_before_anybody_hangs() -> None:
    def rank_main(comm: SharedMemoryComm) -> None:
        nccl = NcclComm(EvenOnly(comm))
        with pytest.raises(AssertionError, match="3 rows to reduce"):
            nccl.reduce_scatter(torch.zeros(3, 1), [1, 1])
        with pytest.raises(AssertionError, match="3 rows to gather, 1 announced"):
            nccl.all_gather(torch.zeros(3, 1), [1, 1])
        with pytest.raises(AssertionError, match="3 rows to send"):
            nccl.all_to_all(torch.zeros(3, 1), [1, 1], [1, 1])

    on_ranks(2, rank_main)

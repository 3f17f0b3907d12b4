"""model/comm.py over gloo: any CPU ranks on any hosts. The portable transport; shared memory is the fast one.

Uneven row counts travel through all_to_all, which gloo does natively; a count that disagrees between ranks
aborts the process without a Python exception, so that counts are checked here before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    def wait(self) -> bool: ...


class Group(Protocol):
    """A torch.distributed backend, as far as the transports use it."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def abort(self) -> None: ...
    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], options: object) -> Work: ...
    def alltoall_base(self, output: Tensor, input: Tensor, receive: list[int], send: list[int]) -> Work: ...


class GlooComm:
    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank()
        self.size = group.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        # Each rank's partial rows come whole and are added in rank order: the same bits whatever arrives first.
        share = rows[self.rank]
        parts_ND = self.all_to_all(x_TD, rows, [share] * self.size)
        parts = parts_ND.view(self.size, share, *x_TD.shape[1:])
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        return self.all_to_all(x_SD.repeat(self.size, *[1] * (x_SD.dim() - 1)), [len(x_SD)] * self.size, rows)

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert len(send) == len(receive) == self.size
        assert sum(send) == len(x_ND), f"{len(x_ND)} rows to send, {list(send)} announced"
        received = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
        self._group.alltoall_base(received, x_ND.contiguous(), list(receive), list(send)).wait()
        return received

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._group.broadcast([x], options).wait()
        return x

    def abort(self) -> None:
        self._group.abort()

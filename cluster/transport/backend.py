"""What gloo and NCCL do alike: collectives of a torch.distributed backend that is an object, not a global.

A count that disagrees between ranks ends the process (gloo) or hangs it (NCCL), so counts are checked before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    def wait(self) -> bool: ...


class Backend(Protocol):
    """A torch.distributed backend, as far as the transports use it."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def abort(self) -> None: ...
    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], options: object) -> Work: ...
    def alltoall_base(self, output: Tensor, input: Tensor, receive: list[int], send: list[int]) -> Work: ...


class BackendComm:
    """Part of model/comm.py; how rows are reduced and gathered is each transport's own."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.rank = backend.rank()
        self.size = backend.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._backend.allreduce([x]).wait()
        return x

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert len(send) == len(receive) == self.size
        assert sum(send) == len(x_ND), f"{len(x_ND)} rows to send, {list(send)} announced"
        received = x_ND.new_empty(sum(receive), *x_ND.shape[1:])
        self._backend.alltoall_base(received, x_ND.contiguous(), list(receive), list(send)).wait()
        return received

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = source
        self._backend.broadcast([x], options).wait()
        return x

    def abort(self) -> None:
        self._backend.abort()

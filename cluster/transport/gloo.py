"""model/comm.py over gloo: any CPU ranks on any hosts. The portable transport; shared memory is the fast one.

Uneven row counts travel through all_to_all, which gloo does natively. A count that disagrees between ranks ends the
process, so counts are checked before the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


class GlooComm:
    """Over a torch.distributed backend that is an object, not a global."""

    def __init__(self, backend: dist.ProcessGroupGloo) -> None:
        self._backend = backend
        self.rank = backend.rank()
        self.size = backend.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._backend.allreduce([x]).wait()
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

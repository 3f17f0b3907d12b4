"""model/comm.py over NCCL: ranks with a CUDA device each, on one host or several.

NCCL reduces and gathers even pieces only: uneven ones are padded to the longest. Calls return once the work is in the
device's queue; a dead peer makes it hang there, until abort() or the timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cluster.transport.backend import Backend, BackendComm, Work


class EvenBackend(Backend, Protocol):
    def _allgather_base(self, output: Tensor, input: Tensor) -> Work: ...
    def _reduce_scatter_base(self, output: Tensor, input: Tensor) -> Work: ...


class NcclComm(BackendComm):
    def __init__(self, backend: EvenBackend) -> None:
        super().__init__(backend)
        self._even = backend

    def all_reduce(self, x: Tensor) -> Tensor:
        return super().all_reduce(x) if x.numel() else x

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        assert sum(rows) == len(x_TD), f"{len(x_TD)} rows to reduce, {list(rows)} announced"
        if not x_TD.numel():
            return x_TD
        most = max(rows)
        pieces = (
            x_TD if min(rows) == most else torch.cat([_padded(part, most) for part in torch.split(x_TD, list(rows))])
        )
        total = x_TD.new_empty(most, *x_TD.shape[1:])
        self._even._reduce_scatter_base(total, pieces.contiguous()).wait()
        return total[: rows[self.rank]]

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(x_SD) == rows[self.rank], f"{len(x_SD)} rows to gather, {rows[self.rank]} announced"
        most = max(rows)
        if not most:
            return x_SD
        gathered = x_SD.new_empty(self.size * most, *x_SD.shape[1:])
        self._even._allgather_base(gathered, _padded(x_SD, most).contiguous()).wait()
        if min(rows) == most:
            return gathered
        return torch.cat([part[:count] for part, count in zip(torch.split(gathered, most), rows, strict=True)])


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

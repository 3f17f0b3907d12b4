"""model/comm.py over gloo: any CPU ranks on any hosts. The portable transport; shared memory is the fast one.

Uneven row counts travel through all_to_all, which gloo does natively.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cluster.transport.backend import BackendComm


class GlooComm(BackendComm):
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

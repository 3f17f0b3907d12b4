"""model/comm.py over NCCL: ranks with a CUDA device each, on one host or several.

Calls put their work on the current stream and return; a dead peer makes it hang there, until abort(). NCCL reduces and
gathers even pieces only: uneven ones are padded to the longest. What is only moved is moved as bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from cluster.transport.nccl_library import Communicator, NcclError, NcclLibrary
from cluster.transport.shared_memory import PeerLost

log = logging.getLogger(__name__)

BYTES = 1  # ncclDataType_t, as the rest
SUMMED = {
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
CALL_WITHIN_S = 1.0  # a call that takes longer hangs: it only puts work on a stream


def cuda_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


class NcclComm:
    """One rank's end. Constructing it waits for the others, and nothing can call it back: see that they are there."""

    def __init__(
        self,
        library: NcclLibrary,
        unique_id: bytes,
        rank: int,
        size: int,
        current_stream: Callable[[torch.device], int] = cuda_stream,
    ) -> None:
        self.rank = rank
        self.size = size
        self._library = library
        self._current_stream = current_stream
        self._calling = threading.Lock()
        self._aborted = threading.Event()
        self._communicator = library.connect(unique_id, size, rank)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.numel():
            with self._call(x.device) as (communicator, stream):
                self._library.all_reduce(x.data_ptr(), x.data_ptr(), x.numel(), SUMMED[x.dtype], communicator, stream)
        return x

    def reduce_scatter(self, x_TD: Tensor, rows: Sequence[int]) -> Tensor:
        assert sum(rows) == len(x_TD), f"{len(x_TD)} rows to reduce, {list(rows)} announced"
        if not x_TD.numel():
            return x_TD
        most = max(rows)
        even = x_TD if min(rows) == most else torch.cat([_padded(part, most) for part in torch.split(x_TD, list(rows))])
        pieces, total = even.contiguous(), x_TD.new_empty(most, *x_TD.shape[1:])
        with self._call(x_TD.device) as (communicator, stream):
            self._library.reduce_scatter(
                pieces.data_ptr(), total.data_ptr(), total.numel(), SUMMED[total.dtype], communicator, stream
            )
        return total[: rows[self.rank]]

    def all_gather(self, x_SD: Tensor, rows: Sequence[int]) -> Tensor:
        assert len(x_SD) == rows[self.rank], f"{len(x_SD)} rows to gather, {rows[self.rank]} announced"
        most = max(rows)
        gathered = x_SD.new_empty(self.size * most, *x_SD.shape[1:])
        if not gathered.numel():
            return gathered
        piece = _padded(x_SD, most).contiguous()
        with self._call(x_SD.device) as (communicator, stream):
            self._library.all_gather(piece.data_ptr(), gathered.data_ptr(), piece.nbytes, BYTES, communicator, stream)
        if min(rows) == most:
            return gathered
        return torch.cat([part[:count] for part, count in zip(torch.split(gathered, most), rows, strict=True)])

    def all_to_all(self, x_ND: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        assert len(send) == len(receive) == self.size
        assert sum(send) == len(x_ND), f"{len(x_ND)} rows to send, {list(send)} announced"
        x_ND, received = x_ND.contiguous(), x_ND.new_empty(sum(receive), *x_ND.shape[1:])
        if not (x_ND.numel() or received.numel()):
            return received
        row_bytes = prod(x_ND.shape[1:]) * x_ND.element_size()
        with self._call(x_ND.device) as (communicator, stream), self._library.together():
            for rank, (count, after) in enumerate(zip(send, accumulate(send), strict=True)):
                if count:
                    at = x_ND.data_ptr() + (after - count) * row_bytes
                    self._library.send(at, count * row_bytes, BYTES, rank, communicator, stream)
            for rank, (count, after) in enumerate(zip(receive, accumulate(receive), strict=True)):
                if count:
                    at = received.data_ptr() + (after - count) * row_bytes
                    self._library.receive(at, count * row_bytes, BYTES, rank, communicator, stream)
        return received

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        x = x.contiguous()
        if x.numel():
            with self._call(x.device) as (communicator, stream):
                self._library.broadcast(x.data_ptr(), x.nbytes, BYTES, source, communicator, stream)
        return x

    def abort(self) -> None:
        """Make this rank's collectives end, the present one with anything, the next ones with PeerLost.

        From any thread; returns at once. NCCL waits for the graphs that captured this group before it frees anything:
        drop them.
        """
        if not self._aborted.is_set():
            self._aborted.set()
            threading.Thread(target=self._leave, name="nccl-abort", daemon=True).start()

    def _leave(self) -> None:
        # Nobody may be in a call while the communicator goes, but for one that hangs: nothing else would end that.
        if self._calling.acquire(timeout=CALL_WITHIN_S):
            self._calling.release()
        try:
            self._library.abort(self._communicator)
        except NcclError:
            log.exception("NCCL did not leave its group; what it holds is freed with the process")

    @contextmanager
    def _call(self, device: torch.device) -> Iterator[tuple[Communicator, int]]:
        with self._calling:
            if self._aborted.is_set():
                raise PeerLost("the group was aborted")
            yield self._communicator, self._current_stream(device)


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])

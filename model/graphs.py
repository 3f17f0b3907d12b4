"""Decode steps captured once and replayed: launching a layer's dozen kernels one by one takes longer than they do.

    a batch of 5    rows 0 1 2 3 4 | x x x    the smallest graph that holds it, of 8 rows
                                     padding: texts of one token in the scratch page, that no expert computes and whose
                                     results nobody reads

A graph reads its step from buffers that stay where they are, and writes hidden states where the next replay will write
its own. Graphs share one pool of memory, the largest captured first, so that all fit into what that one needs.

R: rows of a graph.  D: model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.device_attention import DevicePlan, int32, page_table
from model.kv_cache import KVCache

Progress = Callable[[int, int], None]


class Capture(Protocol):
    """How a computation becomes something that can be replayed."""

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays it, and where its result is then found."""


class CudaCapture:
    """One pool for all that it captures."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        compute()  # compiles kernels and sets up libraries, which must not happen while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_RD = compute()
        return graph.replay, hidden_RD


class DecodeBuffers:
    """What graphs read, for as many rows as the largest has. Only fill() writes it."""

    def __init__(self, kv: KVCache, rows: int, max_tokens: int, device: torch.device) -> None:
        """For texts of up to `max_tokens` and as many pages as there are; shared ones are listed for each text.

        A text with a sliding window lists pages it has given back as well, and may come to more.
        """
        max_pages = rows * min(kv.num_pages, -(-max_tokens // kv.page_size)) + 1
        self._scratch_page, self._scratch_slot = kv.num_pages, kv.scratch_slot
        self._step_3R = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.token_ids, self.position, self.slot = self._step_3R
        self._table = torch.zeros(1 + 2 * rows + max_pages, dtype=torch.int32, device=device)
        self.count, self._first_page, self._context, self._pages = torch.split(self._table, [1, rows, rows, max_pages])
        # Padding alone, until it is filled.
        self.slot.fill_(self._scratch_slot)
        self._context.fill_(1)
        self._pages.fill_(self._scratch_page)

    def fill(self, batch: Batch, size: int) -> bool:
        """The batch, and padding up to `size` rows; False where its page table is too long for this."""
        count, rows = len(batch.spans), len(self.slot)
        pages, first_page, context = page_table(batch.spans)
        padding = rows - count
        table = (
            int32([count]),
            first_page, int32([len(pages)] * padding),
            context, int32([1] * padding),
            pages, int32([self._scratch_page]),
        )  # fmt: skip
        used = torch.cat(table)
        if len(used) > len(self._table):
            return False
        self._table[: len(used)].copy_(used)
        for row, values in zip(self._step_3R, (batch.token_ids_T, batch.position_T, batch.slot_T), strict=True):
            row[:count] = values
        self._step_3R[:2, count:size] = 0
        self.slot[count:size] = self._scratch_slot
        return True

    def plan(self, size: int, splits: int) -> DevicePlan:
        """Of the first `size` rows, whatever is filled in later."""
        from model.kernels.paged_decode import PageTable

        return DevicePlan(size, PageTable(self._pages, self._first_page[:size], self._context[:size]), splits, None)


class DecodeGraphs:
    """`compute` gives the hidden states of the first so many rows of the buffers."""

    def __init__(
        self,
        buffers: DecodeBuffers,
        sizes: Sequence[int],
        compute: Callable[[int], Tensor],
        capture: Capture,
        progress: Progress | None = None,
    ) -> None:
        """`progress` hears how many sizes are captured, and of how many."""
        self._buffers = buffers
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}
        for done, size in enumerate(sorted(sizes, reverse=True), 1):
            self._graphs[size] = capture(partial(compute, size))
            if progress is not None:
                progress(done, len(sizes))

    def replay(self, batch: Batch) -> Tensor | None:
        """The hidden states of batch.logits_rows; None where no graph fits."""
        rows = len(batch.spans)
        if not rows or any(span.length != 1 for span in batch.spans) or rows > max(self._graphs):
            return None
        size = min(size for size in self._graphs if size >= rows)
        if not self._buffers.fill(batch, size):
            return None
        replay, hidden_RD = self._graphs[size]
        replay()
        return hidden_RD.index_select(0, batch.logits_rows)


def graph_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 16: padding costs attention a little, and experts nothing."""
    return [*(size for size in (1, 2, 4, 8) if size < max_rows), *range(16, max_rows, 16), max_rows]

"""Decode steps captured once and replayed: launching a layer's dozen kernels one by one takes longer than they do.

    a step of 5    rows 0 1 2 3 4 | x x x    a graph of 8 rows
                                    padding: texts of one token in the scratch page, that no expert computes and whose
                                    results nobody reads

A graph reads its step from buffers that stay where they are, and writes hidden states where the next replay will write
its own. Graphs share one pool of memory: captured the largest first, all fit into what that one needs. Collectives are
captured as well, if the exchange asks the host for nothing: so all ranks capture the same sizes in the same order, and
replay the same one in a step. Which one is said by whoever plans it; here nothing is chosen.

Who forgets an object of this kind has dropped its graphs.

R: rows of a graph.  G: data groups.  D: model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.device_attention import DevicePlan, int32, page_table
from model.exchange import Exchange
from model.kv_cache import KVCache
from model.step_attention import StepAttention
from model.to_device import to_device


@dataclass(frozen=True, slots=True)
class PaddedSteps:
    """What the graphs of a model have in common."""

    kv: KVCache
    max_rows: int  # of each data group
    # The exchange of a step padded to so many rows in each group; how many each really has lies on the device, (G,).
    exchange: Callable[[int, Tensor], Exchange]
    groups: int = 1


# Token ids, their attention and the exchange of the step -> final hidden states.
Run = Callable[[Tensor, StepAttention, Exchange], Tensor]


class Capture(Protocol):
    """How a computation becomes something that can be replayed."""

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What replays it, and where its result is then found. Has it computed once before."""


class CudaCapture:
    """One pool for all that it captures."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        compute()  # compiles kernels, connects ranks and sets up libraries, which must not happen while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_RD = compute()
        return graph.replay, hidden_RD


class DecodeBuffers:
    """What graphs read, for as many rows as the largest has. Only fill() and clear() write it."""

    def __init__(self, steps: PaddedSteps, max_tokens: int, device: torch.device) -> None:
        """For texts of up to `max_tokens`. With a sliding window a text lists pages it has given back as well."""
        rows, kv = steps.max_rows, steps.kv
        max_pages = rows * -(-max_tokens // kv.page_size) + 1
        self._scratch_page, self._scratch_slot, self._device = kv.num_pages, kv.scratch_slot, device
        self._step_3R = torch.zeros(3, rows, dtype=torch.int64, device=device)
        self.token_ids, self.position, self.slot = self._step_3R
        sizes = [steps.groups, rows, rows, max_pages]
        self._table = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self.tokens, self._first_page, self._context, self._pages = torch.split(self._table, sizes)
        self.clear()

    def clear(self) -> None:
        """Padding alone."""
        self.tokens.zero_()
        self._first_page.zero_()
        self._context.fill_(1)
        self._pages[0] = self._scratch_page
        self._step_3R[:2] = 0
        self.slot.fill_(self._scratch_slot)

    def fill(self, batch: Batch, size: int, group_tokens: Sequence[int]) -> None:
        """The batch of this rank's group, and padding up to `size` rows."""
        count = len(batch.spans)
        padding = len(self.slot) - count
        pages, first_page, context = page_table(batch.spans)
        table = (
            int32(group_tokens),
            first_page, int32([len(pages)] * padding),
            context, int32([1] * padding),
            pages, int32([self._scratch_page]),
        )  # fmt: skip
        used = torch.cat(table)
        assert len(used) <= len(self._table), "a text longer than the model takes"
        self._table[: len(used)].copy_(to_device(used, self._device))
        for row, values in zip(self._step_3R, (batch.token_ids_T, batch.position_T, batch.slot_T), strict=True):
            row[:count] = values
        self._step_3R[:2, count:size] = 0
        self.slot[count:size] = self._scratch_slot

    def plan(self, size: int, splits: int) -> DevicePlan:
        """Of the first `size` rows, whatever is filled in later."""
        from model.kernels.paged_decode import PageTable

        return DevicePlan(size, PageTable(self._pages, self._first_page[:size], self._context[:size]), splits, None)


class DecodeGraphs:
    """`prepare` gives attention and exchange of the first so many rows of the buffers; `run` the hidden states."""

    def __init__(
        self,
        buffers: DecodeBuffers,
        prepare: Callable[[int], tuple[StepAttention, Exchange]],
        run: Run,
        capture: Capture,
    ) -> None:
        self._buffers = buffers
        self._prepare = prepare
        self._run = run
        self._capture = capture
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}

    @torch.inference_mode()
    def capture(self, rows: int) -> None:
        """The graph of so many rows; with several ranks a collective of all."""

        def compute() -> Tensor:
            return self._run(self._buffers.token_ids[:rows], *self._prepare(rows))

        self._buffers.clear()  # for it is computed once, and nobody's keys must be written
        self._graphs[rows] = self._capture(compute)

    @torch.inference_mode()
    def replay(self, batch: Batch, rows: int, group_tokens: Sequence[int]) -> Tensor:
        """The final hidden states of batch.logits_rows, (R, D), of one token of each text, by the graph of `rows`.

        `group_tokens`: of every data group, this one's own the rows of the batch.
        """
        assert all(span.length == 1 for span in batch.spans)
        self._buffers.fill(batch, rows, group_tokens)
        replay, hidden_RD = self._graphs[rows]
        replay()
        return hidden_RD.index_select(0, batch.logits_rows)

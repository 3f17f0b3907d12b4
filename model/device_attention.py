"""Attention on a device: what it needs to know of a step, put there in one copy, and what it does with it per layer.

    rows of the step    [ decodes: one row each ][ prompts: chunks ]
                          paged decode kernel      keys copied out of their pages, then flash attention

Decodes are the single rows that a step begins with; whatever follows goes with the prompts. Keys of prompts are copied
once per layer because flash attention wants them in one piece; beside the attention that is little.

T: rows.  B: decodes.  M: keys of all prompts.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.batch import SequenceSpan
from model.kv_cache import KVCache
from model.varlen_attention import Chunks, VarlenAttention

if TYPE_CHECKING:
    from model.kernels.paged_decode import PageTable


@dataclass(frozen=True, slots=True)
class Prompts:
    chunks: Chunks
    slot_M: Tensor  # where their keys lie in page memory


@dataclass(frozen=True, slots=True)
class DevicePlan:
    num_decodes: int
    table: PageTable  # of the decodes
    splits: int  # of each decode's keys
    prompts: Prompts | None


@dataclass(frozen=True, slots=True)
class DevicePlanner:
    page_size: int
    window: int | None  # keys a token sees, itself included; None: all
    kv_heads: int
    processors: int  # of the device
    device: torch.device

    def plan(self, spans: Sequence[SequenceSpan]) -> DevicePlan:
        from model.kernels.paged_decode import PageTable, splits_for

        decodes = list(takewhile(lambda span: span.length == 1, spans))
        chunks = spans[len(decodes) :]
        table = PageTable(*on_device(page_table(decodes), self.device))
        splits = splits_for(max(len(decodes), 1), self.kv_heads, self.processors)
        return DevicePlan(len(decodes), table, splits, self._prompts(chunks) if chunks else None)

    def _prompts(self, spans: Sequence[SequenceSpan]) -> Prompts:
        rows = tuple(span.length for span in spans)
        oldest = [self._oldest(span) for span in spans]
        keys = tuple(span.context - first for span, first in zip(spans, oldest, strict=True))
        borders = [int32([0, *accumulate(counts)]) for counts in (rows, keys)]
        pages, first_page, _ = page_table(spans)
        tensors = on_device((*borders, pages, first_page, int32(oldest)), self.device)
        row_border, key_border, pages, first_page, oldest_B = tensors
        slot_M = key_slots(key_border, sum(keys), pages, first_page, oldest_B, self.page_size)
        return Prompts(Chunks(rows, keys, row_border, key_border), slot_M)

    def _oldest(self, span: SequenceSpan) -> int:
        """The first token that any row of the span sees."""
        return 0 if self.window is None else max(0, span.context - span.length + 1 - self.window)


class DeviceAttention:
    def __init__(
        self,
        plan: DevicePlan,
        kv: KVCache,
        angles: tuple[Tensor, Tensor],
        slot_T: Tensor,
        window: int | None,
        varlen_attention: VarlenAttention,
    ) -> None:
        self._plan = plan
        self._kv = kv
        self._angles = angles
        self._slot_T = slot_T
        self._window = window
        self._varlen_attention = varlen_attention

    def __call__(self, layer: int, heads_THC: Tensor) -> Tensor:
        from model.kernels.rope_write import rope_write

        memory = self._kv.layer(layer)
        query_THC = rope_write(heads_THC, self._angles, self._slot_T, memory)
        B, prompts = self._plan.num_decodes, self._plan.prompts
        if prompts is None:
            return self._decode(query_THC, memory)
        key_MGC, value_MGC = (x_NGC.index_select(0, prompts.slot_M) for x_NGC in memory)
        out_LHC = self._varlen_attention(query_THC[B:], key_MGC, value_MGC, prompts.chunks, self._window)
        return torch.cat((self._decode(query_THC[:B], memory), out_LHC)) if B else out_LHC

    def _decode(self, query_BHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        from model.kernels.paged_decode import paged_decode

        return paged_decode(
            query_BHC, memory, self._plan.table,
            page_size=self._kv.page_size, window=self._window, splits=self._plan.splits,
        )  # fmt: skip


def page_table(spans: Sequence[SequenceSpan]) -> tuple[Tensor, Tensor, Tensor]:
    """All pages of each sequence, one sequence after another; where each one's begin; tokens of each. int32, here."""
    runs_R2 = torch.tensor([run for span in spans for run in span.runs], dtype=torch.int64).view(-1, 2)
    first_R, count_R = runs_R2.unbind(1)
    begin_R = count_R.cumsum(0) - count_R
    pages = torch.repeat_interleave(first_R - begin_R, count_R) + torch.arange(int(count_R.sum()))
    counts = [sum(pages for _, pages in span.runs) for span in spans]
    first_page = [0, *accumulate(counts)][: len(spans)]
    return pages.int(), int32(first_page), int32([span.context for span in spans])


def key_slots(
    key_border: Tensor, num_keys: int, pages: Tensor, first_page: Tensor, oldest: Tensor, page_size: int
) -> Tensor:
    """Slots of all keys, computed where they are needed: there may be many."""
    device = pages.device
    chunk = torch.arange(len(first_page), device=device)
    chunk_M = torch.repeat_interleave(chunk, key_border.diff(), output_size=num_keys)
    position_M = torch.arange(num_keys, device=device) - key_border[chunk_M] + oldest[chunk_M]
    page_M = pages[first_page[chunk_M] + position_M // page_size]
    return page_M * page_size + position_M % page_size


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_device(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """In one copy."""
    return torch.split(torch.cat(list(tensors)).to(device), [len(x) for x in tensors])

"""Attention on a device: what it needs to know of a step, put there in one copy, and what it does with it per layer.

    rows of the step    [ decodes: one row each ][ prompts: chunks ]
      KernelReader        paged decode kernel      keys copied out of their pages, then flash attention
      FlashReader         flash-attn               flash-attn, on pages as they are: flash_pages.py

Decodes are the single rows that a step begins with; whatever follows goes with the prompts. Keys of prompts are copied
once per layer because flash attention wants them in one piece; beside the attention that is little.

T: rows.  B: decodes.  L, M: rows and keys of all prompts.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from model.batch import SequenceSpan
from model.kv_cache import KVCache
from model.step_attention import StepAttention
from model.to_device import to_device
from model.varlen_attention import Chunks, VarlenAttention

if TYPE_CHECKING:
    from model.kernels.paged_decode import PageTable


@dataclass(frozen=True, slots=True)
class Prompts:
    chunks: Chunks  # of rows, and of the keys that any of them sees
    table: PageTable
    oldest_B: Tensor  # int32: the first key of each


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
        from model.kernels.paged_decode import PageTable

        rows = tuple(span.length for span in spans)
        oldest = [self._oldest(span) for span in spans]
        keys = tuple(span.context - first for span, first in zip(spans, oldest, strict=True))
        borders = [int32([0, *accumulate(counts)]) for counts in (rows, keys)]
        tensors = on_device((*borders, int32(oldest), *page_table(spans)), self.device)
        row_border, key_border, oldest_B, *table = tensors
        return Prompts(Chunks(rows, keys, row_border, key_border), PageTable(*table), oldest_B)

    def _oldest(self, span: SequenceSpan) -> int:
        """The first token that any row of the span sees."""
        return 0 if self.window is None else max(0, span.context - span.length + 1 - self.window)


class PageReader(Protocol):
    """How the rows of one step attend to keys and values in pages, in every layer the same way."""

    def decodes(self, query_BHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Of the plan's decodes, of which there are some."""

    def prompts(self, query_LHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Of the plan's prompts, of which there are some."""


class DeviceAttention(StepAttention):
    def __init__(
        self, num_decodes: int, reader: PageReader, kv: KVCache, angles: tuple[Tensor, Tensor], slot_T: Tensor
    ) -> None:
        self._num_decodes = num_decodes
        self._reader = reader
        self._kv = kv
        self._angles = angles
        self._slot_T = slot_T

    def __call__(self, layer: int, heads_THC: Tensor) -> Tensor:
        from model.kernels.rope_write import rope_write

        memory = self._kv.layer(layer)
        query_THC = rope_write(heads_THC, self._angles, self._slot_T, memory)
        B = self._num_decodes
        decodes_BHC, prompts_LHC = query_THC[:B], query_THC[B:]
        if len(decodes_BHC):
            decodes_BHC = self._reader.decodes(decodes_BHC, memory)
        if not len(prompts_LHC):
            return decodes_BHC
        prompts_LHC = self._reader.prompts(prompts_LHC, memory)
        return torch.cat((decodes_BHC, prompts_LHC)) if B else prompts_LHC


class KernelReader:
    """Pages of any size, in any precision."""

    def __init__(self, plan: DevicePlan, page_size: int, window: int | None, varlen_attention: VarlenAttention) -> None:
        self._plan = plan
        self._page_size = page_size
        self._window = window
        self._varlen_attention = varlen_attention
        self._slot_M = None if plan.prompts is None else key_slots(plan.prompts, page_size)

    def decodes(self, query_BHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        from model.kernels.paged_decode import paged_decode

        return paged_decode(
            query_BHC, memory, self._plan.table,
            page_size=self._page_size, window=self._window, splits=self._plan.splits,
        )  # fmt: skip

    def prompts(self, query_LHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        assert self._plan.prompts is not None
        assert self._slot_M is not None
        key_MGC, value_MGC = (x_NGC.index_select(0, self._slot_M) for x_NGC in memory)
        return self._varlen_attention(query_LHC, key_MGC, value_MGC, self._plan.prompts.chunks, self._window)


def page_table(spans: Sequence[SequenceSpan]) -> tuple[Tensor, Tensor, Tensor]:
    """All pages of each sequence, one sequence after another; where each one's begin; tokens of each. int32, here."""
    runs_R2 = torch.tensor([run for span in spans for run in span.runs], dtype=torch.int64).view(-1, 2)
    first_R, count_R = runs_R2.unbind(1)
    begin_R = count_R.cumsum(0) - count_R
    pages = torch.repeat_interleave(first_R - begin_R, count_R) + torch.arange(int(count_R.sum()))
    counts = [sum(pages for _, pages in span.runs) for span in spans]
    first_page = [0, *accumulate(counts)][: len(spans)]
    return pages.int(), int32(first_page), int32([span.context for span in spans])


def key_slots(prompts: Prompts, page_size: int) -> Tensor:
    """Slots of all keys, (M,), computed where they are needed: there may be many."""
    key_border, table, oldest_B = prompts.chunks.key_border, prompts.table, prompts.oldest_B
    num_keys, device = sum(prompts.chunks.keys), key_border.device
    chunk = torch.arange(len(oldest_B), device=device)
    chunk_M = torch.repeat_interleave(chunk, key_border.diff(), output_size=num_keys)
    position_M = torch.arange(num_keys, device=device) - key_border[chunk_M] + oldest_B[chunk_M]
    page_M = table.pages[table.first_page_B[chunk_M] + position_M // page_size]
    return page_M * page_size + position_M % page_size


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_device(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """In one copy."""
    return torch.split(to_device(torch.cat(list(tensors)), device), [len(x) for x in tensors])

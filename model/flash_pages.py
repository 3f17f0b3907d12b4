"""Attention by flash-attn's kernels that read keys and values where they lie: nothing is copied out of pages.

    decodes   flash_attn_with_kvcache   one row of each text
    prompts   flash_attn_varlen_func    chunks of any length, without padding

Both want pages of 256 tokens, or a multiple. Smaller ones are read by device_attention.KernelReader.

B: texts.  L: rows of all prompts.  W: pages that a text has at most.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from model.device_attention import DevicePlan
from model.varlen_attention import VarlenAttention, flash_attn_attention

if TYPE_CHECKING:
    from model.kernels.paged_decode import PageTable

PAGE_MULTIPLE = 256


def reads_pages(attention: VarlenAttention, page_size: int) -> bool:
    """Whether flash-attn is what `attention` calls, and takes pages of this size."""
    return attention is flash_attn_attention and page_size % PAGE_MULTIPLE == 0


class FlashReader:
    def __init__(self, plan: DevicePlan, page_size: int, window: int | None, max_tokens: int) -> None:
        """`max_tokens`: no text of the plan is longer, nor will any be that is filled in later."""
        self._plan = plan
        self._page_size = page_size
        self._max_tokens = max_tokens
        # Of keys before a row's own. Where all are seen, saying so lets heads that share keys go together.
        self._left = -1 if window is None else window - 1
        pages = -(-max_tokens // page_size)
        self._decode_BW = block_table(plan.table, pages) if plan.num_decodes else None
        if plan.prompts is not None:
            table = plan.prompts.table
            self._prompt_BW = block_table(table, pages)
            self._key_border = functional.pad(table.context_B.cumsum(0, dtype=torch.int32), (1, 0))

    def decodes(self, query_BHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        from flash_attn import flash_attn_with_kvcache

        out_B1HC: Tensor = flash_attn_with_kvcache(
            query_BHC[:, None], *self._paged(memory),
            cache_seqlens=self._plan.table.context_B, block_table=self._decode_BW,
            causal=True, window_size=(self._left, -1 if self._left < 0 else 0),
        )  # fmt: skip
        return out_B1HC[:, 0]

    def prompts(self, query_LHC: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        assert self._plan.prompts is not None
        chunks = self._plan.prompts.chunks
        out_LHC: Tensor = flash_attn_varlen_func(
            query_LHC, *self._paged(memory), chunks.row_border, self._key_border, max(chunks.rows), self._max_tokens,
            causal=True, window_size=(self._left, 0), block_table=self._prompt_BW,
        )  # fmt: skip
        return out_LHC

    def _paged(self, memory: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The same memory, with pages as a dimension."""
        return tuple(x_NGC.view(-1, self._page_size, *x_NGC.shape[1:]) for x_NGC in memory)


def block_table(table: PageTable, pages: int) -> Tensor:
    """Each text's pages in a row of its own, (B, W), int32; behind its last one whatever follows, which nobody reads.

    Computed from what the graphs' buffers hold, so that a replay computes it from what they hold then.
    """
    place_W = torch.arange(pages, dtype=torch.int32, device=table.pages.device)
    place_BW = (table.first_page_B[:, None] + place_W).clamp_(max=len(table.pages) - 1)
    return table.pages.index_select(0, place_BW.flatten()).view(place_BW.shape)

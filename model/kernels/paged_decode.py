"""Attention of one new token per sequence over its keys in pages.

    keys of a sequence   [ split 0 ][ split 1 ][ split 2 ]      each split one program, then all splits merged
    queries              those that share a key-value head go through a program together

A split is a range of keys, as many of them as it takes to keep the whole device busy with few sequences. Where splits
lie is computed from the sequence's length on the device, so a captured graph serves every length.

B: sequences.  H, G: query and key-value heads.  Q: queries per key-value head, H / G.  C: head_dim.  N: slots of page
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # that a program looks at together
SMALLEST_SPLIT = 256  # keys; what is shorter is not worth merging
LARGEST_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PageTable:
    """Where the keys of some sequences lie: their pages one sequence after another, all int32 on the device."""

    pages: Tensor
    first_page_B: Tensor  # where a sequence's own begin among them
    context_B: Tensor  # tokens in pages, this step's own included; at least 1


def paged_decode(
    query_BHC: Tensor,
    memory: tuple[Tensor, Tensor],
    table: PageTable,
    *,
    page_size: int,
    window: int | None,
    splits: int,
) -> Tensor:
    """The attention output of every row, (B, H, C). `window`: keys a token sees, itself included; None: all."""
    key_NGC, value_NGC = memory
    B, H, C = query_BHC.shape
    G = key_NGC.shape[1]
    assert query_BHC.is_contiguous()
    assert key_NGC.is_contiguous()
    assert value_NGC.is_contiguous()
    part_BHPC = torch.empty(B, H, splits, C, dtype=torch.float32, device=query_BHC.device)
    log_sum_BHP = torch.empty(B, H, splits, dtype=torch.float32, device=query_BHC.device)
    out_BHC = torch.empty_like(query_BHC)
    width = max(16, triton.next_power_of_2(C))
    _attend_split[(splits, G, B)](
        query_BHC, key_NGC, value_NGC, table.pages, table.first_page_B, table.context_B, part_BHPC, log_sum_BHP,
        C**-0.5, G, C, LARGEST_INT if window is None else window,
        SPLITS=splits, SMALLEST=SMALLEST_SPLIT, QUERIES=H // G, ROWS=max(16, triton.next_power_of_2(H // G)),
        KEYS=KEYS, WIDTH=width, PAGE=page_size, num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge[(H, B)](part_BHPC, log_sum_BHP, out_BHC, H, C, SPLITS=splits, WIDTH=width)
    return out_BHC


def splits_for(sequences: int, kv_heads: int, processors: int) -> int:
    """Programs enough for every processor several times over; never so few that one long text holds up a batch."""
    wanted = 4 * processors // (sequences * kv_heads)
    return min(64, max(8, 1 << max(wanted - 1, 0).bit_length()))


# Tables lie wherever one copy to the device puts them: one kernel for all places.
@triton.jit(do_not_specialize_on_alignment=["page_ptr", "first_page_ptr", "context_ptr"])
def _attend_split(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    page_ptr: tl.tensor,
    first_page_ptr: tl.tensor,
    context_ptr: tl.tensor,
    part_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    scale: float,
    G: int,
    C: int,
    window: int,
    SPLITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
) -> None:
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    context = tl.load(context_ptr + sequence)
    oldest = tl.maximum(context - window, 0)
    length = tl.maximum(tl.cdiv(tl.cdiv(context - oldest, SPLITS), KEYS) * KEYS, SMALLEST)
    begin = oldest + split * length
    end = tl.minimum(begin + length, context)

    query_row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    is_query, in_head = query_row < QUERIES, column < C
    head = sequence * G * QUERIES + kv_head * QUERIES + query_row
    inside = is_query[:, None] & in_head
    query = tl.load(query_ptr + head[:, None] * C + column, mask=inside, other=0.0)
    first_page = page_ptr + tl.load(first_page_ptr + sequence)

    # A running softmax to the base 2, as the hardware has it.
    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        seen = position < end
        page = tl.load(first_page + position // PAGE, mask=seen, other=0)
        slot = page.to(tl.int64) * PAGE + position % PAGE
        offset = (slot * G + kv_head)[:, None] * C + column
        key = tl.load(key_ptr + offset, mask=seen[:, None] & in_head, other=0.0)
        value = tl.load(value_ptr + offset, mask=seen[:, None] & in_head, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * (scale * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        now_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - now_highest[:, None])
        fade = tl.exp2(highest - now_highest)
        total = total * fade + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(value.dtype), value, out * fade[:, None], input_precision="tf32x3")
        highest = now_highest

    tl.store(log_sum_ptr + head * SPLITS + split, highest + tl.log2(tl.maximum(total, 1e-30)), mask=is_query)
    if begin < end:
        at = part_ptr + (head * SPLITS + split)[:, None] * C + column
        tl.store(at, out / total[:, None], mask=inside)


@triton.jit
def _merge(
    part_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: int,
    C: int,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64) * H + tl.program_id(0)
    split, column = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    log_sum = tl.load(log_sum_ptr + row * SPLITS + split)
    weight = tl.exp2(log_sum - tl.max(log_sum, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    # A split without keys has written nothing: not even times zero may what lies there be read.
    inside = (weight > 0)[:, None] & (column < C)[None, :]
    part = tl.load(part_ptr + (row * SPLITS + split)[:, None] * C + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row * C + column, tl.sum(part * weight[:, None], axis=0), mask=column < C)

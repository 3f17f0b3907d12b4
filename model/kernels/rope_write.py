"""Query and key heads turned by their positions, keys and values written to their pages, in one pass.

T: rows.  H, G: query and key-value heads.  C: head_dim.  N: slots of page memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # that one program turns


def rope_write(
    heads_THC: Tensor, angles: tuple[Tensor, Tensor], slot_T: Tensor, memory: tuple[Tensor, Tensor]
) -> Tensor:
    """Of heads laid out query, key, value: the turned queries, (T, H, C). Keys and values go to their slots."""
    key_NGC, value_NGC = memory
    cos_T1C, sin_T1C = angles
    T, heads, C = heads_THC.shape
    G = key_NGC.shape[1]
    H = heads - 2 * G
    assert all(x.is_contiguous() for x in (heads_THC, cos_T1C, sin_T1C, key_NGC, value_NGC))
    query_THC = heads_THC.new_empty(T, H, C)
    if T:
        half = triton.next_power_of_2(C // 2)
        _rope_write[(T, triton.cdiv(heads, HEADS))](
            heads_THC, cos_T1C, sin_T1C, slot_T, query_THC, key_NGC, value_NGC, H, G, C, HEADS=HEADS, HALF=half
        )  # fmt: skip
    return query_THC


# Slots lie wherever one copy to the device puts them: one kernel for all places.
@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _rope_write(
    heads_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    slot_ptr: tl.tensor,
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    H: int,
    G: int,
    C: int,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    half = C // 2
    in_half = column < half
    inside = in_half & (head < H + 2 * G)
    source = heads_ptr + (row * (H + 2 * G) + head) * C + column
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + half, mask=inside, other=0.0)
    # A pair's two dimensions turn by one angle, so half of the row says it all.
    cos = tl.load(cos_ptr + row * C + column, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * C + column, mask=in_half, other=0.0).to(tl.float32)
    turned_first = (first.to(tl.float32) * cos - second.to(tl.float32) * sin).to(first.dtype)
    turned_second = (second.to(tl.float32) * cos + first.to(tl.float32) * sin).to(first.dtype)

    query = query_ptr + (row * H + head) * C + column
    is_query = in_half & (head < H)
    tl.store(query, turned_first, mask=is_query)
    tl.store(query + half, turned_second, mask=is_query)

    slot = tl.load(slot_ptr + row).to(tl.int64)
    key = key_ptr + (slot * G + head - H) * C + column
    is_key = in_half & (head >= H) & (head < H + G)
    tl.store(key, turned_first, mask=is_key)
    tl.store(key + half, turned_second, mask=is_key)

    value = value_ptr + (slot * G + head - H - G) * C + column
    is_value = inside & (head >= H + G)
    tl.store(value, first, mask=is_value)
    tl.store(value + half, second, mask=is_value)

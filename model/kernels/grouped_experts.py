"""All experts' products in two launches, over pairs sorted by slot, whatever the number of each slot's pairs.

    order_P     [ pairs of slot 0 ][ slot 2 ][ slot 3 ]       sorted on the device; nobody asks how many
    tiles         0    1    2        3         4              of so many rows each, none across a border
    gate_up     hidden_PF: row i is that of pair order_P[i], read from its token's row of x
    down        y_SKD: written where the pair's token and its place in routing order say, weighted

S: tokens.  K: experts per token.  P: pairs, S * K.  D: model width.  F: ffn width.  L: slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.weight_tiles import WeightStack, product, tiling_for


def grouped_experts(
    x_SD: Tensor,
    order_P: Tensor,
    first_L: Tensor,
    weight_SK: Tensor,
    gate_up: WeightStack,
    down: WeightStack,
    share: float = 1.0,
) -> Tensor:
    """What each token's experts give, weighted, (S, K, D), float32. first_L: where slots begin in order_P, and the end.

    Pairs outside order_P[first_L[0] : first_L[-1]] have no slot here and give zeros; the others are likely to be this
    share of all.
    """
    S, D = x_SD.shape
    K, slots = weight_SK.shape[1], len(first_L) - 1
    P, F = S * K, down.in_features
    y_SKD = torch.zeros(S, K, D, dtype=torch.float32, device=x_SD.device)
    if not P:
        return y_SKD
    assert x_SD.is_contiguous()
    assert weight_SK.is_contiguous()
    hidden_PF = x_SD.new_empty(P, F)
    # Rows are not dealt evenly: half as many again, so that few slots need a second tile.
    tiling = tiling_for(1.5 * share * P / slots, x_SD.element_size())
    tiles = (P + min(slots, P) * (tiling.rows - 1)) // tiling.rows  # at most, wherever the borders lie
    shape = {"SLOTS": triton.next_power_of_2(slots), "ROWS": tiling.rows, "COLUMNS": tiling.columns}
    options = {"DEPTH": tiling.depth, "num_warps": tiling.warps, "num_stages": tiling.stages}
    _gate_up[(tiles, triton.cdiv(2 * F, tiling.columns))](
        x_SD, gate_up.packed_EOP, gate_up.scale_EOG, gate_up.levels, order_P, first_L, hidden_PF, D, F, slots,
        K=K, MODE=gate_up.mode, GROUP=gate_up.group_size, **shape, **options,
    )  # fmt: skip
    _down[(tiles, triton.cdiv(D, tiling.columns))](
        hidden_PF, down.packed_EOP, down.scale_EOG, down.levels, order_P, first_L, weight_SK, y_SKD, D, F, slots,
        MODE=down.mode, GROUP=down.group_size, **shape, **options,
    )  # fmt: skip
    return y_SKD


@triton.jit
def _own_rows(first_ptr: tl.tensor, slots: int, SLOTS: tl.constexpr, ROWS: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Of this program's tile: its slot, its rows in sorted order, and which are there. A spare tile has no slot."""
    slot = tl.arange(0, SLOTS)
    is_slot = slot < slots
    begin = tl.load(first_ptr + slot, mask=is_slot, other=0)
    end = tl.load(first_ptr + slot + 1, mask=is_slot, other=0)
    tiles_up_to = tl.cumsum(tl.cdiv(end - begin, ROWS), axis=0)
    tile = tl.program_id(0)
    own = tl.sum((tiles_up_to <= tile).to(tl.int32), axis=0)
    mine = slot == own
    tile_in_slot = tile - tl.sum(tl.where(slot < own, tl.cdiv(end - begin, ROWS), 0), axis=0)
    row = tl.sum(tl.where(mine, begin, 0), axis=0) + tile_in_slot * ROWS + tl.arange(0, ROWS)
    return own, row, row < tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def _gate_up(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    order_ptr: tl.tensor,
    first_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    D: int,
    F: int,
    slots: int,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    slot, row, is_row = _own_rows(first_ptr, slots, SLOTS, ROWS)
    if slot < slots:
        token = tl.load(order_ptr + row, mask=is_row, other=0).to(tl.int64) // K
        # Rows of gate and up by turns: the product of a tile holds both of what SwiGLU multiplies.
        column = tl.arange(0, COLUMNS)
        feature = tl.program_id(1) * (COLUMNS // 2) + column // 2
        weight_row = slot.to(tl.int64) * 2 * F + feature + (column % 2) * F
        both = product(
            x_ptr, token, is_row, weight_ptr, scale_ptr, levels_ptr, weight_row, feature < F, D,
            MODE, GROUP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS // 2, 2)))
        hidden = gate * tl.sigmoid(gate) * up
        feature = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        at = hidden_ptr + row[:, None].to(tl.int64) * F + feature[None, :]
        tl.store(at, hidden, mask=is_row[:, None] & (feature < F)[None, :])


@triton.jit
def _down(
    hidden_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    order_ptr: tl.tensor,
    first_ptr: tl.tensor,
    routing_ptr: tl.tensor,
    y_ptr: tl.tensor,
    D: int,
    F: int,
    slots: int,
    SLOTS: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    slot, row, is_row = _own_rows(first_ptr, slots, SLOTS, ROWS)
    if slot < slots:
        feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        y = product(
            hidden_ptr, row.to(tl.int64), is_row, weight_ptr, scale_ptr, levels_ptr,
            slot.to(tl.int64) * D + feature, feature < D, F, MODE, GROUP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        pair = tl.load(order_ptr + row, mask=is_row, other=0).to(tl.int64)
        routing = tl.load(routing_ptr + pair, mask=is_row, other=0.0)
        at = y_ptr + pair[:, None] * D + feature[None, :]
        tl.store(at, y * routing[:, None], mask=is_row[:, None] & (feature < D)[None, :])

"""The product of some rows of x with some rows of a weight, plain or quantised: the inner loop of every matrix kernel.

    mode   a weight in memory is                      and becomes
    plain  a number of x's precision                  itself
    int8   a signed byte                              that number; rows of the product are scaled at the end
    fp8    a byte s eeee mmm                          that number; rows of the product are scaled at the end
    int4   half a byte, the even column in the low    code - 8, scaled, rounded to x's precision
    nf4    half a byte, likewise                      a level of a table, scaled, rounded to x's precision

Whole numbers become floats by their bits: or-ing u into the float16 1024 gives 1024 + u exactly. That is cheaper than
a conversion, of which the hardware does few at a time.

float32 is multiplied as three products of tf32, which come within rounding of it, on tensor cores.

What the modes mean: model/quantization.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.modes import Mode
from model.quantization import NF4_LEVELS, QuantizedWeight


@dataclass(frozen=True, slots=True)
class WeightStack:
    """Weights of one shape, one below the other, as kernels read them. E: experts.  O, I: features out and in."""

    mode: Mode | Literal["plain"]
    packed_EOP: Tensor
    scale_EOG: Tensor  # of plain weights nobody looks at it
    levels: Tensor  # of nf4

    @classmethod
    def plain(cls, weight_EOI: Tensor) -> WeightStack:
        assert weight_EOI.is_contiguous()
        return cls("plain", weight_EOI, weight_EOI, weight_EOI)

    @classmethod
    def quantized(cls, mode: Mode, packed_EOP: Tensor, scale_EOG: Tensor) -> WeightStack:
        assert packed_EOP.is_contiguous()
        assert scale_EOG.is_contiguous()
        codes = packed_EOP.view(torch.uint8) if mode == "fp8" else packed_EOP
        return cls(mode, codes, scale_EOG, torch.tensor(NF4_LEVELS, device=packed_EOP.device))

    @classmethod
    def of_one(cls, weight: QuantizedWeight) -> WeightStack:
        return cls.quantized(weight.mode, weight.packed_OP.contiguous()[None], weight.scale_OG.contiguous()[None])

    @property
    def out_features(self) -> int:
        return self.packed_EOP.shape[1]

    @property
    def in_features(self) -> int:
        return self.packed_EOP.shape[2] * (2 if self.mode in ("int4", "nf4") else 1)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.in_features if self.mode == "plain" else self.in_features // self.scale_EOG.shape[2]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How much of a product one program computes at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiling_for(rows: float, itemsize: int) -> Tiling:
    """For so many rows of x per weight. Few: reading weights is all, many: multiplying is.

    Every choice keeps its stages under the 99 KB of shared memory that consumer cards have, those of float32 too, whose
    products also need three times the registers.
    """
    if itemsize == 4:
        height = 16 if rows <= 16 else 32 if rows <= 32 else 64
        return Tiling(rows=height, columns=64, depth=32, warps=4, stages=3)
    if rows <= 16:
        return Tiling(rows=16, columns=64, depth=128, warps=4, stages=4)
    if rows <= 32:
        return Tiling(rows=32, columns=64, depth=128, warps=4, stages=3)
    if rows <= 64:
        return Tiling(rows=64, columns=128, depth=64, warps=4, stages=3)
    return Tiling(rows=128, columns=128, depth=64, warps=8, stages=3)


@triton.jit
def small_float(code: tl.tensor) -> tl.tensor:
    """1024 + code of a code below 256, in float16."""
    return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def half_byte(code: tl.tensor, levels_ptr: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """What a code of 4 bits stands for before it is scaled, float32."""
    if MODE == "int4":
        return (small_float(code) - 1032.0).to(tl.float32)
    return tl.load(levels_ptr + code)


@triton.jit
def whole_byte(code: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    """What a code of 8 bits stands for before it is scaled, float16."""
    if MODE == "int8":
        return small_float((code.to(tl.int16) + 128) & 0xFF) - 1152.0
    # fp8: exponent and mantissa moved to where float16 has them; the exponents' zeros lie 8 apart.
    wide = code.to(tl.int16)
    bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def tile_scales(
    scale_rows: tl.tensor,
    is_weight: tl.tensor,
    start: tl.tensor,
    I: int,  # noqa: E741
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """The scale of every byte of a tile that begins at column `start`; each is loaded once where groups fit tiles."""
    # One return: of several, all are compiled, whatever is asked before them.
    if GROUP % DEPTH == 0:
        scale = tl.load(scale_rows + start // GROUP, mask=is_weight[:, None], other=0.0)
    elif DEPTH % GROUP == 0:
        group = start // GROUP + tl.arange(0, DEPTH // GROUP)[None, :]
        narrow = tl.load(scale_rows + group, mask=is_weight[:, None] & (group < I // GROUP), other=0.0)
        scale = tl.reshape(
            tl.broadcast_to(narrow[:, :, None], (COLUMNS, DEPTH // GROUP, GROUP // 2)), (COLUMNS, DEPTH // 2)
        )
    else:
        column = start + 2 * tl.arange(0, DEPTH // 2)[None, :]
        scale = tl.load(scale_rows + column // GROUP, mask=is_weight[:, None] & (column < I), other=0.0)
    return scale.to(tl.float32)


@triton.jit
def product(
    x_ptr: tl.tensor,
    x_row: tl.tensor,
    is_x: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    weight_row: tl.tensor,
    is_weight: tl.tensor,
    I: int,  # noqa: E741
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """x[x_row] @ weight[weight_row].T, (ROWS, COLUMNS), float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_rows = x_ptr + x_row[:, None] * I
    if MODE == "int4" or MODE == "nf4":
        scale_rows = scale_ptr + weight_row[:, None] * (I // GROUP)
        for start in range(0, I, DEPTH):
            column = start + tl.arange(0, DEPTH)[None, :]
            x = tl.load(x_rows + column, mask=is_x[:, None] & (column < I), other=0.0)
            byte = start // 2 + tl.arange(0, DEPTH // 2)[None, :]
            codes = weight_ptr + weight_row[:, None] * (I // 2) + byte
            code = tl.load(codes, mask=is_weight[:, None] & (byte < I // 2), other=0)
            scale = tile_scales(scale_rows, is_weight, start, I, GROUP, COLUMNS, DEPTH)
            # Even and odd columns apart: their codes lie in two halves of a byte, and a sum has no order.
            even, odd = tl.split(tl.reshape(x, (ROWS, DEPTH // 2, 2)))
            low = (half_byte(code & 15, levels_ptr, MODE) * scale).to(x.dtype)
            high = (half_byte(code >> 4, levels_ptr, MODE) * scale).to(x.dtype)
            total = tl.dot(even, tl.trans(low), total, input_precision="tf32x3")
            total = tl.dot(odd, tl.trans(high), total, input_precision="tf32x3")
    else:
        for start in range(0, I, DEPTH):
            column = start + tl.arange(0, DEPTH)[None, :]
            is_column = column < I
            x = tl.load(x_rows + column, mask=is_x[:, None] & is_column, other=0.0)
            weights = weight_ptr + weight_row[:, None] * I + column
            weight = tl.load(weights, mask=is_weight[:, None] & is_column, other=0)
            if MODE != "plain":
                weight = whole_byte(weight, MODE).to(x.dtype)
            total = tl.dot(x, tl.trans(weight), total, input_precision="tf32x3")
        if MODE != "plain":
            scale = tl.load(scale_ptr + weight_row, mask=is_weight, other=0.0).to(tl.float32)
            total = total * scale[None, :]
    return total

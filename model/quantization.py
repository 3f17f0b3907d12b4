"""Weights in fewer bits: what a quantised matrix is, how one is made from a plain one, and what it stands for.

    mode   a weight is                              in      one scale for       bits a weight
    int8   -127 .. 127                              int8    each row            8
    fp8    a number of one byte (e4m3)              fp8     each row            8
    int4   -8 .. 7, the largest is -8               4 bits  64 columns of a row  4.25
    nf4    one of sixteen levels, close to zero     4 bits  64 columns of a row  4.5
           more of them (bitsandbytes' code book)

Weights of 4 bits lie two to a byte, the even column in the low half; int4 adds 8, nf4 gives the level's number:

    column       0    1    2    3    4    5          weight[o, i] = level(packed[o, i]) * scale[o, i // group_size]
    packed_OP  [ 1:0  ][ 3:2  ][ 5:4  ]
                hi:lo

Scales are made from whole rows and whole groups, before a matrix is sliced: every rank of every topology holds codes
and scales of the one quantised model. Multiplying with it: quantized_linear.py. On disk: quantized_files.py.

O, I: features out and in.  P: bytes of a row.  G: groups of a row.  B: rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from model.modes import Mode, group_size, weights_per_byte

FP8_MAX = 448.0
# Weights that are quantised at once: temporaries stay small beside the matrix, and in a core's cache. On a GPU each
# launch should have more to do.
CPU_CHUNK = 1 << 16
CHUNK = 1 << 22

# The levels of NormalFloat 4: what is expected of the largest of 64 normal numbers is 1.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """The map x_TI @ weight_OI.T, as codes and scales. Immutable; every tensor on one device."""

    mode: Mode
    packed_OP: Tensor  # int8: int8.  fp8: float8_e4m3fn.  int4, nf4: uint8, two weights each
    scale_OG: Tensor  # any floating type: bfloat16 or float32 where made here, a file's own where read

    @property
    def out_features(self) -> int:
        return len(self.packed_OP)

    @property
    def in_features(self) -> int:
        return self.packed_OP.shape[1] * weights_per_byte(self.mode)

    @property
    def group_size(self) -> int:
        """Columns that share a scale: all of them where a row has one."""
        return self.in_features // self.scale_OG.shape[1]

    @property
    def nbytes(self) -> int:
        return self.packed_OP.nbytes + self.scale_OG.nbytes

    def to(self, device: torch.device) -> QuantizedWeight:
        return QuantizedWeight(self.mode, self.packed_OP.to(device), self.scale_OG.to(device))

    def rows(self, rows: slice) -> QuantizedWeight:
        return QuantizedWeight(self.mode, self.packed_OP[rows], self.scale_OG[rows])

    def columns(self, columns: range) -> QuantizedWeight:
        """A copy of some columns: whole groups, or any even number where a row has one scale."""
        per_byte, scales = weights_per_byte(self.mode), self.scale_OG
        if scales.shape[1] > 1:
            assert columns.start % self.group_size == 0
            assert columns.stop % self.group_size == 0
            scales = scales[:, columns.start // self.group_size : columns.stop // self.group_size]
        assert columns.start % per_byte == 0
        assert columns.stop % per_byte == 0
        packed = self.packed_OP[:, columns.start // per_byte : columns.stop // per_byte]
        return QuantizedWeight(self.mode, packed.contiguous(), scales.contiguous())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights that it stands for, computed in float32: the definition that every kernel follows."""
        levels_OGg = unpacked(self.mode, self.packed_OP).view(*self.scale_OG.shape, self.group_size)
        return levels_OGg.mul_(self.scale_OG[..., None]).view(self.out_features, self.in_features).to(dtype)

    def is_finite(self) -> bool:
        if self.mode == "fp8" and bool((self.packed_OP.view(torch.uint8) & 0x7F == 0x7F).any()):
            return False
        return bool(self.scale_OG.isfinite().all())


def below_each_other(parts: Iterable[QuantizedWeight], height: int) -> QuantizedWeight:
    """One matrix of several with the same input and so many rows in all. Each part is forgotten before the next."""
    row = 0
    scales: list[Tensor] = []
    for part in parts:
        if not scales:
            mode, packed_OP = part.mode, part.packed_OP.new_empty(height, part.packed_OP.shape[1])
        assert part.mode == mode
        packed_OP[row : row + part.out_features] = part.packed_OP
        scales.append(part.scale_OG)
        row += part.out_features
    assert row == height
    return QuantizedWeight(mode, packed_OP, torch.cat(scales))


def quantize(weight_OI: Tensor, mode: Mode) -> QuantizedWeight:
    """Of a whole matrix, or whole rows of it; the columns must be a multiple of the mode's group size."""
    chunk = CPU_CHUNK if weight_OI.device.type == "cpu" else CHUNK
    height = max(1, chunk // weight_OI.shape[1])
    return below_each_other(
        (quantize_rows(rows_BI, mode) for rows_BI in torch.split(weight_OI, height)), len(weight_OI)
    )


def quantize_rows(weight_BI: Tensor, mode: Mode) -> QuantizedWeight:
    rows, columns = weight_BI.shape
    weight_BGg = weight_BI.float().view(rows, -1, group_size(mode) or columns)
    match mode:
        case "int8":
            scale_BG1 = rounded(divided(weight_BGg.abs().amax(-1, keepdim=True), 127))
            packed = (weight_BGg / scale_BG1).round_().clamp_(-127, 127).to(torch.int8)
        case "fp8":
            scale_BG1 = rounded(divided(weight_BGg.abs().amax(-1, keepdim=True), FP8_MAX))
            packed = (weight_BGg / scale_BG1).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        case "int4":
            # The scale takes the sign that makes the largest weight -8, for there is no +8: an eighth less error.
            low_BG1, high_BG1 = weight_BGg.amin(-1, keepdim=True), weight_BGg.amax(-1, keepdim=True)
            scale_BG1 = rounded(torch.where(high_BG1 > -low_BG1, high_BG1, low_BG1) / -8)
            packed = pack_halves((weight_BGg / scale_BG1).round_().clamp_(-8, 7).add_(8))
        case "nf4":
            scale_BG1 = weight_BGg.abs().amax(-1, keepdim=True)
            packed = pack_halves(nearest_nf4(weight_BGg / scale_BG1.clamp_min(1e-30)))
    return QuantizedWeight(mode, packed.view(rows, -1), scale_BG1.squeeze(-1))


def divided(x: Tensor, number: float) -> Tensor:
    """By a number that lies where x does. By one of the host's a GPU does not divide: it multiplies with the
    reciprocal, and a few scales in a million would not be those that a CPU makes.
    """
    return x / x.new_full((), number)


def rounded(scale: Tensor) -> Tensor:
    """Scales are rounded before the weights are divided by them, so that nothing is lost by it. None is zero."""
    short = scale.bfloat16()
    return torch.where(short == 0, 1, short)


def nearest_nf4(values: Tensor) -> Tensor:
    """The number of the nearest level: how many middles between two lie below. Searching takes ten times as long."""
    levels = torch.tensor(NF4_LEVELS)
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for middle in ((levels[:-1] + levels[1:]) / 2).tolist():
        codes += values > middle
    return codes


def pack_halves(codes: Tensor) -> Tensor:
    """Numbers from 0 to 15, two to a byte."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpacked(mode: Mode, packed_OP: Tensor) -> Tensor:
    """What the codes stand for before they are scaled, float32 (O, I), new memory."""
    match mode:
        case "int8":
            return packed_OP.float()
        case "fp8":
            return fp8_values(packed_OP)
        case "int4" | "nf4":
            return functional.embedding(packed_OP.int(), levels_of_bytes(mode, packed_OP.device)).flatten(-2)


@cache
def levels_of_bytes(mode: Mode, device: torch.device) -> Tensor:
    """Of each byte, what its two codes stand for: (256, 2). Kept, for it is asked for with every piece of a matrix."""
    levels = torch.arange(-8.0, 8.0) if mode == "int4" else torch.tensor(NF4_LEVELS)
    return torch.stack((levels.repeat(16), levels.repeat_interleave(16)), dim=1).to(device)


def fp8_values(packed: Tensor) -> Tensor:
    """float32 of e4m3, by moving bits; torch's own conversion takes ten times as long on a CPU.

        e4m3   s eeee mmm                        value 2^(e - 7) * 1.mmm
        bf16   s 0000 eeee mmm0 000              value 2^(e - 127) * 1.mmm, and 2^120 brings it back

    The sign is spread over the upper half of 16 bits first, and all but one of its copies masked.
    """
    bits = (packed.view(torch.int8).to(torch.int16) << 4) & ~0x780F
    return bits.view(torch.bfloat16).float().mul_(2.0**120)

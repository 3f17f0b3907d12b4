"""Multiplying with quantised weights: one class for each way, all the same map, chosen once by make_quantized_linear.

    QuantizedLinear   any mode, any device    some rows of the weight are dequantised, multiplied with, forgotten
    Int8Linear        int8 on a CPU           torch's kernel for few rows of x, else as above
    Int4Linear        int4 on a CPU           torch's kernel for any number of rows
    KernelLinear      any mode on a GPU       our own kernel for few rows of x, else as above
    Fp8Linear         fp8 on Hopper           rows of x are rounded to fp8 too, and multiplied as they are

The first is the reference of the others. torch's two CPU kernels are fast in bfloat16 alone and private to torch, so
a float32 model and a torch without them take the first as well.

T: rows of x.  O, I: features out and in.  G: groups of a row.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from model.layers import Linear
from model.quantization import QuantizedWeight

if TYPE_CHECKING:
    from model.kernels.weight_tiles import WeightStack

# Weights that are dequantised at once. On a CPU they stay in its cache on the way into the product (measured: four
# times as many or a quarter take longer); elsewhere a matrix is a few pieces, so that its plain form is no burden.
CPU_PIECE = 1 << 18
PIECE = 1 << 25

# Up to as many rows torch's int8 kernel wins over dequantising, on two cores with AVX-512 (64 rows: 2.97 ms, 2.92 ms).
INT8_KERNEL_ROWS = 64
# It reads x in pieces of as many bytes and ends the process where one is not aligned to them.
INT8_KERNEL_ALIGNMENT = 32
INT4_KERNEL_GROUPS = (32, 64, 128, 256)
INT4_PACK_ROWS = 64
# Rows that our own kernel takes: those of decode steps. Dequantising pays for the many rows of prompts.
KERNEL_ROWS = 256


def make_quantized_linear(weight: QuantizedWeight, dtype: torch.dtype) -> Linear:
    """`dtype`: of what it multiplies and gives. The weight is the map's from now on."""
    device = weight.packed_OP.device
    match weight.mode, device.type:
        case "int8", "cpu" if has_int8_kernel(weight, dtype):
            return Int8Linear(weight, dtype)
        case "int4", "cpu" if has_int4_kernel(weight, dtype):
            return Int4Linear(weight)
        case "fp8", "cuda" if find_spec("triton") is not None and has_fp8_kernel(weight, dtype):
            return Fp8Linear(weight)
        case _, "cuda" if find_spec("triton") is not None:
            return KernelLinear(weight, dtype)
    return QuantizedLinear(weight, dtype)


class QuantizedLinear:
    """x_TI @ weight_OI.T of a weight that is dequantised a piece at a time."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.in_features, self.out_features, self.nbytes = weight.in_features, weight.out_features, weight.nbytes
        self._dtype = dtype
        piece = CPU_PIECE if weight.packed_OP.device.type == "cpu" else PIECE
        self._height = max(1, piece // weight.in_features)

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO = x_TI.new_empty(len(x_TI), self.out_features)
        for row in range(0, self.out_features, self._height):
            rows = slice(row, row + self._height)
            y_TO[:, rows] = functional.linear(x_TI, self.weight.rows(rows).dequantize(self._dtype))
        return y_TO

    @property
    def weight_OI(self) -> Tensor:
        return self.weight.dequantize(self._dtype)


class Int8Linear(QuantizedLinear):
    """For few rows of x, torch's CPU kernel: it reads each weight once, as one byte."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self._scale_O = weight.scale_OG.flatten().to(dtype)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) > INT8_KERNEL_ROWS:
            return super().__call__(x_TI)
        x_TI = x_TI.contiguous()
        if x_TI.data_ptr() % INT8_KERNEL_ALIGNMENT:
            x_TI = x_TI.clone()
        y_TO: Tensor = torch.ops.aten._weight_int8pack_mm(x_TI, self.weight.packed_OP, self._scale_O)
        return y_TO


class Int4Linear:
    """torch's CPU kernel, which wants the weights in an order of its own; no other copy is kept.

    So all x go through it: up to 200 rows it wins over dequantising, with thousands it takes twice as long.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        """The codes are put in order where they lie: the weight is this map's from now on."""
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self._group_size, self._packed = weight.group_size, weight.packed_OP
        # It is given 32 bits a code, so some rows at a time; it packs blocks of rows, of which these are a multiple.
        for packed in torch.split(self._packed, INT4_PACK_ROWS):
            codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()
            packed.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale_GO = weight.scale_OG.T.bfloat16()
        # The kernel adds a zero point to each weight; ours have none.
        self._scale_and_zero_GO2 = torch.stack((scale_GO, torch.zeros_like(scale_GO)), dim=-1)
        self.nbytes = self._packed.nbytes + self._scale_and_zero_GO2.nbytes

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_TI.contiguous(), self._packed, self._group_size, self._scale_and_zero_GO2
        )
        return y_TO

    @property
    def weight_OI(self) -> Tensor:
        """What the kernel makes of the identity: each weight exactly, times one."""
        return self(torch.eye(self.in_features, dtype=torch.bfloat16)).T


class KernelLinear(QuantizedLinear):
    """For few rows of x, the kernel of model/kernels/quantized_product.py: each weight is read once, packed."""

    _stack: WeightStack | None = None  # what the kernel reads, from the first call on

    def __call__(self, x_TI: Tensor) -> Tensor:
        if len(x_TI) > KERNEL_ROWS:
            return super().__call__(x_TI)
        from model.kernels.quantized_product import quantized_product
        from model.kernels.weight_tiles import WeightStack

        if self._stack is None:
            self._stack = WeightStack.of_one(self.weight)
        return quantized_product(x_TI.contiguous(), self._stack)


class Fp8Linear:
    """The tensor cores' own fp8 product: rows of x get a scale each and are rounded to fp8 like the weights."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight
        self.in_features, self.out_features, self.nbytes = weight.in_features, weight.out_features, weight.nbytes
        self._scale_1O = weight.scale_OG.float().T.contiguous()

    def __call__(self, x_TI: Tensor) -> Tensor:
        if not len(x_TI):
            return x_TI.new_empty(0, self.out_features)
        from model.kernels.round_rows import round_rows

        code_TI, scale_T = round_rows(x_TI.contiguous())
        return torch._scaled_mm(
            code_TI, self.weight.packed_OP.T,
            scale_a=scale_T[:, None], scale_b=self._scale_1O, out_dtype=torch.bfloat16,
        )  # fmt: skip

    @property
    def weight_OI(self) -> Tensor:
        return self.weight.dequantize(torch.bfloat16)


def has_int8_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.bfloat16
        and hasattr(torch.ops.aten, "_weight_int8pack_mm")
        and weight.in_features * dtype.itemsize % INT8_KERNEL_ALIGNMENT == 0
        and weight.scale_OG.shape[1] == 1
        and fits_bfloat16(weight.scale_OG)
    )


def has_int4_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.bfloat16
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and weight.group_size in INT4_KERNEL_GROUPS
        and weight.out_features % 16 == 0
        and fits_bfloat16(weight.scale_OG)
    )


def has_fp8_kernel(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    return (
        dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.packed_OP.device) >= (9, 0)
        and weight.scale_OG.shape[1] == 1
        and weight.in_features % 16 == 0
        and weight.out_features % 16 == 0
    )


def fits_bfloat16(scales: Tensor) -> bool:
    """A kernel that takes its scales in bfloat16 must not change the weights by it."""
    return torch.equal(scales.bfloat16().to(scales.dtype), scales)

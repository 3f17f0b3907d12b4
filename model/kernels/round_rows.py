"""Rows of x rounded to fp8, each with a scale of its own: what tensor cores multiply with weights of fp8.

T: rows.  I: features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.quantization import FP8_MAX

COLUMNS = 1024  # that a program looks at together
TINY = 1e-12  # so that a row of zeros has a scale


def round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn, and what each row's are multiplied by, (T,), float32."""
    T, I = x_TI.shape  # noqa: E741
    assert x_TI.is_contiguous()
    code_TI = torch.empty(T, I, dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TI.device)
    if T:
        _round_rows[(T,)](x_TI, code_TI, scale_T, I, TINY, LARGEST=FP8_MAX, COLUMNS=COLUMNS)
    return code_TI, scale_T


@triton.jit
def nearest_fp8(x: tl.tensor) -> tl.tensor:
    """The nearest number of 3 fraction bits, the even one of two. Casting it is exact, also in Triton's interpreter,
    which loses what rounding carries into the exponent.

    A large number is added and taken away whose last bit is worth what x's last one may be: 2^(exponent - 3), and
    2^-9 below the smallest exponent, -6.
    """
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
    large = (((exponent + 23 - 3) << 23) | 0x400000).to(tl.float32, bitcast=True)  # one and a half times a power of 2
    return (x + large) - large


@triton.jit
def _round_rows(
    x_ptr: tl.tensor,
    code_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    I: int,  # noqa: E741
    tiny: float,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, I, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * I + column, mask=column < I, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = tl.maximum(tl.max(largest, axis=0), tiny) / LARGEST
    tl.store(scale_ptr + row, scale)
    for start in range(0, I, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * I + column, mask=column < I, other=0.0).to(tl.float32)
        x = nearest_fp8(tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST))
        tl.store(code_ptr + row * I + column, x.to(tl.float8e4nv), mask=column < I)

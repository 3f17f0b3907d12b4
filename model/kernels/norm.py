"""The residual sum and the RMS norm in one pass over each row.

S: rows.  D: model width.  K: parts of what is added, summed in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(x_SD: Tensor, delta_SKD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x plus the sum over K of delta, in x's precision, and its norm."""
    S, D = x_SD.shape
    assert x_SD.is_contiguous()
    assert delta_SKD.is_contiguous()
    sum_SD, normed_SD = torch.empty_like(x_SD), torch.empty_like(x_SD)
    if S:
        _launch(x_SD, delta_SKD, weight_D, sum_SD, normed_SD, epsilon, parts=delta_SKD.numel() // (S * D))
    return sum_SD, normed_SD


def norm(x_SD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    assert x_SD.is_contiguous()
    normed_SD = torch.empty_like(x_SD)
    if len(x_SD):
        _launch(x_SD, x_SD, weight_D, normed_SD, normed_SD, epsilon, parts=0)
    return normed_SD


def _launch(
    x_SD: Tensor, delta: Tensor, weight_D: Tensor, sum_SD: Tensor, normed_SD: Tensor, epsilon: float, *, parts: int
) -> None:
    S, D = x_SD.shape
    width = triton.next_power_of_2(D)
    warps = 8 if width > 2048 else 4
    _add_norm[(S,)](
        x_SD, delta, weight_D, sum_SD, normed_SD, D, epsilon, PARTS=parts, WIDTH=width, num_warps=warps
    )  # fmt: skip


@triton.jit
def _add_norm(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    D: int,
    epsilon: float,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0)
    if PARTS > 0:
        delta = tl.load(delta_ptr + row * PARTS * D + column, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            delta += tl.load(delta_ptr + (row * PARTS + part) * D + column, mask=inside, other=0.0).to(tl.float32)
        # Rounded before and after it is added, as without this kernel.
        x = (x.to(tl.float32) + delta.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row * D + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + epsilon)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    tl.store(normed_ptr + row * D + column, (wide * scale).to(x.dtype) * weight, mask=inside)

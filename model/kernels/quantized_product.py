"""x times one quantised weight, for few rows of x: each weight is read once, in as few bits as it has.

T: rows of x.  I, O: features in and out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.weight_tiles import WeightStack, product, tiling_for


def quantized_product(x_TI: Tensor, weight: WeightStack) -> Tensor:
    """x_TI @ weight_OI.T, (T, O), for a stack of one."""
    T, I = x_TI.shape  # noqa: E741
    O = weight.out_features  # noqa: E741
    assert x_TI.is_contiguous()
    y_TO = x_TI.new_empty(T, O)
    if T:
        tiling = tiling_for(T, x_TI.element_size())
        _quantized_product[(triton.cdiv(T, tiling.rows), triton.cdiv(O, tiling.columns))](
            x_TI, weight.packed_EOP, weight.scale_EOG, weight.levels, y_TO, T, O, I,
            MODE=weight.mode, GROUP=weight.group_size, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    return y_TO


@triton.jit(do_not_specialize=["T"])
def _quantized_product(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    levels_ptr: tl.tensor,
    y_ptr: tl.tensor,
    T: int,
    O: int,  # noqa: E741
    I: int,  # noqa: E741
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    feature = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    y = product(
        x_ptr, row, row < T, weight_ptr, scale_ptr, levels_ptr, feature, feature < O, I,
        MODE, GROUP, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    tl.store(y_ptr + row[:, None] * O + feature[None, :], y, mask=(row < T)[:, None] & (feature < O)[None, :])

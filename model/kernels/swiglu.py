"""silu(gate) * up of rows that hold both side by side, read once and written once.

P: rows.  F: ffn width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # that one program computes


def swiglu(gate_up_PF: Tensor) -> Tensor:
    """From (P, 2F) to (P, F)."""
    P, width = gate_up_PF.shape
    F = width // 2
    assert gate_up_PF.is_contiguous()
    hidden_PF = gate_up_PF.new_empty(P, F)
    if P:
        _swiglu[(P, triton.cdiv(F, COLUMNS))](gate_up_PF, hidden_PF, F, COLUMNS=COLUMNS)
    return hidden_PF


@triton.jit
def _swiglu(gate_up_ptr: tl.tensor, hidden_ptr: tl.tensor, F: int, COLUMNS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    source = gate_up_ptr + row * 2 * F + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + row * F + column, gate * tl.sigmoid(gate) * up, mask=inside)

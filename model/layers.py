"""The parts every block shares: one fixed linear map and the RMS norm.

T: rows.  I, O: features in and out.  D: model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Rows the packed layout is tuned for. One pack serves every row count; decode batches gain most from it.
PACK_ROWS = 32


class Linear:
    """x_TI @ weight_OI.T for one weight, kept only in the layout that multiplies fastest where it lies.

    On the CPU that is oneDNN's blocked layout. Its operators are private to torch, so their absence (another build,
    another device, a half precision this processor lacks) means the plain layout and functional.linear.
    """

    __slots__ = ("_packed", "_weight", "in_features", "out_features")

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._packed = can_pack(weight_OI)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS) if self._packed else weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._packed:
            y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._weight, None, "none", [], "")
            return y_TO
        return functional.linear(x_TI, self._weight)

    @property
    def weight_OI(self) -> Tensor:
        """The plain weight; a copy where it is kept packed."""
        return self._weight.to_dense() if self._packed else self._weight


def can_pack(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or 0 in weight_OI.shape:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32


def rms_norm(x_TD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Scale each row to unit root mean square, in float32, then by the weight in x's own precision."""
    wide_TD = x_TD.float()
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + epsilon)
    return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D

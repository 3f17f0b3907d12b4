"""The parts every block shares: the fixed linear map, in its unquantised forms, and the RMS norm.

T: rows.  I, O: features in and out.  D: model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.native.linear import NativeLinear, has_kernel

# Rows the packed layout is tuned for. One pack serves every row count; decode batches gain most from it.
PACK_ROWS = 32


class Linear(Protocol):
    """x_TI @ weight_OI.T for one weight, kept only in the layout that multiplies fastest where it lies.

    Plain and packed here, bfloat16 on a CPU in native/linear.py, quantised in quantized_linear.py.
    """

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Of memory that it keeps."""

    @property
    def weight_OI(self) -> Tensor:
        """The plain weight; a copy where it is kept otherwise."""

    def __call__(self, x_TI: Tensor) -> Tensor: ...


def make_linear(weight_OI: Tensor) -> Linear:
    if has_kernel(weight_OI):
        return NativeLinear(weight_OI)
    return PackedLinear(weight_OI) if has_operator(weight_OI) else PlainLinear(weight_OI)


def can_pack(weight_OI: Tensor) -> bool:
    """Whether make_linear() keeps a copy in a layout of its own."""
    return has_kernel(weight_OI) or has_operator(weight_OI)


class PlainLinear:
    __slots__ = ("in_features", "nbytes", "out_features", "weight_OI")

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.nbytes = weight_OI.nbytes
        self.weight_OI = weight_OI

    def __call__(self, x_TI: Tensor) -> Tensor:
        return functional.linear(x_TI, self.weight_OI)


class PackedLinear:
    """In oneDNN's blocked layout, on the CPU.

    Its operators are private to torch, so their absence (another build, another device, a half precision this
    processor lacks) means the plain layout.
    """

    __slots__ = ("_packed", "in_features", "nbytes", "out_features")

    def __init__(self, weight_OI: Tensor) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self.nbytes = weight_OI.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, PACK_ROWS)

    def __call__(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, None, "none", [], "")
        return y_TO

    @property
    def weight_OI(self) -> Tensor:
        weight_OI: Tensor = self._packed.to_dense()
        return weight_OI


def has_operator(weight_OI: Tensor) -> bool:
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

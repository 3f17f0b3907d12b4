"""Linear maps and experts in bfloat16 by the compiled kernels. How weights are packed is drawn in product.h.

T: rows.  I, O: features in and out.  E: experts.  N: rows of all experts.  D: model width.  F: ffn width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from model.native.library import empty_huge, has_kernels, kernels

PANEL = 16  # output features; a kernel takes two panels at once


def has_kernel(weight_OI: Tensor) -> bool:
    fits = len(weight_OI) % (2 * PANEL) == 0 and weight_OI.shape[1] % 2 == 0 and weight_OI.numel() > 0
    return fits and weight_OI.dtype == torch.bfloat16 and weight_OI.device.type == "cpu" and has_kernels()


class NativeLinear:
    """x_TI @ weight_OI.T. A row's result depends on nothing but the row."""

    __slots__ = ("in_features", "nbytes", "out_features", "packed")

    def __init__(self, weight_OI: Tensor) -> None:
        assert has_kernel(weight_OI)
        self.out_features, self.in_features = weight_OI.shape
        self.nbytes = weight_OI.nbytes
        weight_OI = weight_OI.contiguous()
        panels, pairs = self.out_features // PANEL, self.in_features // 2
        self.packed = empty_huge((panels, pairs, PANEL, 2), weight_OI.dtype)
        kernels().pack(
            weight_OI.data_ptr(),
            self.out_features,
            self.in_features,
            self.packed.data_ptr(),
            torch.get_num_threads(),
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        return self.from_feature(0, x_TI)

    def from_feature(self, first: int, x_TI: Tensor) -> Tensor:
        """The output features from this one on."""
        assert first % (2 * PANEL) == 0
        assert x_TI.dtype == torch.bfloat16
        assert x_TI.shape[1] == self.in_features
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        T = len(x_TI)
        y_TO = x_TI.new_empty(T, self.out_features - first)
        kernels().linear(
            x_TI.data_ptr(),
            x_TI.stride(0),
            T,
            self.packed.data_ptr() + first * self.in_features * self.packed.itemsize,
            self.out_features - first,
            self.in_features,
            y_TO.data_ptr(),
            torch.get_num_threads(),
        )
        return y_TO

    @property
    def weight_OI(self) -> Tensor:
        return self.packed.transpose(1, 2).reshape(self.out_features, self.in_features)


class NativeExperts:
    """A block's experts in one call. `gate_up` and `down` are those of each local slot."""

    def __init__(self, gate_up: Sequence[NativeLinear], down: Sequence[NativeLinear]) -> None:
        self._kept = (*gate_up, *down)  # what the addresses point to
        self._slots = len(gate_up)
        self._D, self._F = gate_up[0].in_features, down[0].in_features
        assert self._F % PANEL == 0
        addresses = ctypes.c_void_p * self._slots
        self._gate_up = addresses(*(linear.packed.data_ptr() for linear in gate_up))
        self._down = addresses(*(linear.packed.data_ptr() for linear in down))
        self._rows = ctypes.c_int64 * self._slots

    def __call__(self, x_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """Each slot's expert on its own rows; rows lie slot after slot."""
        assert x_ND.dtype == torch.bfloat16
        assert x_ND.shape == (sum(rows), self._D)
        x_ND = x_ND.contiguous()
        hidden_NF = x_ND.new_empty(len(x_ND), self._F)
        y_ND = torch.empty_like(x_ND)
        kernels().experts(
            x_ND.data_ptr(),
            self._rows(*rows),
            self._slots,
            self._gate_up,
            self._down,
            self._D,
            self._F,
            hidden_NF.data_ptr(),
            y_ND.data_ptr(),
            torch.get_num_threads(),
        )
        return y_ND

"""Attention of one step, as a block asks for it. Its forms: cpu_backend.py, native/backend.py, device_attention.py.

T: rows of the step.  R: rows whose hidden states are wanted.  D: model width.
H, G: this rank's query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from model.layers import Linear


class StepAttention(Protocol):
    """Planned once for all layers."""

    def __call__(self, layer: int, heads_THC: Tensor) -> Tensor:
        """From query, key and value heads side by side, (T, H + 2G, C), to (T, H, C).

        Turns them by their positions and writes keys and values to their pages first.
        """

    def of_wanted(self, layer: int, normed_TD: Tensor, qkv: Linear, head_dim: int, wanted_R: Tensor) -> Tensor:
        """From the input of qkv to (R, H, C) of the wanted rows alone. Keys and values are written for all rows."""
        return self(layer, heads_of(qkv, normed_TD, head_dim)).index_select(0, wanted_R)


def heads_of(qkv: Linear, normed_TD: Tensor, head_dim: int) -> Tensor:
    """Query, key and value heads side by side, (T, H + 2G, C)."""
    return qkv(normed_TD).view(len(normed_TD), qkv.out_features // head_dim, head_dim)

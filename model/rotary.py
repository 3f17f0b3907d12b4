"""Rotary position embedding: how far each pair of a head's dimensions turns per token.

Pairs are split in halves, as Hugging Face lays heads out: dimension i turns with dimension i + C/2.

T: rows.  H: heads.  C: head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import MixtralConfig


class Rotary:
    """Turns per token of every pair, made once; cosines and sines of one step's positions, made per step."""

    def __init__(self, config: MixtralConfig, device: torch.device) -> None:
        C = config.head_dim
        exponents = torch.arange(0, C, 2, dtype=torch.float32, device=device) / C
        self._frequencies = 1.0 / config.rope_parameters.rope_theta**exponents

    def angles(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each position, (T, 1, C), ready to multiply heads."""
        half = position_T[:, None].float() * self._frequencies
        whole_T1C = torch.cat((half, half), dim=-1)[:, None]
        return whole_T1C.cos().to(dtype), whole_T1C.sin().to(dtype)


def rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    first, second = x_THC.chunk(2, dim=-1)
    return x_THC * cos_T1C + torch.cat((-second, first), dim=-1) * sin_T1C

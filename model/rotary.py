"""Rotary position embedding: how far each pair of a head's dimensions turns per token, plain or stretched.

Pairs are split in halves, as Hugging Face lays heads out: dimension i turns with dimension i + C/2.

The frequencies of a model are fixed: a token's key is written once and must mean the same in every later step. So the
two kinds that follow the text's length are honoured as far as that allows. "dynamic" changes nothing up to
max_position_embeddings, and no text is longer here. "longrope" takes its long factors if and only if
max_position_embeddings is above the original length.

T: rows.  H: heads.  C: head_dim.  P: pairs, C / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import MixtralConfig
from model.rope_parameters import RopeParameters


class Rotary:
    """Frequencies, made once; cosines and sines of one step's positions, made per step and shared by all layers."""

    def __init__(self, config: MixtralConfig, device: torch.device) -> None:
        rope = config.rope_parameters
        frequency_P = scaled_frequencies(rope, config.head_dim, config.max_position_embeddings)
        self._frequency_P = frequency_P.to(device)
        self._attention_factor = attention_factor(rope)

    def angles(self, position_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each position, (T, 1, C), ready to multiply heads."""
        half_TP = position_T[:, None].float() * self._frequency_P
        whole_T1C = torch.cat((half_TP, half_TP), dim=-1)[:, None]
        factor = self._attention_factor
        return (whole_T1C.cos() * factor).to(dtype), (whole_T1C.sin() * factor).to(dtype)


def rotate(x_THC: Tensor, cos_T1C: Tensor, sin_T1C: Tensor) -> Tensor:
    first, second = x_THC.chunk(2, dim=-1)
    return x_THC * cos_T1C + torch.cat((-second, first), dim=-1) * sin_T1C


def scaled_frequencies(rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> Tensor:
    """Radians per token of every pair, (P,), float32."""
    plain_P = 1.0 / rope.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    match rope.rope_type:
        case "default" | "dynamic":
            return plain_P
        case "linear":
            return plain_P / rope.factor
        case "yarn":
            return yarn_frequencies(rope, head_dim, plain_P)
        case "llama3":
            return llama3_frequencies(rope, plain_P)
        case "longrope":
            is_long = max_position_embeddings > rope.original_max_position_embeddings
            return plain_P / torch.tensor(rope.long_factor if is_long else rope.short_factor)


def yarn_frequencies(rope: RopeParameters, head_dim: int, plain_P: Tensor) -> Tensor:
    """Pairs that turn often in the original length keep their speed, slow ones are stretched, a ramp lies between."""

    def pair_that_turns(times: float) -> float:
        turns = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretched_P = ((torch.arange(head_dim // 2).float() - low) / width).clamp(0, 1)
    return plain_P / rope.factor * stretched_P + plain_P * (1 - stretched_P)


def llama3_frequencies(rope: RopeParameters, plain_P: Tensor) -> Tensor:
    """As yarn, with the ramp over the number of turns rather than the pair's place."""
    turns_P = rope.original_max_position_embeddings * plain_P / (2 * math.pi)
    kept_P = ((turns_P - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return plain_P / rope.factor * (1 - kept_P) + plain_P * kept_P


def attention_factor(rope: RopeParameters) -> float:
    """What cosines and sines are multiplied with, so that stretched attention stays as sharp."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    match rope.rope_type:
        case "yarn" if rope.mscale and rope.mscale_all_dim:
            widening = 0.1 * math.log(rope.factor)
            return (widening * rope.mscale + 1) / (widening * rope.mscale_all_dim + 1)
        case "yarn":
            return 0.1 * math.log(rope.factor) + 1
        case "longrope":
            return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))
        case _:
            return 1.0

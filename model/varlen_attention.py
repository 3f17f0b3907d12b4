"""Attention of many chunks of prompts in one call, without padding: flash-attn's kernel, torch's, or the definition.

    rows  a a a b b      keys  a a a a a b b      a chunk's rows are the last of its keys; row l sees keys up to itself

L: rows of all chunks.  M: keys of all chunks.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where each chunk's rows and keys lie among all, for the host and for kernels."""

    rows: tuple[int, ...]  # of each chunk
    keys: tuple[int, ...]
    row_border: Tensor  # int32: where each chunk's rows begin, and the end
    key_border: Tensor


# query_LHC, key_MGC, value_MGC, chunks, keys that a row sees with itself (None: all) -> (L, H, C)
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Chunks, int | None], Tensor]


def varlen_attention_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> VarlenAttention:
    """flash-attn's where it is installed; both flash kernels know half precisions and heads of up to 256 alone."""
    flash = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if not flash:
        return masked_attention
    return flash_attn_attention if find_spec("flash_attn") else torch_flash_attention


def flash_attn_attention(
    query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, chunks: Chunks, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out_LHC: Tensor = flash_attn_varlen_func(
        query_LHC, key_MGC, value_MGC, chunks.row_border, chunks.key_border, max(chunks.rows), max(chunks.keys),
        causal=True, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    return out_LHC


def torch_flash_attention(
    query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, chunks: Chunks, window: int | None
) -> Tensor:
    """Called by name: torch 2.11's public function for it takes as many key-value heads as query heads only."""
    out_LHC: Tensor = torch.ops.aten._flash_attention_forward(
        query_LHC, key_MGC, value_MGC, chunks.row_border, chunks.key_border, max(chunks.rows), max(chunks.keys),
        0.0, window is None, False,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return out_LHC


def masked_attention(
    query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, chunks: Chunks, window: int | None
) -> Tensor:
    """One chunk after another, with a mask: any device, any precision."""
    queries = torch.split(query_LHC, list(chunks.rows))
    keys, values = (torch.split(x_MGC, list(chunks.keys)) for x_MGC in (key_MGC, value_MGC))
    return torch.cat([attend_masked(*one, window) for one in zip(queries, keys, values, strict=True)])


def attend_masked(query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, window: int | None) -> Tensor:
    L, M = len(query_LHC), len(key_MGC)
    position_L1 = torch.arange(M - L, M, device=query_LHC.device)[:, None]
    distance_LM = position_L1 - torch.arange(M, device=query_LHC.device)
    seen_LM = (distance_LM >= 0) & (distance_LM < (M if window is None else window))
    query_1HLC, key_1GMC, value_1GMC = (x.transpose(0, 1)[None] for x in (query_LHC, key_MGC, value_MGC))
    out_1HLC = functional.scaled_dot_product_attention(
        query_1HLC, key_1GMC, value_1GMC, attn_mask=seen_LM, enable_gqa=True
    )
    return out_1HLC[0].transpose(0, 1)

"""flash-attn 2.8's two functions that we call, computed by their definition: same arguments, same refusals.

Where arguments are checked it is by what the extension itself checks before it launches anything.

B: texts.  L: rows.  M: keys.  W: pages of the block table.  H, G: query and key-value heads.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

PAGE_MULTIPLE = 256


def fake_flash_attn(page_multiple: int = PAGE_MULTIPLE) -> ModuleType:
    """To be put where `import flash_attn` finds it. A smaller multiple makes small tests possible."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, softmax_scale, softcap, alibi_slopes, return_attn_probs) == (0.0, None, 0.0, None, False)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.is_contiguous()
        assert cu_seqlens_k.is_contiguous()
        rows, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max(rows) <= max_seqlen_q
        assert max(keys) <= max_seqlen_k
        if block_table is None:
            texts = list(zip(k.split(keys), v.split(keys), strict=True))
        else:
            check_pages(k, v, block_table, len(rows), page_multiple)
            texts = gathered(k, v, block_table, keys)
        return torch.cat(
            [attend(q_LHC, *text, causal, window_size) for q_LHC, text in zip(q.split(rows), texts, strict=True)]
        )

    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        cache_seqlens: int | Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        block_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        alibi_slopes: Tensor | None = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Tensor:
        assert [k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, softmax_scale, alibi_slopes] == [None] * 8
        assert (softcap, num_splits, return_softmax_lse) == (0.0, 0, False)
        assert block_table is not None
        assert isinstance(cache_seqlens, Tensor)
        assert cache_seqlens.dtype == torch.int32
        assert cache_seqlens.is_contiguous()
        assert cache_seqlens.shape == (len(q),)
        check_pages(k_cache, v_cache, block_table, len(q), page_multiple)
        texts = gathered(k_cache, v_cache, block_table, cache_seqlens.tolist())
        return torch.stack([attend(q_LHC, *text, causal, window_size) for q_LHC, text in zip(q, texts, strict=True)])

    module = ModuleType("flash_attn")
    module.__dict__.update(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )
    return module


def check_pages(k: Tensor, v: Tensor, block_table: Tensor, texts: int, page_multiple: int) -> None:
    assert texts > 0
    assert block_table.dtype == torch.int32
    assert block_table.stride(-1) == 1
    assert block_table.dim() == 2
    assert len(block_table) == texts
    assert k.shape == v.shape
    assert k.stride(-1) == v.stride(-1) == 1
    assert k.shape[1] % page_multiple == 0


def gathered(k: Tensor, v: Tensor, block_table: Tensor, keys: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    assert max(keys) <= block_table.shape[1] * k.shape[1]
    return [
        (k[pages.long()].flatten(0, 1)[:count], v[pages.long()].flatten(0, 1)[:count])
        for pages, count in zip(block_table, keys, strict=True)
    ]


def attend(query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Row i is at key i + M - L, and sees as many keys before and behind it as window_size says; -1: all."""
    (L, H, C), (M, G, _) = query_LHC.shape, key_MGC.shape
    left, right = window_size
    distance_LM = torch.arange(M) - (torch.arange(L)[:, None] + M - L)
    hidden_LM = distance_LM > 0 if causal else torch.zeros(L, M, dtype=torch.bool)
    if left >= 0:
        hidden_LM = hidden_LM | (distance_LM < -left)
    if right >= 0:
        hidden_LM = hidden_LM | (distance_LM > right)
    # Hidden keys are not read: what lies there may be anything.
    unread_M = hidden_LM.all(0)
    key_HMC, value_HMC = (
        x_MGC.masked_fill(unread_M[:, None, None], 0).transpose(0, 1).repeat_interleave(H // G, dim=0).float()
        for x_MGC in (key_MGC, value_MGC)
    )
    scores_HLM = query_LHC.transpose(0, 1).float() @ key_HMC.transpose(1, 2) * C**-0.5
    weights_HLM = scores_HLM.masked_fill(hidden_LM, -torch.inf).softmax(-1)
    return (weights_HLM @ value_HMC).transpose(0, 1).to(query_LHC.dtype)

"""Attention over paged keys and values on a CPU. What to do is in the plan; this does it. A GPU: device_attention.py.

T: rows of the batch.  L: rows of one sequence.  M: keys in sight.  B: sequences together.  N: slots of page memory.
H, G: this rank's query and key-value heads.  Q: queries per key-value head, H / G.  X: B * G.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention_plan import AttentionPlan, Together

# A context in more pieces than this is copied into one first: one copy beats many small kernels and their merge.
MAX_RUNS = 4

# An output and the logarithm of each row's softmax sum, as merging needs them.
Part = tuple[Tensor, Tensor]


def paged_attention(
    query_THC: Tensor, key_TGC: Tensor, value_TGC: Tensor, memory: tuple[Tensor, Tensor], plan: AttentionPlan
) -> Tensor:
    """The attention output of every row, (T, H, C). The step's keys and values must already be in page memory."""
    out_THC = torch.empty_like(query_THC)
    for group in plan.together:
        out_BHC = attend_together(query_THC.index_select(0, group.row_B), memory, group)
        out_THC.index_copy_(0, group.row_B, out_BHC)
    for one in plan.alone:
        query_LHC = query_THC[one.rows]
        runs = one.runs
        if one.mask_LM is not None or len(runs) > MAX_RUNS:
            parts = [attend(query_LHC, *gather(memory, runs), mask_LM=one.mask_LM)]
        else:
            parts = [attend(query_LHC, memory[0][run], memory[1][run]) for run in runs]
        if one.causal:
            parts.append(attend(query_LHC, key_TGC[one.rows], value_TGC[one.rows], causal=True))
        out_THC[one.rows] = merge(parts)
    return out_THC


def gather(memory: tuple[Tensor, Tensor], runs: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Keys and values of all runs in one piece each, (M, G, C)."""
    key_NGC, value_NGC = memory
    return torch.cat([key_NGC[run] for run in runs]), torch.cat([value_NGC[run] for run in runs])


def attend_together(query_BHC: Tensor, memory: tuple[Tensor, Tensor], group: Together) -> Tensor:
    """One row of each sequence over a copy of its keys.

    Keys are copied head by head, so that both products are batched ones of matrices without gaps: for many short
    contexts these are two to four times as fast as the flash kernel, and as exact.
    """
    B, H, C = query_BHC.shape
    _, G, _ = memory[0].shape
    head_G1 = torch.arange(G, device=group.slots.device)[:, None]
    row_BGM = (group.slots.view(B, 1, -1) * G + head_G1).flatten()
    key_XMC, value_XMC = (x_NGC.view(-1, C).index_select(0, row_BGM).view(B * G, -1, C) for x_NGC in memory)
    scores_XQM = torch.bmm(query_BHC.reshape(B * G, H // G, C), key_XMC.transpose(1, 2))
    scores_BGQM = scores_XQM.float().mul_(C**-0.5).view(B, G, H // G, -1).add_(group.mask_B11M)
    weights_BGQM = torch.softmax(scores_BGQM, dim=-1).to(value_XMC.dtype)
    return torch.bmm(weights_BGQM.view(B * G, H // G, -1), value_XMC).view(B, H, C)


def attend(
    query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, *, causal: bool = False, mask_LM: Tensor | None = None
) -> Part:
    """Softmax attention of some rows over some keys: (L, H, C) and (L, H)."""
    L, H, C = query_LHC.shape
    _, G, _ = key_MGC.shape
    query_GQLC = query_LHC.view(L, G, H // G, C).permute(1, 2, 0, 3)
    key_GMC, value_GMC = key_MGC.transpose(0, 1), value_MGC.transpose(0, 1)
    out, log_sum = attention(query_GQLC[None], key_GMC[None], value_GMC[None], causal=causal, mask=mask_LM)
    return out.reshape(H, L, C).transpose(0, 1), log_sum.reshape(H, L).T


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Part:
    """Query (B, G, Q, L, C) over keys and values (B, G, M, C): the output, shaped as the query, and (B, G, Q, L).

    The mask is added to the scores: (L, M). Causal: row l sees keys 0 .. l.

    torch's flash kernel, called by name: the public function returns no log-sums.
    Queries that share a key-value head are folded where the kernel takes them for nothing: into its query length when
    every row sees the same keys, else into its heads (keys repeated by stride, not copied).
    """
    B, G, Q, L, C = query.shape
    if L == 1 or (mask is None and not causal):
        query = query.reshape(B, G, Q * L, C)
    else:
        assert B == 1
        query = query[0]
        key, value = (x[0, :, None].expand(G, Q, -1, C) for x in (key, value))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=causal, attn_mask=mask
    )
    return out.reshape(B, G, Q, L, C), log_sum.reshape(B, G, Q, L)


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys from attention over disjoint pieces of them."""
    if len(parts) == 1:
        return parts[0][0]
    weight_PLH1 = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)[..., None]
    out_PLHC = torch.stack([out for out, _ in parts])
    return (out_PLHC * weight_PLH1).sum(0).to(out_PLHC.dtype)

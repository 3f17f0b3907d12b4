"""Attention over paged keys and values, on the CPU's flash kernel. What to do is in the plan; this does it.

T: rows of the batch.  L: rows of one sequence.  M: keys in sight.  B: sequences together.  H, G: this rank's query and
key-value heads.  Q: queries per key-value head, H / G.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention_plan import AttentionPlan, Together

# A context in more pieces than this is copied into one first: one copy beats many small kernels and their merge.
MAX_RUNS = 4

# An output and the logarithm of each row's softmax sum: (L, H, C) and (L, H).
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
    B, H, C = query_BHC.shape
    _, G, _ = memory[0].shape
    key_BGMC, value_BGMC = (x_NGC.index_select(0, group.slots).view(B, -1, G, C).transpose(1, 2) for x_NGC in memory)
    out_BGQC, _ = flash(query_BHC.view(B, G, H // G, C), key_BGMC, value_BGMC, mask=group.mask_B11M)
    return out_BGQC.reshape(B, H, C)


def attend(
    query_LHC: Tensor, key_MGC: Tensor, value_MGC: Tensor, *, causal: bool = False, mask_LM: Tensor | None = None
) -> Part:
    """Softmax attention of some rows over some keys.

    Queries that share a key-value head are folded where the kernel takes them for nothing: into its query length when
    every row sees every key, else into its head dimension (keys repeated by stride, not copied).
    """
    L, H, C = query_LHC.shape
    M, G, _ = key_MGC.shape
    Q = H // G
    query_GQLC = query_LHC.view(L, G, Q, C).permute(1, 2, 0, 3)
    key_GMC, value_GMC = key_MGC.transpose(0, 1), value_MGC.transpose(0, 1)
    if causal or mask_LM is not None:
        key_GQMC, value_GQMC = (x[:, None].expand(G, Q, M, C) for x in (key_GMC, value_GMC))
        out, log_sum = flash(query_GQLC, key_GQMC, value_GQMC, causal=causal, mask=mask_LM)
    else:
        out, log_sum = flash(query_GQLC.reshape(1, G, Q * L, C), key_GMC[None], value_GMC[None])
    return out.reshape(G, Q, L, C).permute(2, 0, 1, 3).reshape(L, H, C), log_sum.reshape(H, L).T


def flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Part:
    """torch's CPU kernel, called by name: the public function returns no log-sums."""
    out: Tensor
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=causal, attn_mask=mask
    )
    return out, log_sum


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys from attention over disjoint pieces of them."""
    if len(parts) == 1:
        return parts[0][0]
    weight_PLH1 = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)[..., None]
    out_PLHC = torch.stack([out for out, _ in parts])
    return (out_PLHC * weight_PLH1).sum(0).to(out_PLHC.dtype)

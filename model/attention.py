"""Attention of one block over paged keys and values, on the CPU's flash kernel.

Rows of a batch are the new tokens of many sequences. For each sequence there are two parts, merged by log-sum-exp:

    keys    [ run of pages ][ run of pages ] [ this step's rows ]
    rows     see all of it    see all of it    causal

Nothing is gathered: a run is a view of page memory, this step's keys are still at hand. A single new token needs no
causal part; its own key is read back from its page. A sequence scattered over many runs is gathered into one piece.

Where a sliding window cuts a context short, rows of a chunk see different keys: those are gathered and masked.

T: rows of the batch.  L: rows of one sequence.  M: keys in sight.  H, G: this rank's query and key-value heads.
Q: queries per key-value head, H / G.  C: head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.batch import Batch, SequenceSpan

# A context in more pieces than this is copied into one first: one copy beats many small kernels and their merge.
MAX_RUNS = 4

# An output and the logarithm of each row's softmax sum: (L, H, C) and (L, H).
Part = tuple[Tensor, Tensor]


def paged_attention(
    query_THC: Tensor,
    key_TGC: Tensor,
    value_TGC: Tensor,
    batch: Batch,
    memory: tuple[Tensor, Tensor],
    page_size: int,
    window: int | None,
) -> Tensor:
    """The attention output of every row, (T, H, C). The step's keys and values must already be in page memory."""
    out_THC = torch.empty_like(query_THC)
    for span in batch.spans:
        rows = slice(span.row, span.row + span.length)
        query = query_THC[rows]
        first = 0 if window is None else max(0, span.context - span.length + 1 - window)
        if span.length == 1:
            parts = attend_past(query, memory, list(slot_runs(span, first, span.context, page_size)))
            out_THC[rows] = merge(parts)
        elif window is not None and span.context > window:
            key, value = gather(memory, list(slot_runs(span, first, span.context, page_size)))
            mask_LM = window_mask(span.length, len(key), window, query)
            out_THC[rows] = attend(query, key, value, mask_LM=mask_LM)[0]
        else:
            past = span.context - span.length
            parts = attend_past(query, memory, list(slot_runs(span, 0, past, page_size)))
            parts.append(attend(query, key_TGC[rows], value_TGC[rows], causal=True))
            out_THC[rows] = merge(parts)
    return out_THC


def slot_runs(span: SequenceSpan, first: int, last: int, page_size: int) -> Iterator[slice]:
    """Where tokens first .. last - 1 of a sequence lie in page memory."""
    start = 0
    for first_page, pages in span.runs:
        low, high = max(first - start, 0), min(last - start, pages * page_size)
        if low < high:
            yield slice(first_page * page_size + low, first_page * page_size + high)
        start += pages * page_size


def attend_past(query_LHC: Tensor, memory: tuple[Tensor, Tensor], runs: list[slice]) -> list[Part]:
    """Attention of rows that see every key of every run."""
    if len(runs) > MAX_RUNS:
        return [attend(query_LHC, *gather(memory, runs))]
    return [attend(query_LHC, memory[0][run], memory[1][run]) for run in runs]


def gather(memory: tuple[Tensor, Tensor], runs: list[slice]) -> tuple[Tensor, Tensor]:
    """Keys and values of all runs in one piece each, (M, G, C)."""
    key_NGC, value_NGC = memory
    return torch.cat([key_NGC[run] for run in runs]), torch.cat([value_NGC[run] for run in runs])


def window_mask(rows: int, keys: int, window: int, like: Tensor) -> Tensor:
    """What to add to the scores of the last `rows` of `keys` tokens: each sees itself and window - 1 before it."""
    position_L1 = torch.arange(keys - rows, keys, device=like.device)[:, None]
    distance_LM = position_L1 - torch.arange(keys, device=like.device)
    hidden_LM = (distance_LM < 0) | (distance_LM >= window)
    return torch.zeros(rows, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden_LM, float("-inf"))


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
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if causal or mask_LM is not None:
        key_GQMC, value_GQMC = (x[:, None].expand(G, Q, M, C) for x in (key_GMC, value_GMC))
        out, log_sum = kernel(query_GQLC, key_GQMC, value_GQMC, is_causal=causal, attn_mask=mask_LM)
    else:
        out, log_sum = kernel(query_GQLC.reshape(1, G, Q * L, C), key_GMC[None], value_GMC[None])
    return out.reshape(G, Q, L, C).permute(2, 0, 1, 3).reshape(L, H, C), log_sum.reshape(H, L).T


def merge(parts: list[Part]) -> Tensor:
    """Attention over all keys from attention over disjoint pieces of them."""
    if len(parts) == 1:
        return parts[0][0]
    weight_PLH1 = torch.softmax(torch.stack([log_sum for _, log_sum in parts]), dim=0)[..., None]
    out_PLHC = torch.stack([out for out, _ in parts])
    return (out_PLHC * weight_PLH1).sum(0).to(out_PLHC.dtype)

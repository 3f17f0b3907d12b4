"""Log-probabilities of the model itself: of its raw logits, before temperature, filters, bans and penalties.

R rows, V vocabulary, N likeliest tokens. Pure functions; the engine asks only for rows that want them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Logprobs:
    chosen_R: Tensor  # float32: of the given ids
    rank_R: Tensor  # int64: 1 for the likeliest; tokens tied with it do not count against it
    top_ids_RN: Tensor  # int64: likeliest first, the lower id first where two are equal
    top_RN: Tensor  # float32


def logprobs(logits_RV: Tensor, ids_R: Tensor, top: int) -> Logprobs:
    V = logits_RV.shape[1]
    assert 0 <= top <= V, (top, V)
    logprob_RV = logits_RV.float().log_softmax(dim=-1)
    chosen_R1 = logprob_RV.gather(1, ids_R[:, None])
    rank_R = (logprob_RV > chosen_R1).sum(dim=-1) + 1
    top_ids_RN = V - 1 - (_sort_keys(logprob_RV).topk(top, dim=-1).values & 0xFFFFFFFF)
    return Logprobs(chosen_R1[:, 0], rank_R, top_ids_RN, logprob_RV.gather(1, top_ids_RN))


def _sort_keys(x_RV: Tensor) -> Tensor:
    """Distinct int64s in the order of x, the lower id the larger where two are equal: top-k leaves ties open."""
    V = x_RV.shape[1]
    # A float's bits order like an integer's, but for negative ones, which run backwards.
    bits_RV = x_RV.view(torch.int32)
    ordered_RV = bits_RV ^ ((bits_RV >> 31) & 0x7FFFFFFF)
    return (ordered_RV.long() << 32) | torch.arange(V - 1, -1, -1, device=x_RV.device)

"""Logits to token ids: greedy where the temperature is 0, else a seeded race that every replay runs the same way.

    score_v = logit_v / temperature + gumbel(hash(seed, index, v))        the highest score wins

The noise of a token is a hash of (seed, index, token id) and of nothing else, so a row draws the same token alone,
in any batch, on any rank and after a replay. And because tokens race each other instead of sharing a cumulative
sum, logits that differ by rounding change the winner only where the two best scores are that close.

top_k, top_p and min_p each become one number per row: the lowest logit that may still win; tokens tied with it stay
in. top_p counts the mass that top_k left; min_p is relative to the likeliest token.

R rows, V vocabulary, M likeliest tokens of a row. Knows neither requests nor ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.to_device import numbers

GREEDY_BELOW = 1e-5  # temperatures under this would only overflow on their way to the same answer

_CPU_CHUNK = 1 << 18  # elements drawn at once on CPU: their buffers stay in a core's cache, 5x as fast as all rows
_NUCLEI = (128, 2048)  # where most nuclei end; only rows whose nucleus is larger are sorted whole, ten times as slow


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row of logits becomes a token."""

    temperature: float = 1.0  # 0: greedy, and the rest is ignored
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # at most 1
    seed: int = 0  # any int; its low 64 bits count
    index: int = 0  # tokens generated before this one

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def sample(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """One token id per row (int64). Exact ties go to the lowest id."""
    R, V = logits_RV.shape
    assert len(rows) == R, (len(rows), R)
    ids_R = logits_RV.argmax(dim=-1)
    drawn = [r for r, row in enumerate(rows) if not row.greedy]
    chunk = max(1, _CPU_CHUNK // V) if logits_RV.device.type == "cpu" else max(1, R)
    for start in range(0, len(drawn), chunk):
        some = drawn[start : start + chunk]
        index = numbers(some, torch.int64, logits_RV.device)
        ids_R[index] = _draw(logits_RV.index_select(0, index).float(), [rows[r] for r in some])
    return ids_R


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    temperature_R1 = numbers([[row.temperature] for row in rows], logits_RV.dtype, logits_RV.device)
    # Counted down from the row's best, so that dividing never overflows to +inf.
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R1
    if any(row.filtered for row in rows):
        scaled_RV = scaled_RV.masked_fill(scaled_RV < cutoff(scaled_RV, rows)[:, None], -torch.inf)
    return (scaled_RV + gumbel(rows, logits_RV.shape[1], logits_RV.device)).argmax(dim=-1)


def cutoff(scaled_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The lowest scaled logit of each row that its filters leave in [R]. Scaled logits count down from 0."""
    cutoff_R = numbers([row.min_p for row in rows], scaled_RV.dtype, scaled_RV.device).log()
    by_rank = [r for r, row in enumerate(rows) if row.top_k > 0]
    by_mass = [r for r, row in enumerate(rows) if row.top_p < 1.0]
    least_R = torch.full_like(cutoff_R, -torch.inf)  # what top_k leaves in, alone
    if by_rank:
        index = numbers(by_rank, torch.int64, scaled_RV.device)
        least_R[index] = _rank_cutoff(scaled_RV[index], [rows[r].top_k for r in by_rank])
    nucleus_R = least_R.clone()
    if by_mass:
        index = numbers(by_mass, torch.int64, scaled_RV.device)
        top_p_R = numbers([rows[r].top_p for r in by_mass], torch.float64, scaled_RV.device)
        nucleus_R[index] = _mass_cutoff(scaled_RV[index], least_R[index], top_p_R)
    return torch.maximum(cutoff_R, nucleus_R)


def _rank_cutoff(scaled_RV: Tensor, top_k: Sequence[int]) -> Tensor:
    """The top_k-th largest of each row."""
    M = min(max(top_k), scaled_RV.shape[1])
    best_RM = scaled_RV.topk(M, dim=-1).values
    last_R1 = numbers([[min(k, M) - 1] for k in top_k], torch.int64, scaled_RV.device)
    return best_RM.gather(1, last_R1)[:, 0]


def _mass_cutoff(scaled_RV: Tensor, least_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Where the likeliest tokens, from the best down, first hold top_p of the mass of those at or above `least`."""
    R, V = scaled_RV.shape
    mass_R = scaled_RV.exp().masked_fill_(scaled_RV < least_R[:, None], 0.0).sum(dim=-1, dtype=torch.float64)
    wanted_R = mass_R * top_p_R
    cutoff_R = torch.empty_like(least_R)
    rows_left = torch.arange(R, device=scaled_RV.device)
    # Which rows are left the host must be told; on a device that is a wait, so all are sorted there at once.
    fewer = [M for M in _NUCLEI if M < V] if scaled_RV.device.type == "cpu" else []
    for M in (*fewer, V):
        best_RM = scaled_RV[rows_left].topk(M, dim=-1).values
        short_RM = best_RM.exp().cumsum(dim=-1, dtype=torch.float64) < wanted_R[rows_left, None]
        # Past the end only for want of M; or, where M is V, of a rounding of the sum.
        position_R = short_RM.sum(dim=-1).clamp(max=M - 1)
        cutoff_R[rows_left] = best_RM.gather(1, position_R[:, None])[:, 0]
        if M == V:
            break
        rows_left = rows_left[short_RM[:, -1]]
        if rows_left.numel() == 0:
            break
    return torch.maximum(cutoff_R, least_R)


def gumbel(rows: Sequence[SamplingRow], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [R, V], a function of each row's seed and index and of the token id."""
    keys = [_row_key(row.seed, row.index) for row in rows]
    key_R2 = numbers([[_signed(key >> 32), _signed(key)] for key in keys], torch.int32, device)
    # Integer products wrap around, on CPU as on GPU; `>>` keeps the sign, hence the masks.
    hash_RV = torch.arange(vocab_size, dtype=torch.int32, device=device) * _signed(0x9E3779B1) + key_R2[:, :1]
    hash_RV ^= (hash_RV >> 16) & 0xFFFF
    hash_RV *= 0x7FEB352D
    hash_RV ^= (hash_RV >> 15) & 0x1FFFF
    hash_RV ^= key_R2[:, 1:]
    hash_RV *= _signed(0x846CA68B)
    hash_RV ^= (hash_RV >> 16) & 0xFFFF
    return noise(hash_RV)


def noise(hash_RV: Tensor) -> Tensor:
    """Gumbel noise from random int32s."""
    # Uniform in (0, 1). What wins has a uniform close to 0, where a float is finest: hence log1p(-u), not log(u).
    # The clamp keeps the other end from rounding to 1, whose noise would be -inf.
    uniform_RV = ((hash_RV & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform_RV.clamp_(max=1.0 - 2.0**-24)))


def _row_key(seed: int, index: int) -> int:
    return _mix(_mix(seed) + index)


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's finalizer: neighbouring seeds and indices get unrelated keys."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The low 32 bits as the signed number that an int32 tensor holds."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x

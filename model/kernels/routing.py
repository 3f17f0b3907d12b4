"""Which experts a token goes to, and where each expert's pairs lie, without asking the host.

S: tokens.  D: model width.  E: experts.  K: experts per token.  P: token-expert pairs, S * K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUTED_ROWS = 256  # up to which a program for each token takes less than a product, a cast and the choosing do
PRODUCTS = 1 << 14  # that a program has in its registers: of all experts with as many columns as that gives
TOKENS = 16  # that one program chooses for
ONE_PROGRAM = 1 << 14  # pairs times experts that one program sorts; more are sorted by torch


def route_rows(x_SD: Tensor, router_ED: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's logits, (S, E), float32 as they are in x's precision, and what choose_experts makes of them.

    A token's do not depend on the tokens beside it: it goes to the same experts alone, in a batch and in a graph.
    """
    (S, D), E = x_SD.shape, len(router_ED)
    assert x_SD.is_contiguous()
    assert router_ED.is_contiguous()
    logits_SE = torch.empty(S, E, dtype=torch.float32, device=x_SD.device)
    expert_SK = torch.empty(S, experts_per_token, dtype=torch.int64, device=x_SD.device)
    weight_SK = torch.empty(S, experts_per_token, dtype=torch.float32, device=x_SD.device)
    experts = triton.next_power_of_2(E)
    if S:
        _route[(S,)](
            x_SD, router_ED, logits_SE, expert_SK, weight_SK, D, E, K=experts_per_token,
            PLACES=triton.next_power_of_2(experts_per_token), EXPERTS=experts,
            COLUMNS=min(PRODUCTS // experts, triton.next_power_of_2(D)), num_warps=8,
        )  # fmt: skip
    return logits_SE, expert_SK, weight_SK


def choose_experts(logits_SE: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    """Each token's likeliest experts, best first, and the softmax over them: int64 and float32, (S, K)."""
    S, E = logits_SE.shape
    assert logits_SE.is_contiguous()
    expert_SK = torch.empty(S, experts_per_token, dtype=torch.int64, device=logits_SE.device)
    weight_SK = torch.empty(S, experts_per_token, dtype=torch.float32, device=logits_SE.device)
    if S:
        _choose[(triton.cdiv(S, TOKENS),)](
            logits_SE, expert_SK, weight_SK, S, E, K=experts_per_token, TOKENS=TOKENS,
            PLACES=triton.next_power_of_2(experts_per_token), EXPERTS=triton.next_power_of_2(E),
        )  # fmt: skip
    return expert_SK, weight_SK


def sort_pairs(
    expert_SK: Tensor, num_experts: int, counts_E: Tensor | None = None, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The stable order of all pairs by expert, and where each expert's pairs begin in it, and the last one's end.

    expert_SK   [[2 0] [0 1]]  ->  pairs 0..3 have experts 2 0 0 1  ->  order [1 2 3 0], first [0 2 3 4]

    How many pairs each expert has is added to counts_E. Where `tokens`, one number on the device, says that only so
    many tokens are there, the others' pairs come last, after the end, and have no expert.
    """
    S, K = expert_SK.shape
    P = S * K
    pairs, experts = triton.next_power_of_2(max(P, 1)), triton.next_power_of_2(num_experts)
    if pairs * experts > ONE_PROGRAM:
        return _sort_by_torch(expert_SK, num_experts, counts_E, tokens)
    order_P = torch.empty(P, dtype=torch.int32, device=expert_SK.device)
    first = torch.empty(num_experts + 1, dtype=torch.int32, device=expert_SK.device)
    _sort[(1,)](
        expert_SK, order_P, first, counts_E, tokens, P, num_experts, K=K, PAIRS=pairs, EXPERTS=experts
    )  # fmt: skip
    return order_P, first


def _sort_by_torch(
    expert_SK: Tensor, num_experts: int, counts_E: Tensor | None, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if tokens is not None:
        token_S1 = torch.arange(len(expert_SK), device=expert_SK.device)[:, None]
        expert_SK = expert_SK.where(token_S1 < tokens, num_experts)
    expert_P, order_P = torch.sort(expert_SK.flatten(), stable=True)
    borders = torch.arange(num_experts + 1, device=expert_SK.device)
    first = torch.searchsorted(expert_P, borders, out_int32=True)
    if counts_E is not None:
        counts_E += first.diff()
    return order_P.int(), first


@triton.jit
def _route(
    x_ptr: tl.tensor,
    router_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    D: int,
    E: int,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    products = tl.zeros((EXPERTS, COLUMNS), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(x_ptr + row.to(tl.int64) * D + column, mask=column < D, other=0.0)
        router = tl.load(
            router_ptr + expert[:, None] * D + column, mask=(expert < E)[:, None] & (column < D), other=0.0
        )
        products += x.to(tl.float32) * router.to(tl.float32)
    # Rounded as a product in x's precision is.
    logits = tl.sum(products, axis=1).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(logits_ptr + row * E + expert, logits, mask=expert < E)
    token = tl.full((1, 1), 0, tl.int32) + row
    _keep_best(logits[None, :], token, row + 1, E, expert_ptr, weight_ptr, K, 1, PLACES, EXPERTS)


# Whatever the number of rows, one kernel: a server meets every number.
@triton.jit(do_not_specialize=["S"])
def _choose(
    logits_ptr: tl.tensor,
    expert_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    S: int,
    E: int,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    logits = tl.load(logits_ptr + token * E + expert, mask=(token < S) & (expert < E), other=0.0)
    _keep_best(logits, token, S, E, expert_ptr, weight_ptr, K, TOKENS, PLACES, EXPERTS)


@triton.jit
def _keep_best(
    logits: tl.tensor,
    token: tl.tensor,
    S: int,
    E: int,
    expert_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    expert = tl.arange(0, EXPERTS)[None, :]
    place = tl.arange(0, PLACES)[None, :]
    logits = tl.where(expert < E, logits, -float("inf"))
    chosen = tl.zeros((TOKENS, PLACES), tl.int32)
    best = tl.full((TOKENS, PLACES), -float("inf"), tl.float32)
    for k in tl.static_range(K):
        highest = tl.max(logits, axis=1)[:, None]
        # Logits that are no numbers must not name an expert that is not there.
        lowest_id = tl.minimum(tl.min(tl.where(logits == highest, expert, EXPERTS), axis=1), E - 1)[:, None]
        chosen = tl.where(place == k, lowest_id, chosen)
        best = tl.where(place == k, highest, best)
        logits = tl.where(expert == lowest_id, -float("inf"), logits)
    weight = tl.exp(best - tl.max(best, axis=1)[:, None])
    weight = weight / tl.sum(weight, axis=1)[:, None]
    inside = (token < S) & (place < K)
    tl.store(expert_ptr + token * K + place, chosen.to(tl.int64), mask=inside)
    tl.store(weight_ptr + token * K + place, weight, mask=inside)


# Counts are a row of a table: one kernel for all rows, wherever they begin.
@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["counts_ptr", "tokens_ptr"])
def _sort(
    expert_ptr: tl.tensor,
    order_ptr: tl.tensor,
    first_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    P: int,
    E: int,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
) -> None:
    pair = tl.arange(0, PAIRS)
    expert = tl.arange(0, EXPERTS)[None, :]
    there = P
    if tokens_ptr is not None:
        there = tl.load(tokens_ptr).to(tl.int32) * K
    own = tl.load(expert_ptr + pair, mask=pair < there, other=-1).to(tl.int32)[:, None]
    mine = (own == expert).to(tl.int32)  # one 1 in every pair's row
    up_to_here = tl.cumsum(mine, axis=0)
    count = tl.sum(mine, axis=0)[None, :]
    begin = tl.cumsum(count, axis=1) - count
    position = tl.sum(mine * (begin + up_to_here - 1), axis=1)
    tl.store(order_ptr + tl.where(pair < there, position, pair), pair, mask=pair < P)
    tl.store(first_ptr + expert, begin, mask=expert < E)
    tl.store(first_ptr + E, there)
    if counts_ptr is not None:
        counted = tl.load(counts_ptr + expert, mask=expert < E, other=0)
        tl.store(counts_ptr + expert, counted + count, mask=expert < E)

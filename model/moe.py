"""The router and the experts of one block. Which rank computes which row is the exchange's business.

S: tokens of this rank's share.  N: rows that arrived for this rank's slots.  D: model width.  E: experts.
K: experts per token.  F: ffn width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from model.weights import ExpertWeights


@dataclass(frozen=True, slots=True)
class Routing:
    """What a block's router said of each token: scores of all experts, in float32, and the chosen ones, best first."""

    logits_SE: Tensor
    expert_SK: Tensor
    weight_SK: Tensor  # float32


def route(x_SD: Tensor, router_ED: Tensor, experts_per_token: int) -> Routing:
    """Each token's K experts and their weights.

    A softmax over the chosen logits is the softmax over all of them, renormalised.
    """
    logits_SE = functional.linear(x_SD, router_ED).float()
    chosen_SK, expert_SK = torch.topk(logits_SE, experts_per_token, dim=-1)
    return Routing(logits_SE, expert_SK, torch.softmax(chosen_SK, dim=-1))


def load_balancing_loss(routings: Sequence[Routing]) -> Tensor:
    """How far from even the experts are used, over all blocks together: K where each takes the same share.

    The number of experts times the sum, over experts, of the share of tokens that chose it and its mean probability.
    """
    logits_SE = torch.cat([routing.logits_SE for routing in routings])
    expert_SK = torch.cat([routing.expert_SK for routing in routings])
    tokens, experts = logits_SE.shape
    share_E = torch.bincount(expert_SK.flatten(), minlength=experts) / tokens
    return experts * (share_E * logits_SE.softmax(-1).mean(0)).sum()


def run_experts(x_ND: Tensor, rows: Sequence[int], experts: Sequence[ExpertWeights]) -> Tensor:
    """Each slot's expert on its own rows; rows lie slot after slot."""
    slots = zip(torch.split(x_ND, list(rows)), experts, strict=True)
    parts = [expert.down(swiglu(expert.gate_up(x_nD))) for x_nD, expert in slots if len(x_nD)]
    match parts:
        case []:
            return x_ND
        case [only]:
            return only
        case _:
            return torch.cat(parts)


def swiglu(gate_up_nF: Tensor) -> Tensor:
    """silu(gate) * up of a matrix that holds both side by side and is used for nothing else."""
    gate_nF, up_nF = gate_up_nF.chunk(2, dim=-1)
    return functional.silu(gate_nF, inplace=True).mul_(up_nF)


def reference_experts(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor, experts: Sequence[ExpertWeights]) -> Tensor:
    """What dispatch, run_experts and combine must add up to: the definition, one expert after another."""
    y_SD = torch.zeros_like(x_SD, dtype=torch.float32)
    for number, expert in enumerate(experts):
        token, k = torch.where(expert_SK == number)
        gate_FD, up_FD = expert.gate_up.weight_OI.chunk(2)
        hidden_nF = functional.silu(x_SD[token] @ gate_FD.T) * (x_SD[token] @ up_FD.T)
        y_SD.index_add_(0, token, (hidden_nF @ expert.down.weight_OI.T) * weight_SK[token, k, None])
    return y_SD.to(x_SD.dtype)

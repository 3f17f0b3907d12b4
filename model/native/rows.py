"""What is done to each row alone, by the compiled kernels: tensors in, tensors out.

S: rows.  D: model width.  E: experts.  K: experts per token.  N: rows of all experts, S * K.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from model.native.library import kernels, lies_as

MULTIPLE = 32  # of which the width has to be one


def _shape(x_SD: Tensor) -> tuple[int, int]:
    """Of rows that the kernels take."""
    S, D = x_SD.shape
    assert D % MULTIPLE == 0
    assert lies_as(x_SD, S, D)
    return S, D


def norm(x_SD: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    x_SD = x_SD.contiguous()
    S, D = _shape(x_SD)
    assert lies_as(weight_D, D)
    out_SD = torch.empty_like(x_SD)
    kernels().norm(x_SD.data_ptr(), S, D, weight_D.data_ptr(), epsilon, out_SD.data_ptr(), torch.get_num_threads())
    return out_SD


def add_norm(x_SD: Tensor, delta_SD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    x_SD, delta_SD = x_SD.contiguous(), delta_SD.to(x_SD.dtype).contiguous()
    S, D = _shape(x_SD)
    assert lies_as(delta_SD, S, D)
    assert lies_as(weight_D, D)
    sum_SD, out_SD = torch.empty_like(x_SD), torch.empty_like(x_SD)
    kernels().add_norm(
        x_SD.data_ptr(),
        delta_SD.data_ptr(),
        S,
        D,
        weight_D.data_ptr(),
        epsilon,
        sum_SD.data_ptr(),
        out_SD.data_ptr(),
        torch.get_num_threads(),
    )
    return sum_SD, out_SD


def route(x_SD: Tensor, router_ED: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all experts in float32, the best experts, their weights in float32."""
    x_SD, router_ED = x_SD.contiguous(), router_ED.contiguous()
    S, D = _shape(x_SD)
    assert lies_as(router_ED, len(router_ED), D)
    assert experts_per_token <= len(router_ED)
    logits_SE = torch.empty(S, len(router_ED))
    expert_SK = torch.empty(S, experts_per_token, dtype=torch.int64)
    weight_SK = torch.empty(S, experts_per_token)
    kernels().route(
        x_SD.data_ptr(),
        S,
        D,
        router_ED.data_ptr(),
        len(router_ED),
        experts_per_token,
        logits_SE.data_ptr(),
        expert_SK.data_ptr(),
        weight_SK.data_ptr(),
        torch.get_num_threads(),
    )
    return logits_SE, expert_SK, weight_SK


def dispatch(x_SD: Tensor, expert_SK: Tensor, num_experts: int) -> tuple[Tensor, list[int], Tensor]:
    """Rows in expert order, how many each expert has, and where each pair's row lies. Every expert is one of them."""
    x_SD, expert_SK = x_SD.contiguous(), expert_SK.contiguous()
    S, D = _shape(x_SD)
    K = expert_SK.shape[1]
    assert lies_as(expert_SK, S, K, dtype=torch.int64)
    rows, first_row = (ctypes.c_int64 * num_experts)(), (ctypes.c_int64 * num_experts)()
    place_SK = torch.empty_like(expert_SK)
    x_ND = x_SD.new_empty(S * K, D)
    kernels().dispatch(
        x_SD.data_ptr(),
        expert_SK.data_ptr(),
        S,
        K,
        D,
        num_experts,
        rows,
        first_row,
        place_SK.data_ptr(),
        x_ND.data_ptr(),
        torch.get_num_threads(),
    )
    return x_ND, list(rows), place_SK


def combine(y_ND: Tensor, place_SK: Tensor, weight_SK: Tensor) -> Tensor:
    """Each token's results, weighted and added in routing order, (S, D)."""
    y_ND, weight_SK = y_ND.contiguous(), weight_SK.contiguous()
    S, K = weight_SK.shape
    N, D = _shape(y_ND)
    assert N == S * K
    assert lies_as(weight_SK, S, K, dtype=torch.float32)
    assert lies_as(place_SK, S, K, dtype=torch.int64)
    out_SD = y_ND.new_empty(S, D)
    kernels().combine(
        y_ND.data_ptr(),
        place_SK.data_ptr(),
        weight_SK.data_ptr(),
        S,
        K,
        D,
        out_SD.data_ptr(),
        torch.get_num_threads(),
    )
    return out_SD

"""The grouped kernels against the definition of experts, in every form of weights."""

from __future__ import annotations

import os
import random
from typing import get_args

import pytest
import torch
from torch import Tensor

from model.exchange import sort_by_expert
from model.layers import PlainLinear
from model.modes import Mode
from model.moe import reference_experts
from model.quantization import quantize
from model.weights import ExpertWeights

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels import grouped_experts as kernel
from model.kernels.grouped_experts import grouped_experts
from model.kernels.weight_tiles import Tiling, WeightStack


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small matrices take several tiles each way."""
    tiling = Tiling(rows=16, columns=32, depth=32, warps=4, stages=2)
    monkeypatch.setattr(kernel, "tiling_for", lambda rows, itemsize: tiling)


def random_stack(count: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return (torch.randn(count, rows, columns, generator=generator) / columns**0.5).to(dtype)


def sorted_pairs(expert_SK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    order_P, rows = sort_by_expert(expert_SK, experts)
    return order_P.int(), torch.tensor([0, *rows]).cumsum(0).int()


def chosen(tokens: int, experts: int, per_token: int) -> tuple[Tensor, Tensor]:
    rng, generator = random.Random(tokens), torch.Generator().manual_seed(tokens)
    chosen = [rng.sample(range(experts), per_token) for _ in range(tokens)]
    expert_SK = torch.tensor(chosen, dtype=torch.int64).view(tokens, per_token)
    return expert_SK, torch.rand(tokens, per_token, generator=generator)


@pytest.mark.parametrize(
    ("tokens", "experts", "per_token", "width", "ffn", "dtype"),
    [
        (1, 8, 2, 24, 40, torch.float32),
        (41, 3, 2, 40, 17, torch.float32),
        (7, 5, 3, 10, 16, torch.float16),
        (20, 1, 1, 32, 16, torch.float32),
        (0, 4, 2, 8, 8, torch.float32),
    ],
)
def test_they_are_the_experts(
    tokens: int, experts: int, per_token: int, width: int, ffn: int, dtype: torch.dtype
) -> None:
    gate_up, down = random_stack(experts, 2 * ffn, width, dtype), random_stack(experts, width, ffn, dtype)
    x_SD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    expert_SK, weight_SK = chosen(tokens, experts, per_token)
    found = grouped_experts(
        x_SD, *sorted_pairs(expert_SK, experts), weight_SK, WeightStack.plain(gate_up), WeightStack.plain(down)
    )
    linears = [ExpertWeights(PlainLinear(g), PlainLinear(d)) for g, d in zip(gate_up, down, strict=True)]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    expected_SD = reference_experts(x_SD, expert_SK, weight_SK, linears)
    torch.testing.assert_close(found.sum(1).to(dtype), expected_SD, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_pairs_of_other_ranks_give_zeros(share: float) -> None:
    """Slots 1 and 2 of four are here, whatever share was likely to be."""
    gate_up, down = random_stack(4, 32, 24, torch.float32), random_stack(4, 24, 16, torch.float32)
    x_SD = torch.randn(9, 24, generator=torch.Generator().manual_seed(0))
    expert_SK, weight_SK = chosen(9, 4, 2)
    order_P, first = sorted_pairs(expert_SK, 4)
    whole = grouped_experts(x_SD, order_P, first, weight_SK, WeightStack.plain(gate_up), WeightStack.plain(down))
    stacks = WeightStack.plain(gate_up[1:3]), WeightStack.plain(down[1:3])
    part = grouped_experts(x_SD, order_P, first[1:4], weight_SK, *stacks, share)
    here_SK1 = ((expert_SK == 1) | (expert_SK == 2))[..., None]
    torch.testing.assert_close(part, whole * here_SK1)


EVERY = [(mode, *case) for mode in get_args(Mode) for case in ((1, torch.float16), (20, torch.float32))]
IN_TURN = [EVERY[i] for i in (0, 3, 4, 7)]  # every mode, with one of the two


@pytest.mark.parametrize(("mode", "tokens", "dtype"), EVERY if os.environ.get("MIXTRAL_TEST_ALL") else IN_TURN)
def test_quantised_weights_are_what_they_stand_for(mode: Mode, tokens: int, dtype: torch.dtype) -> None:
    experts, width, ffn = 2, 128, 64
    plain = random_stack(experts, 2 * ffn, width, torch.float32), random_stack(experts, width, ffn, torch.float32)
    weights = [[quantize(weight_OI, mode) for weight_OI in stack] for stack in plain]
    stacks = [
        WeightStack.quantized(mode, torch.stack([w.packed_OP for w in stack]), torch.stack([w.scale_OG for w in stack]))
        for stack in weights
    ]
    x_SD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    expert_SK, weight_SK = chosen(tokens, experts, 2)
    found = grouped_experts(x_SD, *sorted_pairs(expert_SK, experts), weight_SK, *stacks)
    linears = [
        ExpertWeights(PlainLinear(g.dequantize(dtype)), PlainLinear(d.dequantize(dtype)))
        for g, d in zip(*weights, strict=True)
    ]
    tolerance = 1e-4 if dtype == torch.float32 else 6e-3
    expected_SD = reference_experts(x_SD, expert_SK, weight_SK, linears)
    torch.testing.assert_close(found.sum(1).to(dtype), expected_SD, rtol=tolerance, atol=tolerance)

"""The experts' fast path against their definition, and the router against softmax over all experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from model.exchange import OneRank
from model.layers import Linear, make_linear
from model.moe import load_balancing_loss, reference_experts, route, run_experts, swiglu
from model.weights import ExpertWeights

D, F = 24, 40


def make_experts(count: int, dtype: torch.dtype = torch.float32) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(count)

    def linear(rows: int, columns: int) -> Linear:
        return make_linear((torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype))

    return [ExpertWeights(linear(2 * F, D), linear(D, F)) for _ in range(count)]


def through_exchange(x_SD: Tensor, expert_SK: Tensor, weight_SK: Tensor, experts: list[ExpertWeights]) -> Tensor:
    exchange = OneRank(len(experts))
    dispatched = exchange.dispatch(0, x_SD, expert_SK, weight_SK)
    return exchange.combine(dispatched, run_experts(dispatched.x_ND, dispatched.rows, experts)).to(x_SD.dtype)


@pytest.mark.parametrize(
    ("tokens", "per_token", "count"), [(1, 2, 8), (2, 1, 3), (33, 2, 8), (7, 4, 16), (5, 3, 3), (0, 2, 4)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_dispatch_experts_combine_is_the_definition(
    tokens: int, per_token: int, count: int, dtype: torch.dtype, tolerance: float
) -> None:
    experts = make_experts(count, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x_SD = torch.randn(tokens, D, generator=generator).to(dtype)
    router_ED = torch.randn(count, D, generator=generator).to(dtype)
    routing = route(x_SD, router_ED, per_token)
    found = through_exchange(x_SD, routing.expert_SK, routing.weight_SK, experts)
    expected = reference_experts(x_SD, routing.expert_SK, routing.weight_SK, experts)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_all_tokens_may_choose_one_expert() -> None:
    experts = make_experts(4)
    x_SD = torch.randn(9, D, generator=torch.Generator().manual_seed(1))
    expert_SK, weight_SK = torch.full((9, 1), 2), torch.ones(9, 1)
    expected = reference_experts(x_SD, expert_SK, weight_SK, experts)
    torch.testing.assert_close(through_exchange(x_SD, expert_SK, weight_SK, experts), expected)


def test_a_rank_without_rows_returns_none() -> None:
    assert run_experts(torch.empty(0, D), [0, 0], make_experts(2)).shape == (0, D)


def test_what_experts_compute_for_a_row_does_not_depend_on_the_others() -> None:
    experts = make_experts(2)
    x_ND = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    whole = run_experts(x_ND, [4, 2], experts)
    torch.testing.assert_close(run_experts(x_ND[3:5], [1, 1], experts), whole[3:5])


def test_rows_must_cover_the_slots() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_experts(torch.zeros(3, D), [1, 2], make_experts(3))


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_weights_are_the_softmax_over_all_experts_renormalised(per_token: int) -> None:
    generator = torch.Generator().manual_seed(per_token)
    x_SD, router_ED = torch.randn(50, D, generator=generator), torch.randn(8, D, generator=generator)
    routing = route(x_SD, router_ED, per_token)
    probability_SE = torch.softmax(x_SD @ router_ED.T, dim=-1)
    value_SK, expected_SK = torch.topk(probability_SE, per_token, dim=-1)
    assert torch.equal(routing.expert_SK, expected_SK)
    torch.testing.assert_close(routing.weight_SK, value_SK / value_SK.sum(-1, keepdim=True))


def test_routing_stays_float32_in_a_half_precision_model() -> None:
    torch.manual_seed(0)
    routing = route(torch.randn(5, D).bfloat16(), torch.randn(8, D).bfloat16(), 2)
    assert routing.logits_SE.dtype == routing.weight_SK.dtype == torch.float32


@pytest.mark.parametrize("rows", [[50], [7, 1, 30]])
@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_the_load_balancing_loss_is_that_of_transformers(rows: list[int], per_token: int) -> None:
    generator = torch.Generator().manual_seed(per_token)
    router_ED = torch.randn(6, D, generator=generator)
    routings = [route(torch.randn(count, D, generator=generator), router_ED, per_token) for count in rows]
    expected = load_balancing_loss_func(tuple(routing.logits_SE for routing in routings), 6, per_token)
    torch.testing.assert_close(load_balancing_loss(routings), expected)


def test_the_load_balancing_loss_of_even_use_is_the_number_of_experts_per_token() -> None:
    logits_SE = torch.eye(8) * 1e-3  # every token another best expert, all but equally likely
    assert load_balancing_loss([route(logits_SE, torch.eye(8), 1)]).item() == pytest.approx(1.0)


def test_swiglu() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(3, F), torch.randn(3, F)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), dim=1)), gate * torch.sigmoid(gate) * up)

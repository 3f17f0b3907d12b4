"""Choosing and sorting on the device against torch's top-k and stable sort."""

from __future__ import annotations

import random

import pytest
import torch

from model.exchange import sort_by_expert
from model.moe import route

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.kernels import routing
from model.kernels.routing import choose_experts, route_rows, sort_pairs

SHAPES = [(1, 8, 2), (33, 8, 2), (7, 3, 3), (16, 5, 1), (5, 17, 4), (2, 1, 1)]


@pytest.mark.parametrize(("tokens", "experts", "per_token"), SHAPES)
def test_the_likeliest_experts_and_their_weights(tokens: int, experts: int, per_token: int) -> None:
    logits_SE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    expected = route(logits_SE, torch.eye(experts), per_token)
    expert_SK, weight_SK = choose_experts(logits_SE, per_token)
    assert torch.equal(expert_SK, expected.expert_SK)
    torch.testing.assert_close(weight_SK, expected.weight_SK)


@pytest.mark.parametrize(("tokens", "experts", "per_token"), SHAPES)
@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_multiplied_and_their_experts_chosen(
    tokens: int, experts: int, per_token: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "PRODUCTS", 32 * (1 << (experts - 1).bit_length()))  # two parts of 48
    generator = torch.Generator().manual_seed(tokens)
    x_SD, router_ED = (torch.randn(rows, width, generator=generator).to(dtype) for rows in (tokens, experts))
    logits_SE, expert_SK, weight_SK = route_rows(x_SD, router_ED, per_token)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(logits_SE, x_SD.float() @ router_ED.float().T, rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(logits_SE.to(dtype).float(), logits_SE), "in the rows' precision"
    chosen_SK, chosen_weight_SK = choose_experts(logits_SE, per_token)
    assert torch.equal(expert_SK, chosen_SK)
    torch.testing.assert_close(weight_SK, chosen_weight_SK)


def test_however_many_experts_there_are_a_program_holds_what_it_can() -> None:
    """4,096 are as many as a model may have; of a row, as many columns are taken at once as there is room for."""
    x_SD, router_ED = torch.randn(2, 512), torch.randn(4096, 512)
    logits_SE, expert_SK, _ = route_rows(x_SD, router_ED, 2)
    torch.testing.assert_close(logits_SE, x_SD @ router_ED.T, rtol=1e-5, atol=1e-3)
    assert torch.equal(expert_SK, logits_SE.topk(2).indices)


def test_no_rows_have_no_experts() -> None:
    assert [len(x) for x in route_rows(torch.empty(0, 8), torch.randn(4, 8), 2)] == [0, 0, 0]


def test_equal_logits_choose_different_experts_the_lowest_first() -> None:
    expert_SK, weight_SK = choose_experts(torch.zeros(2, 8), 3)
    assert expert_SK.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(weight_SK, torch.full((2, 3), 1 / 3))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    expert_SK, _ = choose_experts(torch.full((3, 5), torch.nan), 2)
    assert ((expert_SK >= 0) & (expert_SK < 5)).all()


@pytest.mark.parametrize("one_program", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "per_token"), SHAPES)
def test_the_order_is_stable_and_borders_are_right(
    tokens: int, experts: int, per_token: int, one_program: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_program:
        monkeypatch.setattr(routing, "ONE_PROGRAM", 0)
    rng = random.Random(tokens)
    expert_SK = torch.tensor([[rng.randrange(experts) for _ in range(per_token)] for _ in range(tokens)])
    counts_E = torch.arange(experts)
    order_P, first = sort_pairs(expert_SK, experts, counts_E)
    expected_P, rows = sort_by_expert(expert_SK, experts)
    assert torch.equal(order_P.long(), expected_P)
    assert first.diff().tolist() == rows
    assert first[0] == 0
    assert (counts_E - torch.arange(experts)).tolist() == rows
    assert {order_P.dtype, first.dtype} == {torch.int32}


@pytest.mark.parametrize("one_program", [True, False])
def test_tokens_that_are_not_there_go_to_no_expert(one_program: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not one_program:
        monkeypatch.setattr(routing, "ONE_PROGRAM", 0)
    expert_SK = torch.tensor([[1, 0], [2, 1], [0, 2], [0, 1]])
    counts_E = torch.zeros(3, dtype=torch.int64)
    order_P, first = sort_pairs(expert_SK, 3, counts_E, torch.tensor(2))
    assert order_P.tolist() == [1, 0, 3, 2, 4, 5, 6, 7]
    assert first.tolist() == [0, 1, 3, 4]
    assert counts_E.tolist() == [1, 2, 1]


def test_no_tokens() -> None:
    expert_SK, weight_SK = choose_experts(torch.empty(0, 4), 2)
    assert expert_SK.shape == weight_SK.shape == (0, 2)
    order_P, first = sort_pairs(expert_SK, 4)
    assert order_P.shape == (0,)
    assert first.tolist() == [0] * 5

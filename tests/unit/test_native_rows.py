"""Norm, router, dispatch and combine by the compiled kernels, beside torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.exchange import OneRank, SlotLoad
from model.layers import rms_norm
from model.moe import route
from model.native import library, rows
from model.native.backend import NativeOneRank

pytestmark = pytest.mark.skipif(
    not library.has_kernels(), reason="no C compiler at installation, or no AVX-512 with BF16 in this processor"
)
ROWS = [0, 1, 2, 9, 1030]  # the last are many enough for threads
ONE_STEP = {"rtol": 2**-7, "atol": 1e-6}  # of bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


@pytest.mark.parametrize("S", ROWS)
@pytest.mark.parametrize("D", [32, 224])
def test_the_norm_and_the_sum_before_it(S: int, D: int) -> None:
    x_SD, delta_SD, weight_D = random(S, D), random(S, D, seed=1), random(D)
    torch.testing.assert_close(rows.norm(x_SD, weight_D, 1e-5), rms_norm(x_SD, weight_D, 1e-5), **ONE_STEP)
    for delta in (delta_SD, delta_SD.float(), random(D, S, seed=1).T):
        sum_SD, out_SD = rows.add_norm(x_SD, delta, weight_D, 1e-5)
        assert torch.equal(sum_SD, x_SD + delta.bfloat16())
        torch.testing.assert_close(out_SD, rms_norm(sum_SD, weight_D, 1e-5), **ONE_STEP)


@pytest.mark.parametrize("S", ROWS)
@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 2), (8, 2), (60, 4)])
def test_the_router_chooses_as_torch_does(S: int, E: int, K: int) -> None:
    x_SD, router_ED = random(S, 64), random(E, 64, seed=1)
    logits_SE, expert_SK, weight_SK = rows.route(x_SD, router_ED, K)
    oracle = route(x_SD, router_ED, K)
    torch.testing.assert_close(logits_SE, oracle.logits_SE, rtol=2**-7, atol=1e-4)
    # Of equal scores either may be chosen, so what is compared are scores.
    torch.testing.assert_close(logits_SE.gather(1, expert_SK), torch.topk(logits_SE, K).values, rtol=0, atol=0)
    assert all(len(set(chosen)) == K for chosen in expert_SK.tolist())
    torch.testing.assert_close(weight_SK, torch.softmax(logits_SE.gather(1, expert_SK), -1))


def test_of_equal_scores_the_first_expert_wins() -> None:
    _, expert_SK, weight_SK = rows.route(random(2, 32), torch.zeros(5, 32, dtype=torch.bfloat16), 3)
    assert expert_SK.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weight_SK, torch.full((2, 3), 1 / 3))


def test_scores_that_are_no_numbers_choose_experts_that_exist() -> None:
    x_SD = torch.full((2, 32), float("nan"), dtype=torch.bfloat16)
    assert rows.route(x_SD, random(4, 32), 2)[1].tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("S", ROWS)
@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 2), (8, 2), (60, 4)])
def test_rows_go_to_their_experts_and_come_back_as_in_one_process(S: int, E: int, K: int) -> None:
    generator = torch.Generator().manual_seed(S)
    x_SD = random(S, 96)
    expert_SK = torch.rand(S, E, generator=generator).topk(K).indices
    weight_SK = torch.rand(S, K, generator=generator)
    ours, oracle = (NativeOneRank(E, loads) for loads in (SlotLoad(2, E), None)), OneRank(E, SlotLoad(2, E))
    expected = oracle.dispatch(1, x_SD, expert_SK, weight_SK)
    for exchange in ours:
        dispatched = exchange.dispatch(1, x_SD, expert_SK, weight_SK)
        assert torch.equal(dispatched.x_ND, expected.x_ND)
        assert dispatched.rows == expected.rows
        y_ND = random(S * K, 96, seed=3)
        combined_SD = exchange.combine(dispatched, y_ND)
        torch.testing.assert_close(combined_SD, oracle.combine(expected, y_ND).bfloat16(), **ONE_STEP)


def test_rows_are_counted() -> None:
    load = SlotLoad(1, 3)
    NativeOneRank(3, load).dispatch(0, random(2, 32), torch.tensor([[2, 0], [2, 1]]), torch.ones(2, 2))
    assert load.take() == ((1, 1, 2),)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rows.norm(random(2, 48), random(48), 1e-5),
        lambda: rows.norm(random(2, 64), random(64).float(), 1e-5),
        lambda: rows.norm(random(2, 64).float(), random(64), 1e-5),
        lambda: rows.add_norm(random(2, 64), random(1, 64), random(64), 1e-5),
        lambda: rows.add_norm(random(2, 64), random(2, 64), random(32), 1e-5),
        lambda: rows.route(random(2, 64), random(4, 64).float(), 2),
        lambda: rows.route(random(2, 64), random(4, 32), 2),
        lambda: rows.route(random(2, 64), random(4, 64), 5),
        lambda: rows.dispatch(random(2, 64), torch.zeros(3, 2, dtype=torch.int64), 4),
        lambda: rows.dispatch(random(2, 64), torch.zeros(2, 2, dtype=torch.int32), 4),
        lambda: rows.combine(random(3, 64), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)),
        lambda: rows.combine(random(4, 64).float(), torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)),
        lambda: rows.combine(random(4, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(2, 2)),
    ],
)
def test_what_a_kernel_would_read_past_or_misread_never_reaches_it(call: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        call()

"""A block's experts on a device: every way gives what the definition does."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from model.exchange import Dispatched, OneRank
from model.layers import PlainLinear
from model.moe import reference_experts, route, run_experts
from model.quantization import quantize
from model.quantized_linear import QuantizedLinear
from model.weights import ExpertWeights

pytest.importorskip("triton", reason="kernels run in Triton's interpreter")

from model.device_exchange import Listed, OneDevice
from model.device_experts import (
    GROUPED_ROWS,
    DeviceExperts,
    GroupedProduct,
    ScaledProduct,
    fits_scaled_product,
    grouped_product_for,
    grouped_products,
    plain_product,
)
from model.expert_stack import stack_linears
from model.kernels.routing import sort_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
E, K, D, F = 4, 2, 48, 32


def random_experts(mode: str | None = None) -> list[ExpertWeights]:
    generator = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> Any:
        weight_OI = torch.randn(rows, columns, generator=generator) / columns**0.5
        return PlainLinear(weight_OI) if mode is None else QuantizedLinear(quantize(weight_OI, "fp8"), torch.float32)

    return [ExpertWeights(linear(2 * F, D), linear(D, F)) for _ in range(E)]


def rows_of(tokens: int) -> tuple[Tensor, Listed, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x_SD = torch.randn(tokens, D, generator=generator)
    routing = route(x_SD, torch.randn(E, D, generator=generator), K)
    listed = OneDevice(OneRank(E), sort_pairs).dispatch(0, x_SD, routing.expert_SK, routing.weight_SK)
    return x_SD, listed, routing.expert_SK, routing.weight_SK


@pytest.mark.parametrize("tokens", [1, 9])
def test_rows_where_they_lie(tokens: int) -> None:
    experts = random_experts()
    x_SD, listed, *routing = rows_of(tokens)
    expected_SD = reference_experts(x_SD, *routing, experts)
    found_SKD = DeviceExperts(experts, torch.float32)(listed)
    torch.testing.assert_close(found_SKD.sum(1), expected_SD, rtol=1e-5, atol=1e-5)


def test_rows_that_other_ranks_sent_are_computed_too() -> None:
    rng = random.Random(0)
    experts, rows = random_experts(), [rng.randrange(5) for _ in range(E)]
    x_ND = torch.randn(sum(rows), D, generator=torch.Generator().manual_seed(0))
    found_ND = DeviceExperts(experts, torch.float32)(Dispatched(x_ND, rows, torch.empty(0), torch.empty(0)))
    torch.testing.assert_close(found_ND, run_experts(x_ND, rows, experts), rtol=1e-5, atol=1e-5)


def test_grouped_products_give_the_same() -> None:
    experts = random_experts()
    _, listed, *_ = rows_of(9)
    gate_up, down = products(experts, lambda stack: lambda x, ends: plain_product(stack.packed_EOP.mT, x, ends))
    expected_SKD = DeviceExperts(experts, torch.float32)(listed)
    torch.testing.assert_close(grouped_products(listed, gate_up, down), expected_SKD, rtol=1e-5, atol=1e-5)


def products(experts: list[ExpertWeights], make: Any) -> tuple[GroupedProduct, GroupedProduct]:
    return make(stack_linears([x.gate_up for x in experts])), make(stack_linears([x.down for x in experts]))


def scaled_grouped_mm(
    code_PI: Tensor, code_LIO: Tensor, scale_P: Tensor, scale_LO: Tensor, *, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """torch's has no form for CPUs; for tensors without numbers it has one that refuses what the device would."""
    virtual = [x.to("meta") for x in (code_PI, code_LIO, scale_P, scale_LO)]
    torch.ops.aten._scaled_grouped_mm(*virtual, offs=offs.to("meta"), out_dtype=out_dtype)
    assert (code_LIO.shape[1] % 16, code_LIO.shape[2] % 16) == (0, 0)
    slot_P = torch.searchsorted(offs, torch.arange(len(code_PI), dtype=torch.int32), right=True)
    y_PO = torch.bmm(code_PI.float()[:, None], code_LIO.float()[slot_P])[:, 0]
    return (y_PO * scale_P[:, None] * scale_LO[slot_P]).to(out_dtype)


def test_fp8_is_multiplied_by_rows_rounded_to_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    experts = random_experts("fp8")
    x_SD, listed, *routing = rows_of(40)
    found_SD = grouped_products(listed, *products(experts, ScaledProduct)).sum(1)

    def rounded(x_TI: Tensor) -> Tensor:
        return quantize(x_TI, "fp8").dequantize(torch.float32)

    expected_SD = torch.zeros_like(x_SD)
    for number, expert in enumerate(experts):
        token, k = torch.where(routing[0] == number)
        gate, up = functional.linear(rounded(x_SD[token]), expert.gate_up.weight_OI).chunk(2, dim=-1)
        y_nD = functional.linear(rounded(functional.silu(gate) * up), expert.down.weight_OI)
        expected_SD.index_add_(0, token, y_nD * routing[1][token, k, None])
    # Scales here and there are rounded differently, and so is a number now and then: by a sixteenth, of 48.
    assert (found_SD - expected_SD).square().mean() < 1e-3 * expected_SD.square().mean()
    plainly_SD = reference_experts(x_SD, *routing, experts)
    assert (found_SD - plainly_SD).square().mean() < 1e-2 * plainly_SD.square().mean()


def test_scaled_products_want_features_in_sixteens() -> None:
    def fits(rows: int, columns: int) -> bool:
        weight = quantize(torch.randn(rows, columns), "fp8")
        return fits_scaled_product(stack_linears([QuantizedLinear(weight, torch.float32)]))

    assert fits(32, 48)
    assert not fits(40, 48)
    assert not fits(32, 40)


class OnDevice:
    """A stack that lies there, as far as it is asked."""

    def __init__(self, rows: int, columns: int) -> None:
        self.mode, self.in_features, self.out_features = "plain", columns, rows
        self.packed_EOP = SimpleNamespace(
            device=torch.device("cuda"), element_size=lambda: 2, transpose=lambda a, b: torch.empty(1, columns, rows)
        )


@pytest.mark.parametrize(
    ("capability", "rows", "columns", "taken"),
    [
        ((8, 0), 32, 48, False),
        ((9, 0), 32, 48, True),
        ((10, 0), 32, 48, True),
        ((12, 0), 32, 48, False),
        ((9, 0), 30, 48, False),
        ((9, 0), 32, 4778, False),
    ],
)
def test_torchs_product_is_taken_where_it_neither_refuses_nor_waits(
    capability: tuple[int, int], rows: int, columns: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = grouped_product_for(OnDevice(rows, columns), torch.bfloat16)  # type: ignore[arg-type]
    assert (found is not None) == taken


def test_a_cpu_has_our_kernels_alone() -> None:
    stack = stack_linears([expert.gate_up for expert in random_experts()])
    assert grouped_product_for(stack, torch.bfloat16) is None


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_many_rows_go_to_grouped_products_where_every_pair_is_here(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "model.device_experts.grouped_product_for",
        lambda stack, dtype: lambda x, ends: plain_product(stack.packed_EOP.mT, x, ends),
    )
    asked: list[int] = []

    def noting(listed: Listed, *products: GroupedProduct) -> Tensor:
        asked.append(len(listed.order_N))
        return grouped_products(listed, *products)

    monkeypatch.setattr("model.device_experts.grouped_products", noting)
    experts = random_experts()
    computed = DeviceExperts(experts, torch.float32)
    enough = GROUPED_ROWS * E
    for pairs in (enough - K, enough):
        x_SD, listed, *routing = rows_of(pairs // K)
        found_SKD = computed(replace(listed, share=share))
        torch.testing.assert_close(found_SKD.sum(1), reference_experts(x_SD, *routing, experts), rtol=1e-4, atol=1e-4)
    assert asked == ([enough] if share == 1 else [])

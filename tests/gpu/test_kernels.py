"""Kernels as compiled, at the sizes of Mixtral 8x7B, against torch in float32. Odd shapes: tests/unit/test_kernels_*.

Weights of experts are kept to two gigabytes; everything else is full size.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from model import moe
from model.exchange import OneRank, sort_by_expert
from model.layers import PlainLinear, rms_norm
from model.modes import Mode
from model.moe import reference_experts, route
from model.quantization import FP8_MAX, quantize
from model.rotary import rotate
from model.varlen_attention import Chunks, VarlenAttention, masked_attention, varlen_attention_for
from model.weights import ExpertWeights

pytest.importorskip("triton", reason="kernels are compiled by Triton")

from model.device_exchange import OneDevice
from model.device_experts import grouped_product_for, grouped_products
from model.kernels.grouped_experts import grouped_experts
from model.kernels.norm import add_norm
from model.kernels.paged_decode import PageTable, paged_decode, splits_for
from model.kernels.quantized_product import quantized_product
from model.kernels.rope_write import rope_write
from model.kernels.round_rows import round_rows
from model.kernels.routing import choose_experts, route_rows, sort_pairs
from model.kernels.swiglu import swiglu
from model.kernels.weight_tiles import WeightStack

D, F, E, K, H, G, C = 4096, 3584, 8, 2, 32, 8, 128
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BATCHES = [1, 3, 16, 33, 256]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    error = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}[dtype]
    return {"rtol": error, "atol": error}


def random(device: torch.device, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", BATCHES)
def test_add_norm(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    x_SD, weight_D = random(device, dtype, rows, D), random(device, dtype, D)
    delta_SKD = random(device, torch.float32, rows, K, D)
    sum_SD, normed_SD = add_norm(x_SD, delta_SKD, weight_D, 1e-5)
    torch.testing.assert_close(sum_SD, x_SD + delta_SKD.sum(1).to(dtype), **tolerance(dtype))
    torch.testing.assert_close(normed_SD, rms_norm(sum_SD, weight_D, 1e-5), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", BATCHES)
def test_swiglu(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    gate_up = random(device, dtype, rows, 2 * F)
    expected = moe.swiglu(gate_up.float().clone()).to(dtype)
    torch.testing.assert_close(swiglu(gate_up), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", BATCHES)
def test_rope_write(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    heads_THC = random(device, dtype, rows, H + 2 * G, C)
    angle_T1P = random(device, torch.float32, rows, 1, C // 2)
    cos_T1C, sin_T1C = (torch.cat((x, x), -1).to(dtype) for x in (angle_T1P.cos(), angle_T1P.sin()))
    slot_T = torch.randperm(512, device=device)[:rows]
    key_NGC, value_NGC = torch.zeros(2, 512, G, C, device=device, dtype=dtype)
    query_THC = rope_write(heads_THC, (cos_T1C, sin_T1C), slot_T, (key_NGC, value_NGC))
    rotated_THC = rotate(heads_THC[:, : H + G].float(), cos_T1C.float(), sin_T1C.float()).to(dtype)
    torch.testing.assert_close(query_THC, rotated_THC[:, :H].contiguous(), **tolerance(dtype))
    torch.testing.assert_close(key_NGC[slot_T], rotated_THC[:, H:].contiguous(), **tolerance(dtype))
    assert torch.equal(value_NGC[slot_T], heads_THC[:, H + G :])


@pytest.mark.parametrize("rows", [*BATCHES, 4096])
def test_routing(device: torch.device, rows: int) -> None:
    logits_SE = random(device, torch.float32, rows, E)
    expected = route(logits_SE, torch.eye(E, device=device), K)
    expert_SK, weight_SK = choose_experts(logits_SE, K)
    assert torch.equal(expert_SK, expected.expert_SK)
    torch.testing.assert_close(weight_SK, expected.weight_SK)
    order_P, first = sort_pairs(expert_SK, E)
    expected_P, counts = sort_by_expert(expert_SK, E)
    assert torch.equal(order_P.long(), expected_P)
    assert first.diff().tolist() == counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", BATCHES)
def test_rows_are_routed_alike_in_every_batch(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    x_SD, router_ED = random(device, dtype, rows, D), random(device, dtype, E, D, scale=D**-0.5)
    logits_SE, expert_SK, weight_SK = route_rows(x_SD, router_ED, K)
    torch.testing.assert_close(logits_SE, x_SD.float() @ router_ED.float().T, **tolerance(dtype))
    chosen_SK, chosen_weight_SK = choose_experts(logits_SE, K)
    assert torch.equal(expert_SK, chosen_SK)
    torch.testing.assert_close(weight_SK, chosen_weight_SK)
    alone = [route_rows(x_1D, router_ED, K)[0] for x_1D in x_SD[:20].split(1)]
    assert torch.equal(torch.cat(alone), logits_SE[:20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("page_size", [16, 256])
def test_paged_decode(device: torch.device, dtype: torch.dtype, window: int | None, page_size: int) -> None:
    contexts = [1, 17, 255, 256, 257, 1024, 5000]
    counts = [-(-context // page_size) for context in contexts]
    pages = torch.randperm(sum(counts), device=device)
    key_NGC, value_NGC = random(device, dtype, 2, sum(counts) * page_size, G, C)
    query_BHC = random(device, dtype, len(contexts), H, C)
    begins = [sum(counts[:i]) for i in range(len(counts))]
    numbers = (torch.tensor(x, dtype=torch.int32, device=device) for x in (begins, contexts))
    splits = splits_for(len(contexts), G, torch.cuda.get_device_properties(device).multi_processor_count)
    found = paged_decode(
        query_BHC, (key_NGC, value_NGC), PageTable(pages.int(), *numbers),
        page_size=page_size, window=window, splits=splits,
    )  # fmt: skip
    for query_HC, begin, count, context, found_HC in zip(query_BHC, begins, counts, contexts, found, strict=True):
        slots = (pages[begin : begin + count, None] * page_size + torch.arange(page_size, device=device)).flatten()
        slots = slots[max(0, context - (window or context)) : context]
        border = torch.tensor([0], device=device)
        chunks = Chunks((1,), (len(slots),), border, border)
        expected = masked_attention(
            query_HC[None].float(), key_NGC[slots].float(), value_NGC[slots].float(), chunks, None
        )
        torch.testing.assert_close(found_HC.float(), expected[0], **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 100])
def test_flash_attention(device: torch.device, dtype: torch.dtype, window: int | None) -> None:
    attend: VarlenAttention = varlen_attention_for(device, dtype, C)
    assert attend is not masked_attention
    rows, keys = (1, 300, 64), (500, 300, 1000)
    borders = [torch.tensor([0, *x], device=device).cumsum(0).int() for x in (rows, keys)]
    chunks = Chunks(rows, keys, *borders)
    query_LHC = random(device, dtype, sum(rows), H, C)
    key_MGC, value_MGC = random(device, dtype, 2, sum(keys), G, C)
    found = attend(query_LHC, key_MGC, value_MGC, chunks, window)
    expected = masked_attention(query_LHC.float(), key_MGC.float(), value_MGC.float(), chunks, window)
    torch.testing.assert_close(found.float(), expected, **tolerance(dtype))


def experts_of(gate_up_EFD: Tensor, down_EDF: Tensor) -> list[ExpertWeights]:
    pairs = zip(gate_up_EFD.float(), down_EDF.float(), strict=True)
    return [ExpertWeights(PlainLinear(gate_up), PlainLinear(down)) for gate_up, down in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [*BATCHES, 1024])
def test_grouped_experts(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    gate_up, down = random(device, dtype, E, 2 * F, D, scale=D**-0.5), random(device, dtype, E, D, F, scale=F**-0.5)
    x_SD = random(device, dtype, tokens, D)
    routing = route(x_SD.float(), random(device, torch.float32, E, D), K)
    listed = OneDevice(OneRank(E), sort_pairs).dispatch(0, x_SD, routing.expert_SK, routing.weight_SK)
    expected_SD = reference_experts(x_SD.float(), routing.expert_SK, routing.weight_SK, experts_of(gate_up, down))
    stacks = WeightStack.plain(gate_up), WeightStack.plain(down)
    found = grouped_experts(x_SD, listed.order_N, listed.first_L, routing.weight_SK, *stacks)
    torch.testing.assert_close(found.sum(1), expected_SD, **tolerance(dtype))
    products = [product for stack in stacks if (product := grouped_product_for(stack, dtype))]
    has_products = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    assert len(products) == (2 if has_products else 0)
    if products:
        torch.testing.assert_close(grouped_products(listed, *products).sum(1), expected_SD, **tolerance(dtype))


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_quantised_experts(device: torch.device, mode: Mode, dtype: torch.dtype, tokens: int) -> None:
    plain = random(device, dtype, E, 2 * F, D, scale=D**-0.5), random(device, dtype, E, D, F, scale=F**-0.5)
    weights = [[quantize(weight_OI, mode) for weight_OI in stack] for stack in plain]
    stacks = [
        WeightStack.quantized(mode, torch.stack([w.packed_OP for w in stack]), torch.stack([w.scale_OG for w in stack]))
        for stack in weights
    ]
    x_SD = random(device, dtype, tokens, D)
    routing = route(x_SD.float(), random(device, torch.float32, E, D), K)
    listed = OneDevice(OneRank(E), sort_pairs).dispatch(0, x_SD, routing.expert_SK, routing.weight_SK)
    found = grouped_experts(x_SD, listed.order_N, listed.first_L, routing.weight_SK, *stacks)
    experts = experts_of(*(torch.stack([w.dequantize(dtype) for w in stack]) for stack in weights))
    expected_SD = reference_experts(x_SD.float(), routing.expert_SK, routing.weight_SK, experts)
    torch.testing.assert_close(found.sum(1), expected_SD, **tolerance(dtype))

    products = [product for stack in stacks if (product := grouped_product_for(stack, dtype))]
    if products:
        # Rows are rounded to fp8, twice: each number by up to a sixteenth.
        error_SD = grouped_products(listed, *products).sum(1) - expected_SD
        assert error_SD.square().mean() < 1e-2 * expected_SD.square().mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", BATCHES)
def test_round_rows(device: torch.device, dtype: torch.dtype, rows: int) -> None:
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("this GPU has no fp8")
    x_TI = random(device, dtype, rows, F)
    code_TI, scale_T = round_rows(x_TI)
    torch.testing.assert_close(scale_T, x_TI.float().abs().amax(-1) / FP8_MAX)
    # Of two numbers of fp8 as near as makes no difference either will do.
    torch.testing.assert_close(code_TI.float() * scale_T[:, None], x_TI.float(), rtol=1 / 15, atol=2e-5)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_quantised_product(device: torch.device, mode: Mode, dtype: torch.dtype, rows: int) -> None:
    weight = quantize(random(device, dtype, 6144, D, scale=D**-0.5), mode)
    x_TI = random(device, dtype, rows, D)
    expected = x_TI.float() @ weight.dequantize(dtype).float().T
    found = quantized_product(x_TI, WeightStack.of_one(weight))
    torch.testing.assert_close(found.float(), expected, **tolerance(dtype))

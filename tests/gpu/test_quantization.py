"""Quantising on the device gives the codes that a CPU gives, and every way of multiplying there the same product."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch.nn import functional

from model.modes import Mode
from model.quantization import quantize
from model.quantized_linear import Fp8Linear, QuantizedLinear, make_quantized_linear

O, I = 6144, 4096  # noqa: E741


@pytest.fixture(scope="module")
def weight_OI() -> torch.Tensor:
    return (torch.randn(O, I, generator=torch.Generator().manual_seed(0)) * I**-0.5).bfloat16()


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_device_quantises_as_the_cpu_does(device: torch.device, mode: Mode, weight_OI: torch.Tensor) -> None:
    expected, found = quantize(weight_OI, mode), quantize(weight_OI.to(device), mode)
    assert torch.equal(found.packed_OP.view(torch.uint8).cpu(), expected.packed_OP.view(torch.uint8))
    assert torch.equal(found.scale_OG.cpu(), expected.scale_OG)
    assert torch.equal(found.dequantize(torch.bfloat16).cpu(), expected.dequantize(torch.bfloat16))


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("rows", [0, 1, 16, 64, 65, 2048])
def test_every_way_multiplies_the_same(device: torch.device, mode: Mode, rows: int, weight_OI: torch.Tensor) -> None:
    weight = quantize(weight_OI.to(device), mode)
    x_TI = torch.randn(rows, I, device=device).bfloat16()
    expected_TO = functional.linear(x_TI, weight.dequantize(torch.bfloat16))
    linear = make_quantized_linear(weight, torch.bfloat16)
    # Where rows of x are rounded to fp8 too, each of 4096 products is off by up to 1/16: their sum by about 4 %.
    error = 8e-2 if isinstance(linear, Fp8Linear) else 2e-2
    torch.testing.assert_close(linear(x_TI), expected_TO, rtol=error, atol=4 * error)
    plainly = QuantizedLinear(weight, torch.bfloat16)
    torch.testing.assert_close(plainly(x_TI), expected_TO, rtol=2e-2, atol=2e-2)
